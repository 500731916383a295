r"""Passes over a leaf: several reductions at once, rows first, nothing of the leaf's size written.

A reduction of several operands is one loop over the elements, into which XLA fuses what computes them. A
reduction of one operand it takes, on a CPU, from a materialised array, and a reduction to a scalar on one core. So
the sums here are of several operands, over the last axes first and over the remaining ones after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge.tree import Array

ROW = 256  # elements that a row has at least, if the leaf has them: a shorter loop is not worth starting


def leading(shape: Sequence[int]) -> int:
    """Return how many leading axes index rows; the others, `ROW` elements or more, are within a row."""
    axes = max(len(shape) - 1, 0)
    while axes and math.prod(shape[axes:]) < ROW:
        axes -= 1
    return axes


def row_sums(operands: Sequence[Array], axes: int) -> list[Array]:
    """Sum each of several arrays of one shape within its rows, in one pass; the first `axes` axes remain."""

    def add(a: Sequence[Array], b: Sequence[Array]) -> Sequence[Array]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    several = tuple(operands) if len(operands) > 1 else (operands[0], operands[0])
    zeros = tuple(jnp.zeros((), x.dtype) for x in several)
    rows = jax.lax.reduce(several, zeros, add, tuple(range(axes, several[0].ndim)))
    # The barrier keeps the compiler from making one sum of two alike.
    return list(jax.lax.optimization_barrier(rows))[: len(operands)]


@jax.custom_jvp
def sums(operands: Sequence[Array]) -> list[Array]:
    """Sum each of several arrays of one shape, in one pass.

    Example:
      >>> sums([jnp.ones((2, 3)), jnp.zeros((2, 3))])
      [Array(6., dtype=float32), Array(0., dtype=float32)]
    """
    return [rows.sum(dtype=rows.dtype) for rows in row_sums(operands, leading(operands[0].shape))]


@sums.defjvp
def _sums_jvp(primals, tangents):
    # The derivative of a reduction of several operands would be a tree of slices.
    return sums(*primals), [tangent.sum() for tangent in tangents[0]]


def take(array: Array, index: tuple[Array, ...]) -> Array:
    """Gather `array[index]` with 1-d index arrays for the leading axes; on a mesh only what is gathered moves."""
    placed = jax.typeof(array).sharding
    # A mesh with explicit axes wants to be told where the result lies.
    out = NamedSharding(placed.mesh, PartitionSpec(None, *placed.spec[len(index) :])) if any(placed.spec) else None
    return array.at[index].get(mode="promise_in_bounds", out_sharding=out)


def replicate(array: Array) -> Array:
    """Bring a small array whole to every device, where a mesh with explicit axes must be told to."""
    placed = jax.typeof(array).sharding
    if not any(placed.spec):
        return array
    return jax.sharding.reshard(array, NamedSharding(placed.mesh, PartitionSpec(*[None] * array.ndim)))
