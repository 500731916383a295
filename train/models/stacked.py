"""Layers stacked along a leading axis, for scanning: L times fewer operations to compile; and back, bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..log import UserError
from .decoder import Params, is_stacked


def stack_layers(params: Params) -> Params:
    """`layers/0/…`, `layers/1/…` → `layers/stacked/…` with a leading axis L; stacked ones are returned as they are."""
    if is_stacked(params):
        return params
    layers = params.get("model", {}).get("layers", {})
    kinds = {str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), layer)) for layer in layers.values()}
    if len(kinds) != 1 or layers.keys() != {str(i) for i in range(len(layers))}:
        raise UserError(
            f"layers {', '.join(layers) or 'are none'}: only alike ones, from 0 on, can be stacked (an adapter of some "
            "layers cannot); leave them unrolled"
        )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[str(i)] for i in range(len(layers))))
    return with_layers(params, {"stacked": stacked})


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`; arrays or their shapes."""
    if not is_stacked(params):
        return params
    stacked = params["model"]["layers"]["stacked"]
    count = jax.tree.leaves(stacked)[0].shape[0]

    def pick(leaf, i: int):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return leaf[i]

    return with_layers(params, {str(i): jax.tree.map(lambda leaf, i=i: pick(leaf, i), stacked) for i in range(count)})


def with_layers(params: Params, layers: Params) -> Params:
    return {**params, "model": {**params["model"], "layers": layers}}
