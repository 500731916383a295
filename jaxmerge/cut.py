r"""Which elements are the k largest, exactly and without sorting: a few counting passes over bit patterns.

The bit patterns of non-negative floats, read as unsigned integers, are in the order of the floats. So the k
largest are those from some pattern on, and a search finds it: a bracket low … high, with at least k patterns ≥ low
and fewer than k ≥ high, is narrowed by counting the patterns at or above a few that are tried.

- First a sample of the elements is sorted. Its quantile is the guess, and its size says how far off that may be.
- Then guesses are interpolated between the counts at the ends of the bracket, with a margin for chance.
- Where the sample repeats a value, as differences of bfloat16 do by the thousand, that value and its successor
  are tried: if the k-th is one of the elements equal to it, this ends the search.
- After a pass that left in more than a quarter of the elements inside, the next tries the roundest number inside, the
  one of most trailing zeros, its successor, the roundest on either side, and a new low end's successor: differences
  of weights of few bits are such numbers. So the search ends with any data: log₄ n passes of the one kind leave out
  all elements, 31 of the other all patterns of 32 bits. One to six passes in all are usual.

A pass serves all models and all their k. It computes the magnitudes anew from the weights as they are stored and
writes one count a row, no element moves over a mesh, and the result is exact: the same on every mesh.

Ties are broken by position: among equal magnitudes the lower flat index (C order) ranks higher. The counts a row
say in which row the cut among them falls, and that row alone is looked at again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge import passes
from jaxmerge.tree import Array

SAMPLE = 4096
TRIED = 4  # patterns a pass and k
Stored = tuple[Array, ...]
Values = Callable[[Stored], Sequence[Array]]


class Cut(NamedTuple):
    """The k largest: patterns from `high` on, and from `low` on at flat positions before `end`."""

    low: Array
    high: Array
    end: Array

    def mask(self, magnitude: Array) -> Array:
        """Return the mask of the k largest, given the array that was cut."""
        return patterns(magnitude) >= jnp.where(positions(magnitude.shape) < self.end, self.low, self.high)


class Bracket(NamedTuple):
    """Q searches: low ≤ the pattern searched < high, and how many patterns are ≥ low (at least k), ≥ high (fewer)."""

    low: Array  # [Q]
    high: Array  # [Q]
    rows_low: Array  # [Q, *rows] uint32: by row
    rows_high: Array
    count_low: Array  # [Q] uint32: of all rows
    count_high: Array
    stalled: Array  # [Q] bool: the last pass did not leave out three quarters of the elements inside
    fresh: Array  # [Q] bool: the low end's successor has not been tried
    passed: Array  # () int32: passes so far


def patterns(magnitude: Array) -> Array:
    """Return the bit patterns of floats' magnitudes as unsigned integers, in the same order."""
    dtype = jnp.uint64 if magnitude.dtype == jnp.float64 else jnp.uint32
    # −0.0 has the sign bit set: the magnitude of a negative zero must not rank first.
    return jax.lax.bitcast_convert_type(jnp.abs(jax.lax.stop_gradient(magnitude)), dtype)


def positions(shape: tuple[int, ...]) -> Array:
    """Return each element's flat index in C order, uint32."""
    flat = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]))
        flat = flat + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return flat


def cuts(values: Values, stored: Stored, ks: Sequence[Sequence[Array]]) -> list[list[Cut]]:
    """Cut each of several arrays at its k largest, for several k, in shared passes.

    Args:
      values: elementwise `stored -> N arrays`, computed anew in every pass. It has to round alike each time, so
        nothing like a·b + c, which compilers contract or not as the loops fall.
      stored: arrays of one shape; behind a `jax.lax.optimization_barrier` where they may be computed themselves.
      ks: for each of the N arrays its counts, uint32 in 0 … n.

    Returns:
      For each of the N arrays, a cut for each of its counts.
    """
    if not stored[0].size:
        nothing = jnp.zeros((), jnp.uint32)
        return [[Cut(nothing, nothing, nothing) for _ in counts] for counts in ks]
    which = [i for i, counts in enumerate(ks) for _ in counts]
    k = jnp.stack([jnp.asarray(count, jnp.uint32) for counts in ks for count in counts])
    stored = tuple(array.reshape(_rows(array)) for array in stored)

    def bits(stored: Stored) -> list[Array]:
        found = [patterns(value) for value in values(stored)]
        return [found[i] for i in which]

    some = jnp.maximum(k, 1)
    bracket = search(bits, stored, some)
    end = _end(bits, stored, some, bracket)
    low, high = (jnp.where(k > 0, pattern, beyond(pattern.dtype)) for pattern in (bracket.low, bracket.high))
    found = iter([Cut(low[q], high[q], end[q]) for q in range(len(which))])
    return [[next(found) for _ in counts] for counts in ks]


