r"""Order statistics of a leaf: the k largest, the k-th largest, the ranks in a row; and how many k is.

The first two are exact and sort nothing: see `jaxmerge.cut`. Ranks take a sort of every row.
"""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge import cut
from jaxmerge.tree import Array, is_concrete


def top(magnitude: Array, k: Array) -> Array:
    """Return a mask of exactly k elements, the largest, ties to the lower flat index; k uint32 in 0 … n.

    Example:
      >>> top(jnp.array([1.0, 2.0, 1.0, 0.0]), jnp.uint32(2))
      Array([ True,  True, False, False], dtype=bool)
    """
    fixed = _fixed(magnitude)
    ((found,),) = cut.cuts(lambda stored: stored, (fixed,), [[k]])
    return found.mask(fixed)


def kth_largest(magnitude: Array, k: Array) -> Array:
    """Return the k-th largest (k = 1 the largest) of non-negative floats, for each k; uint32 in 1 … n.

    Example:
      >>> kth_largest(jnp.array([3.0, 1.0, 2.0]), jnp.uint32([2, 3]))
      Array([2., 1.], dtype=float32)
    """
    fixed = _fixed(magnitude).reshape(magnitude.shape or (1,))
    bits = cut.patterns(fixed)
    low = cut.search(lambda stored: [cut.patterns(stored[0])] * k.size, (fixed,), jnp.atleast_1d(k)).low
    # The least that occurs from there on.
    least = jnp.stack([jnp.min(jnp.where(bits >= from_, bits, cut.beyond(bits.dtype))) for from_ in low])
    return jax.lax.bitcast_convert_type(least.reshape(k.shape), magnitude.dtype)


def _fixed(magnitude: Array) -> Array:
    """Have it computed once: a compiler that computes it again for each use may round otherwise the second time,
    and then the k-th largest is equal to none."""
    return jax.lax.optimization_barrier(jax.lax.stop_gradient(magnitude))


def ranks(magnitude: Array) -> Array:
    """Return each element's rank along the last axis, 0 the smallest, ties by position; int32.

    Example:
      >>> ranks(jnp.array([[0.3, 0.1, 0.2]]))
      Array([[2, 0, 1]], dtype=int32)
    """
    rows = cut.patterns(magnitude)
    placed = jax.typeof(rows).sharding
    whole = NamedSharding(placed.mesh, PartitionSpec(*placed.spec[:-1], None))
    # A mesh with explicit axes sorts only what is whole; with automatic ones the compiler sees to it.
    rows = rows if placed.spec == whole.spec else jax.sharding.reshard(rows, whole)
    position = jax.lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1)
    position = position if placed.spec == whole.spec else jax.sharding.reshard(position, whole)
    # Integers, for a CPU sorts floats, with their NaN and two zeros, at a third of the speed.
    _, order = jax.lax.sort((rows, position), dimension=rows.ndim - 1, num_keys=1, is_stable=True)
    ranked = jax.lax.platform_dependent(order, tpu=_inverse_by_sort, default=_inverse_by_scatter)
    return ranked if placed.spec == whole.spec else jax.sharding.reshard(ranked, placed)


def _inverse_by_scatter(order: Array) -> Array:
    """Invert the permutations along the last axis."""

    def invert(order: Array) -> Array:
        return (
            jnp.zeros_like(order)
            .at[order]
            .set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True, mode="promise_in_bounds")
        )

    for _ in range(order.ndim - 1):
        invert = jax.vmap(invert)
    return invert(order)


def _inverse_by_sort(order: Array) -> Array:
    """As `_inverse_by_scatter`: a TPU sorts faster than it scatters."""
    return jnp.argsort(order, axis=-1).astype(order.dtype)


def share(value: Any, n: int, *, name: str, least: int = 0) -> Any:
    r"""Turn a density into a count, $\lfloor density \cdot n \rfloor$, taken on the host in float64.

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
    r"""Return $\lfloor p\,m/q \rfloor$ in uint32 without overflow: p·(m div q) + p·(m mod q) div q."""
    p, q = ratio[0], ratio[1]
    return p * (count // q) + p * (count % q) // q


at_least_one = functools.partial(share, least=1)
