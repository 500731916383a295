r"""Exact order statistics without sorting: counting passes over bit patterns.

The bit patterns of non-negative floats, read as unsigned integers, are in the order of the floats. So the
k-th largest is found two bits at a time from the top (a radix select): the largest digit such that at least k
patterns are that large. Each step is one pass of comparing and counting: O(n), exact, any sharding (the
counts are summed over the mesh, no element moves), the same answer on one device and on many.

Ties are broken by position: among equal magnitudes the lower flat index (C order) ranks higher. The cut among
them is found by the same radix select over the flat index, for a cumulative sum would gather the mesh.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge.tree import Array, is_concrete


def _largest(mask: Callable[[Array], Array], holds: Callable[[Array], Array], bits: int, dtype: Any) -> Array:
    """Return the largest unsigned integer t with `holds(count of mask(t))`, true at 0 and falling in t.

    Two bits a step: the three digits are counted in one pass over the elements.
    """
    steps = -(-bits // 2)

    def step(i: Array, found: Array) -> Array:
        shift = jnp.asarray(2 * (steps - 1), dtype) - 2 * jnp.asarray(i, dtype)
        tried = [found | (jnp.asarray(digit, dtype) << shift) for digit in (1, 2, 3)]
        digit = sum(holds(count).astype(dtype) for count in _counts([mask(t) for t in tried]))
        return found | (digit << shift)

    return jax.lax.fori_loop(0, steps, step, jnp.zeros((), dtype))


def _counts(masks: Sequence[Array]) -> Sequence[Array]:
    """Count several masks in one pass: one reduction of several operands, where several would each read all."""

    def add(a: Sequence[Array], b: Sequence[Array]) -> Sequence[Array]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    counted = tuple(mask.astype(jnp.uint32) for mask in masks)
    return jax.lax.reduce(counted, (jnp.uint32(0),) * len(masks), add, tuple(range(masks[0].ndim)))


def patterns(magnitude: Array) -> Array:
    """Return the bit patterns of non-negative floats as unsigned integers, in the same order."""
    dtype = jnp.uint64 if magnitude.dtype == jnp.float64 else jnp.uint32
    # −0.0 has the sign bit set: the magnitude of a negative zero must not rank first.
    bits = jax.lax.bitcast_convert_type(jnp.abs(jax.lax.stop_gradient(magnitude)), dtype)
    # Computed once: a compiler that computes it again for each use may round otherwise the second time, and
    # then the k-th largest is equal to none.
    return jax.lax.optimization_barrier(bits)


def kth_largest(magnitude: Array, k: Array) -> Array:
    """Return the k-th largest (k = 1 the largest) of non-negative floats, shape (); k uint32 in 1 … n.

    Example:
      >>> float(kth_largest(jnp.array([3.0, 1.0, 2.0]), jnp.uint32(2)))
      2.0
    """
    return jax.lax.bitcast_convert_type(_kth_pattern(patterns(magnitude), k), magnitude.dtype)


def _kth_pattern(pattern: Array, k: Array) -> Array:
    bits = pattern.dtype.itemsize * 8
    return _largest(lambda tried: pattern >= tried, lambda count: count >= k, bits, pattern.dtype)


def positions(shape: tuple[int, ...]) -> Array:
    """Return each element's flat index in C order, uint32."""
    flat = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]))
        flat = flat + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return flat


def top(magnitude: Array, k: Array) -> Array:
    """Return a mask of exactly k elements, the largest, ties to the lower flat index; k uint32 in 0 … n.

    Example:
      >>> top(jnp.array([1.0, 2.0, 1.0, 0.0]), jnp.uint32(2))
      Array([ True,  True, False, False], dtype=bool)
    """
    pattern = patterns(magnitude)
    threshold = _kth_pattern(pattern, jnp.maximum(k, 1))
    above, tied = pattern > threshold, pattern == threshold
    larger, equal = _counts([above, tied])
    wanted = k - larger  # of the tied ones; 1 … their number, unless k is 0
    bits = max(2, math.ceil(math.log2(max(magnitude.size, 2))))

    def some_tied() -> Array:
        # The first `wanted` tied positions: up to the largest p with fewer than `wanted` before it.
        position = positions(magnitude.shape)
        last = _largest(lambda p: tied & (position < p), lambda count: count < wanted, bits, jnp.uint32)
        return above | (tied & (position <= last))

    chosen = jax.lax.cond(equal > wanted, some_tied, lambda: pattern >= threshold)
    return (k > 0) & chosen


def ranks(magnitude: Array) -> Array:
    """Return each element's rank along the last axis, 0 the smallest, ties by position; int32.

    Example:
      >>> ranks(jnp.array([[0.3, 0.1, 0.2]]))
      Array([[2, 0, 1]], dtype=int32)
    """
    rows = jax.lax.stop_gradient(magnitude)
    placed = jax.typeof(rows).sharding
    whole = NamedSharding(placed.mesh, PartitionSpec(*placed.spec[:-1], None))
    # A mesh with explicit axes sorts only what is whole; with automatic ones the compiler sees to it.
    rows = rows if placed.spec == whole.spec else jax.sharding.reshard(rows, whole)
    # The inverse permutation of the sort is again a sort: two sorts of rows, no gather over the mesh.
    ranked = jnp.argsort(jnp.argsort(rows, axis=-1), axis=-1).astype(jnp.int32)
    return ranked if placed.spec == whole.spec else jax.sharding.reshard(ranked, placed)


def share(value: Any, n: int, *, name: str, least: int = 0) -> Any:
    r"""Turn a density into a count, :math:`\lfloor density \cdot n \rfloor`, taken on the host in float64.

    At least `least` for a positive density, n for 1 and above. In float32 the floor can differ by one: a
    traced density, which only the device sees, is taken in float32.

    Example:
      >>> int(share(0.29, 100, name="density")), int(share(0.001, 100, name="density", least=1))
      (28, 1)
    """
    if is_concrete(value):
        value = check_share(float(value), name)
        return np.uint32(0 if value <= 0 else n if value >= 1 else max(least, int(value * n)))
    value = jnp.asarray(value, jnp.float32)
    count = jnp.maximum(jnp.floor(value * np.float32(n)), least).astype(jnp.uint32)
    return jnp.where(value <= 0, jnp.uint32(0), jnp.where(value >= 1, jnp.uint32(n), jnp.minimum(count, np.uint32(n))))


def check_share(value: float, name: str) -> float:
    """Raise unless a concrete share is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}, wanted a share in [0, 1]")
    return value


def probability(value: Any, n: int, *, name: str) -> Any:
    """Check a probability where it is concrete."""
    del n
    return check_share(float(value), name) if is_concrete(value) else value


def fraction(value: Any, n: int, *, name: str) -> Any:
    """Turn a share into integers [p, q], q ≤ 65535, so that the device can take ⌊p·m/q⌋ of a count m exactly."""
    del n
    if is_concrete(value):
        ratio = Fraction(check_share(float(value), name)).limit_denominator(65535)
        return np.array([ratio.numerator, ratio.denominator], np.uint32)
    value = jnp.asarray(value, jnp.float32)
    return jnp.stack([jnp.round(value * 65535.0).astype(jnp.uint32), jnp.uint32(65535)])


def share_of(ratio: Array, count: Array) -> Array:
    r"""Return :math:`\lfloor p\,m/q \rfloor` in uint32 without overflow: p·(m div q) + p·(m mod q) div q."""
    p, q = ratio[0], ratio[1]
    return p * (count // q) + p * (count % q) // q


at_least_one = functools.partial(share, least=1)