def _rows(array: Array) -> tuple[int, ...]:
    """Return a shape of the same elements in the same order, of a vector with rows to count and to look at."""
    if array.ndim > 1 or any(jax.typeof(array).sharding.spec):  # a mesh with explicit axes splits none of its own
        return array.shape
    rows = math.gcd(array.size, 4096)  # a power of two: where devices share a vector, each has whole rows
    return (rows, array.size // rows) if array.size // rows >= passes.ROW else (array.size,)


def search(bits: Callable[[Stored], list[Array]], stored: Stored, k: Array) -> Bracket:
    """Search for Q patterns with k elements (1 … n) from them on; `bits` gives the Q arrays of patterns.

    In the end no pattern is between low and high, or exactly k are at or above low.
    """
    shape, axes = stored[0].shape, passes.leading(stored[0].shape)
    draw = np.random.default_rng(0)
    index = tuple(jnp.asarray(draw.integers(0, size, SAMPLE), jnp.int32) for size in shape)
    sample = jnp.sort(jnp.stack(bits(tuple(passes.take(array, index) for array in stored))), axis=-1)

    def step(bracket: Bracket) -> Bracket:
        # Tied to what is tried, the weights change with every pass as far as the compiler knows: it would otherwise
        # compute the magnitudes once, before the loop, and hold them all.
        tried, read = jax.lax.optimization_barrier((_propose(bracket, k, sample), stored))
        rows = _count_rows(bits(read), tried, axes)
        low, high, rows_low, rows_high, count_low, count_high, _, _, passed = bracket
        for j in range(TRIED):
            t, row = tried[:, j], rows[:, j]
            count = row.sum(axis=tuple(range(1, row.ndim)), dtype=jnp.uint32)
            up, down = (count >= k) & (t > low), (count < k) & (t < high)
            row_up, row_down = (side.reshape(side.shape + (1,) * axes) for side in (up, down))
            low, rows_low, count_low = (
                jnp.where(up, t, low), jnp.where(row_up, row, rows_low), jnp.where(up, count, count_low)
            )  # fmt: skip
            high, rows_high, count_high = (
                jnp.where(down, t, high), jnp.where(row_down, row, rows_high), jnp.where(down, count, count_high)
            )  # fmt: skip
        stalled = count_low - count_high > (bracket.count_low - bracket.count_high) // 4
        untried = jnp.all(tried != bracket.low[:, None] + 1, axis=-1)
        fresh = (low > bracket.low) | (bracket.fresh & untried)
        return Bracket(low, high, rows_low, rows_high, count_low, count_high, stalled, fresh, passed + 1)

    def unsettled(bracket: Bracket) -> Array:
        return jnp.any((bracket.high - bracket.low > 1) & (bracket.count_low != k))

    none = jnp.zeros(k.shape + shape[:axes], jnp.uint32)
    placed = jax.typeof(stored[0]).sharding
    if any(placed.spec[:axes]):
        # A mesh with explicit axes wants the counts of the rows to lie where the rows do from the start.
        none = jax.sharding.reshard(none, NamedSharding(placed.mesh, PartitionSpec(None, *placed.spec[:axes])))
    start = Bracket(
        low=jnp.zeros(k.shape, sample.dtype),
        high=jnp.full(k.shape, beyond(sample.dtype)),
        rows_low=none + np.uint32(math.prod(shape[axes:])),
        rows_high=none,
        count_low=jnp.full(k.shape, math.prod(shape), jnp.uint32),
        count_high=jnp.zeros(k.shape, jnp.uint32),
        stalled=jnp.zeros(k.shape, bool),
        fresh=jnp.zeros(k.shape, bool),
        passed=jnp.int32(0),
    )
    return jax.lax.while_loop(unsettled, step, start)


def beyond(unsigned: np.dtype) -> Array:
    """Return the sign bit: beyond the patterns of all magnitudes, NaN among them."""
    return jnp.asarray(np.asarray(1 << (8 * unsigned.itemsize - 1), unsigned))


def _propose(bracket: Bracket, k: Array, sample: Array) -> Array:
    """Return the patterns to try next, [Q, TRIED], each between low and high; `sample` is sorted, [Q, SAMPLE]."""
    low, high, one = bracket.low, bracket.high, np.ones((), bracket.low.dtype)
    inside = (bracket.count_low - bracket.count_high).astype(jnp.float32)
    share = ((bracket.count_low - k).astype(jnp.float32) + 0.5) / inside  # of those inside, below the one searched

    def sampled(rank: Array) -> Array:
        rank = jnp.clip(rank.astype(jnp.int32), 0, SAMPLE - 1)
        return jnp.take_along_axis(sample, rank[:, None], axis=-1)[:, 0]

    first, last = (jnp.sum(sample < end[:, None], axis=-1).astype(jnp.float32) for end in (low, high))
    rank = first + share * (last - first)
    guess = sampled(jnp.floor(jnp.clip(rank, first, last - 1)))
    repeated = (last > first) & ((sampled(rank + 1) == guess) | (sampled(rank - 1) == guess))
    by_chance = jnp.sqrt(jnp.maximum((last - first) * share * (1 - share), 1))  # of the rank

    kind = jnp.float64 if low.dtype == jnp.uint64 else jnp.float32
    least = jax.lax.bitcast_convert_type(low, kind)
    most = jnp.minimum(jax.lax.bitcast_convert_type(high, kind), jnp.finfo(kind).max)
    most = jnp.where(jnp.isnan(most), jnp.finfo(kind).max, most)
    spread = jnp.sqrt(jnp.maximum(inside * share * (1 - share), 0.25)) / inside  # of the share
    margin = jnp.maximum(4 * spread, 1 / 32)  # the values inside are not spread evenly

    def interpolated(share: Array) -> Array:
        return patterns(least + jnp.clip(share, 0, 1).astype(kind) * (most - least))

    def around(far: float, wide: Array) -> Array:
        return jnp.where(bracket.passed == 0, sampled(rank + far * by_chance), interpolated(share + wide))

    # The low end was a value of the sample: if that is repeated, the k-th may well be it, and its successor tells.
    heavy = (bracket.passed > 0) & (last > first + 1) & (sampled(first) == low) & (sampled(first + 1) == low)
    tried = jnp.stack(
        [
            jnp.where(heavy, low + one, around(-4, -margin)),
            jnp.where(repeated, guess, around(-0.5, -spread)),
            jnp.where(repeated, guess + one, around(0.5, spread)),
            around(4, margin),
        ]
    )
    middle = _roundest(low, high)
    other = jnp.where(bracket.fresh, low + one, _roundest(middle, high))
    halves = jnp.stack([middle, middle + one, _roundest(low, middle), other])
    tried = jnp.clip(jnp.where(bracket.stalled, halves, tried), low + one, high - one).T
    # The order does not matter; a sort in its body keeps XLA from running the loop on one core of a CPU, which it
    # does with loops all of whose operations it compiles into one function (its "small" loops, whatever their size).
    return jnp.sort(tried, axis=-1)


def _roundest(low: Array, high: Array) -> Array:
    """Return the pattern of most trailing zeros between low and high; low where there is none."""
    last = jnp.maximum(high - 1, low)
    below = (~np.zeros((), low.dtype) >> np.ones((), low.dtype)) >> jax.lax.clz(low ^ last)
    return last & ~below


def _count_rows(bits: list[Array], tried: Array, axes: int) -> Array:
    """Count in each row the patterns at or above those tried: [Q, T, *rows]."""
    ones = [(b >= tried[q, j]).astype(jnp.uint32) for q, b in enumerate(bits) for j in range(TRIED)]
    if math.prod(bits[0].shape[axes:]) < 1 << 16:
        # Two counts of a row fit one word: half the sums.
        words = passes.row_sums([one | (other << 16) for one, other in zip(ones[::2], ones[1::2], strict=True)], axes)
        counts = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    else:
        counts = passes.row_sums(ones, axes)
    # Stacked, not reshaped: a mesh with explicit axes splits no axis beside one of its own, in jax 0.10.
    return jnp.stack([jnp.stack(counts[q * TRIED : (q + 1) * TRIED]) for q in range(len(bits))])


def _end(bits: Callable[[Stored], list[Array]], stored: Stored, k: Array, bracket: Bracket) -> Array:
    """Return the flat position after the last element taken of those from low to high, [Q]."""
    shape, axes = stored[0].shape, passes.leading(stored[0].shape)
    wanted = k - bracket.count_high
    row = jnp.zeros(k.shape, jnp.uint32)
    looked_at = [bits(stored)[q] for q in range(k.size)]
    if axes:
        band = passes.replicate(bracket.rows_low - bracket.rows_high).reshape(k.size, -1)
        row = jnp.sum(jnp.cumsum(band, axis=-1) < wanted[:, None], axis=-1, dtype=jnp.uint32)
        before = jnp.arange(band.shape[-1], dtype=jnp.uint32) < row[:, None]
        wanted = wanted - jnp.sum(jnp.where(before, band, 0), axis=-1, dtype=jnp.uint32)
        for q in range(k.size):
            index = jnp.unravel_index(row[q : q + 1].astype(jnp.int32), shape[:axes])
            looked_at[q] = bits(tuple(passes.take(array, index) for array in stored))[q]
    taken = [(b >= low) & (b < high) for b, low, high in zip(looked_at, bracket.low, bracket.high, strict=True)]
    within = jax.vmap(_nth)(jnp.stack(taken), wanted)
    return row * np.uint32(math.prod(shape[axes:])) + within + 1


def _nth(mask: Array, n: Array) -> Array:
    """Return the flat position of the n-th (1 the first) true element: four bits a step, nothing is gathered."""
    position = positions(mask.shape)
    steps = -(-max(mask.size - 1, 1).bit_length() // 4)

    def step(i: Array, found: Array) -> Array:
        shift = (4 * (steps - 1 - i)).astype(jnp.uint32)
        tried = [found + (np.uint32(digit) << shift) for digit in range(1, 16)]
        counts = passes.sums([(mask & (position < t)).astype(jnp.uint32) for t in tried])
        return found + (sum((count < n).astype(jnp.uint32) for count in counts) << shift)

    return jax.lax.fori_loop(0, steps, step, jnp.uint32(0))
