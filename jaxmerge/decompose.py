"""Decompositions of a matrix: singular values and vectors, and the nearest matrix with orthonormal columns."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmerge.tree import Array, or_one

# By default GPUs multiply float32 in TF32 and TPUs in bfloat16.
product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Return U [m, r], the singular values [r] from the largest on, and V^T [r, n], r = min(m, n)."""
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    return u, s, v


@jax.custom_jvp
def polar(matrix: Array) -> Array:
    r"""Return the nearest matrix with orthonormal columns, or rows: $U V^\top$ of $U \Sigma V^\top$.

    It has a derivative where no singular value is 0, also where some are equal and U and V have none.
    """
    u, _, v = svd(matrix)
    return product(u, v)


@polar.defjvp
def _polar_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (matrix,), (moved,) = primals, tangents
    u, s, v = svd(matrix)
    inner = product(product(u.T, moved), v.T)
    turned = (inner - inner.T) / or_one(s[:, None] + s[None])
    left = moved - product(u, product(u.T, moved))  # outside the columns of U, and outside the rows of V^T
    right = moved - product(product(moved, v.T), v)
    outside = product(product(left, v.T) / or_one(s), v) + product(u, product(u.T, right) / or_one(s)[:, None])
    return product(u, v), product(product(u, turned), v) + outside
