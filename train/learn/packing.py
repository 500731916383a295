"""Several examples in one row, so that less of a batch is padding: which go together, and the arrays of a row.

A packed row has segment ids: an example sees no other, and positions count from 0 in each (`restart` in
train/models/branches.py). So the loss is that of the examples one by one.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from ..log import UserError


def pack(lengths: Sequence[int], capacity: int, *, window: int | None = None) -> list[tuple[int, ...]]:
    """Put examples into rows of `capacity` tokens: best fit, the longest first, within windows of the order given.

    Args:
      lengths: tokens of each example; none is longer than `capacity`.
      capacity: tokens of a row.
      window: examples considered together; None takes all. A window keeps examples near their place in the order.

    Returns:
      The example numbers of each row, ascending; every example is in exactly one row. Equal input, equal rows.

    Example:
      >>> pack([5, 3, 9, 4, 2], 10)
      [(2,), (0, 3), (1, 4)]
    """
    if window is not None and window < 1:
        raise UserError(f"packing: window is {window}; it must be at least 1")
    too_long = [i for i, n in enumerate(lengths) if not 1 <= n <= capacity]
    if too_long:
        raise UserError(f"packing: example {too_long[0]} has {lengths[too_long[0]]} tokens, a row {capacity}")
    rows: list[tuple[int, ...]] = []
    size = window or max(len(lengths), 1)
    for start in range(0, len(lengths), size):
        rows += _best_fit(range(start, min(start + size, len(lengths))), lengths, capacity)
    return rows


def _best_fit(members: Sequence[int], lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for i in sorted(members, key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at == len(room):
            rows.append([i])
            left, row = capacity - lengths[i], len(rows) - 1
        else:
            space, row = room.pop(at)
            rows[row].append(i)
            left = space - lengths[i]
        if left:
            bisect.insort(room, (left, row))
    return [tuple(sorted(row)) for row in rows]


def fill(
    tokens: Sequence[np.ndarray], weights: Sequence[np.ndarray], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row of `length` tokens from its examples: (tokens int32, weights float32, segments int32), [length] each.

    Segments count from 1; padding is 0. The first token of an example has no weight: nothing of its own stands
    before it.
    """
    row, learnt, segments = np.full(length, pad_id, np.int32), np.zeros(length, np.float32), np.zeros(length, np.int32)
    at = 0
    for number, (ids, weight) in enumerate(zip(tokens, weights, strict=True), start=1):
        end = at + len(ids)
        row[at:end], learnt[at:end], segments[at:end] = ids, weight, number
        learnt[at] = 0.0
        at = end
    return row, learnt, segments
