"""The decoder's own weights: cast once a round, laid where decoding wants them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..models.decoder import Params
from ..models.stacked import unstack_layers
from ..runtime.mesh import mesh_of, without_fsdp


def to_decode(params: Params, dtype: str, *, gather: bool = False) -> Params:
    """Weights in the operands' dtype, layers apart; in float32, and where they lie already, the same arrays.

    Args:
      gather: whole over fsdp: 2 P/tensor bytes a device in bfloat16, and no weight is gathered for every token.
    """
    # Scanning over stacked layers would copy a layer's cache at every step.
    params = unstack_layers(params)
    gather = gather and mesh_of(params) is not None
    if jnp.dtype(dtype) == jnp.float32 and not gather:
        return params
    where = jax.tree.map(lambda x: without_fsdp(x.sharding) if gather else x.sharding, params)
    return jax.jit(cast, static_argnums=1, out_shardings=where)(params, dtype)


def cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda x: x.astype(dtype), params)
