"""Ranks within rows by NumPy: on a CPU XLA takes twenty times as long to sort.

Where the leaves of a merge are known and lie in a CPU's memory, `jaxmerge.leaves.leafwise` calls `ranks` beside the
compiled rule. Inside `jit`, on a mesh and on other devices `jaxmerge.order.ranks` computes them. Both agree in every
element: the deltas are those of the rule, in float32 and with subnormal numbers taken for zero, as XLA's arithmetic on
CPUs takes them, and among equal magnitudes the lower position ranks lower.

An element and its position are packed into one word of 64 bits, so that one sort of plain integers orders both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np

BLOCK = 2**16  # elements sorted at once: what a core's own cache holds
LONGEST = 2**20  # elements of a row
LEAST = np.uint32(0x00800000)  # pattern of the least normal number
SIGN = np.uint32(0x7FFFFFFF)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranks(models: Sequence[Any], base: Any, cast: Any = None) -> tuple[np.ndarray, ...]:
    """Return for each model the rank of |model − base| of each element in its row, 0 the smallest.

    Args:
      models: arrays in host memory, of one shape.
      base: one more.
      cast: the dtype to cast them to before; a narrower one than theirs is left to the compiled rule.

    Returns:
      An array a model, uint16 where a row has at most 2^16 elements and uint32 else; none where this is not for NumPy:
      rows of one element, rows that are very long, and float64.
    """
    stored = [np.asarray(array) for array in (*models, base)]
    shape = stored[0].shape
    columns = shape[-1] if shape else 1
    if not 1 < columns <= LONGEST or not all(_is_widened(array.dtype, cast) for array in stored):
        return ()
    rows = [array.reshape(-1, columns) for array in stored]
    found = [np.empty(rows[0].shape, np.uint16 if columns <= 2**16 else np.uint32) for _ in models]
    step = max(1, BLOCK // columns)

    def work(start: int) -> None:
        _rank_block([array[start : start + step] for array in rows], [out[start : start + step] for out in found])

    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(work, range(0, len(rows[0]), step)))
    return tuple(out.reshape(shape) for out in found)


def _rank_block(arrays: list[np.ndarray], outs: list[np.ndarray]) -> None:
    """Rank a few rows of every model, whose base is the last array."""
    *models, base = arrays
    size = math.prod(base.shape)
    position = np.arange(size, dtype=np.uint64)
    rank = np.tile(np.arange(base.shape[-1], dtype=outs[0].dtype), len(base))
    reference = _widened(base)
    for model, out in zip(models, outs, strict=True):
        delta = _widened(model)
        delta -= reference
        packed = _normal(delta.view(np.uint32) & SIGN).astype(np.uint64)
        packed <<= np.uint64(32)
        packed |= position.reshape(base.shape)
        packed.sort(axis=-1)
        packed &= np.uint64(0xFFFFFFFF)
        out.reshape(-1)[packed.reshape(-1).view(np.int64)] = rank


def _is_widened(dtype: np.dtype, cast: Any) -> bool:
    """Whether float32 holds all that a rule would see of it."""
    narrower = cast is not None and np.dtype(cast) not in (dtype, np.float32)
    return dtype.itemsize <= 4 and not narrower


def _widened(array: np.ndarray) -> np.ndarray:
    """As float32 in memory of its own, without subnormal numbers."""
    if array.dtype == ml_dtypes.bfloat16:  # its bits are the upper ones of a float32: four times as fast as a cast
        bits = array.view(np.uint16).astype(np.uint32)
        bits <<= np.uint32(16)
    else:
        bits = array.astype(np.float32).view(np.uint32)
    return (bits * ((bits & SIGN) >= LEAST)).view(np.float32)


def _normal(patterns: np.ndarray) -> np.ndarray:
    """Patterns of magnitudes, those of subnormal numbers as zero."""
    patterns *= patterns >= LEAST
    return patterns
