"""The product of activations with a weight, the way the machine likes it.

Measured with `benchmarks/sft.py` and docs/log.md (2 cores of an AMD EPYC with AVX512-BF16, jax 0.10 and 0.12), in
GFLOP/s a core: every product of float32 95–100, in whatever shape; every product of bfloat16 190–205, but the
gradient of the weight as a product of two matrices 94, for XLA has no bfloat16 kernel for it, and the same gradient
contracted over the rows' and the positions' axes 175. Autodiff takes the slow one, and multiplies the float32
gradient of the output with bfloat16 operands, which no device has a fast kernel for.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax


def matmul_t(x: jax.Array, weight: jax.Array, dtype) -> jax.Array:
    """x [..., in] · weight [out, in]ᵀ, float32 out; operands in `dtype`, forward and backward, sums in float32."""
    if jnp.dtype(dtype) == jnp.float32:
        return _product(x, weight, jnp.dtype(dtype))
    return _low(x, weight, jnp.dtype(dtype))


def _product(x: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # Flattened: XLA's float32 gradient of the weight over three axes is 1.3 × slower here, 2 × on other CPUs.
    flat = x.reshape(-1, x.shape[-1]).astype(dtype)
    y = lax.dot_general(flat, weight.astype(dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _low(x: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return _product(x, weight, dtype)


def _forward(x: jax.Array, weight: jax.Array, dtype: jnp.dtype):
    low, low_weight = x.astype(dtype), weight.astype(dtype)
    # Two empty arrays remember the dtypes in which the gradients are wanted.
    return _product(low, low_weight, dtype), (low, low_weight, jnp.zeros(0, x.dtype), jnp.zeros(0, weight.dtype))


def _backward(dtype: jnp.dtype, saved, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""$\partial x = g W$, $\partial W = \sum_{b,t} g_{bt} x_{bt}^\top$."""
    x, weight, x_like, weight_like = saved
    g, rows = g.astype(dtype), tuple(range(x.ndim - 1))
    d_x = lax.dot_general(g, weight, (((g.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    d_weight = lax.dot_general(g, x, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return d_x.astype(x_like.dtype), d_weight.astype(weight_like.dtype)


_low.defvjp(_forward, _backward)
