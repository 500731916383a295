r"""Sums over the elements of a base tensor a and N tuned ones x_i: all that norms, cosines and shares are made of.

With d_i = x_i − a the Gram matrix of (a, d_1 … d_N) has every norm and cosine of models and of deltas in it:
a·x_i = a·a + a·d_i. Built on deltas, not on models, the cosine of two nearly equal models keeps its digits.
Arithmetic is float32 on runs of 8192 elements, and float64 between them. Counts of signs are exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

BLOCK = 1 << 18  # short enough for the cache, long enough that threads seldom wait for the interpreter
ROW = 1 << 13  # a run of products summed in float32; BLAS keeps to one thread on it

# What float32 holds without rounding. Anything else (float64, integers) is measured in float64.
_FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
_NARROW = frozenset(map(np.dtype, (*_FLOATS, np.int8, np.uint8, np.int16, np.uint16, np.bool_)))


@dataclasses.dataclass
class Moments:
    """Sums over `elements` elements of a base and N models; `a + b` is the sums over both.

    gram: float64 [N+1, N+1], products of (a, d_1 … d_N). largest: max|d_i|, [N]. changed: d_i ≠ 0, [N].
    flipped: a and x_i of opposite sign, [N]. both: d_i ≠ 0 and d_j ≠ 0, [N, N]. conflict: of these, opposite
    signs, [N, N]. nan, infinite: elements of (a, x_1 … x_N), [N+1]; an element that is one of these in any
    model counts as 0 in all.
    """

    elements: int
    gram: np.ndarray
    largest: np.ndarray
    changed: np.ndarray
    flipped: np.ndarray
    both: np.ndarray
    conflict: np.ndarray
    nan: np.ndarray
    infinite: np.ndarray

    @classmethod
    def zero(cls, models: int) -> Moments:
        """Return the sums over no element."""

        def counts(*shape: int) -> np.ndarray:
            return np.zeros(shape, np.int64)

        n = models
        return cls(
            0, np.zeros((n + 1, n + 1)), np.zeros(n), counts(n), counts(n), counts(n, n), counts(n, n),
            counts(n + 1), counts(n + 1),
        )  # fmt: skip

    def __add__(self, other: Moments) -> Moments:
        total: dict[str, Any] = {
            f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)
        }
        total["largest"] = np.maximum(self.largest, other.largest)
        return Moments(**total)


def working_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """Return float32 where it holds all of `dtypes` without rounding, else float64."""
    return np.dtype(np.float32 if all(d in _NARROW for d in dtypes) else np.float64)


@dataclasses.dataclass(frozen=True)
class _Count:
    """Count where two masks are both set."""

    mask: np.ndarray

    def __call__(self, one: np.ndarray, two: np.ndarray) -> int:
        return int(np.count_nonzero(np.logical_and(one, two, out=self.mask)))


class Workspace:
    """Buffers for blocks of one base and N models, used again for every block."""

    def __init__(self, models: int, dtype: np.dtype):
        self.models, self.dtype = models, dtype
        self.rows = np.zeros((models + 1, BLOCK), dtype)
        # Where the base, a model, and each delta are above and below zero.
        self.above = np.zeros((models + 2, BLOCK), np.bool_)
        self.below = np.zeros((models + 2, BLOCK), np.bool_)
        self.mask = np.zeros(BLOCK, np.bool_)
        self.careful: Workspace | None = None

    def measure(self, arrays: Sequence[np.ndarray]) -> Moments:
        """Sum over whole flat arrays, base first."""
        total = Moments.zero(self.models)
        for start in range(0, arrays[0].size, BLOCK):
            total += self._block([array[start : start + BLOCK] for array in arrays])
        return total

    def _block(self, arrays: Sequence[np.ndarray]) -> Moments:
        with np.errstate(over="ignore", invalid="ignore"):
            found = self._sums(self._fill(arrays), arrays[0].size)
        return found if np.isfinite(found.gram).all() else self._careful_block(arrays)

    def _careful_block(self, arrays: Sequence[np.ndarray]) -> Moments:
        """Count and set aside what is not finite, or squares beyond float32's range, and sum in float64."""
        if self.careful is None:
            self.careful = Workspace(self.models, np.dtype(np.float64))
        with np.errstate(invalid="ignore"):
            rows = self.careful._fill(arrays)
        nan, finite = np.isnan(rows), np.isfinite(rows)
        rows[:, ~finite.all(0)] = 0
        found = self.careful._sums(rows, arrays[0].size)
        found.nan, found.infinite = nan.sum(1), (~finite & ~nan).sum(1)
        return found

    def _fill(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Convert the arrays into rows, with zeros up to a whole number of runs."""
        size = arrays[0].size
        rows = self.rows[:, : -(-size // ROW) * ROW]
        for row, array in zip(rows, arrays, strict=True):
            row[:size] = array
            row[size:] = 0
        return rows

    def _sums(self, rows: np.ndarray, size: int) -> Moments:
        """Sum over the rows, models among them turned into deltas on the way."""
        found, n = Moments.zero(self.models), self.models
        found.elements = size
        above, below = self.above[:, : rows.shape[1]], self.below[:, : rows.shape[1]]
        count = _Count(self.mask[: rows.shape[1]])

        def signs(at: int, row: np.ndarray) -> None:
            np.greater(row, 0, out=above[at])
            np.less(row, 0, out=below[at])

        signs(n, rows[0])
        for i in range(n):
            row = rows[i + 1]
            signs(n + 1, row)
            found.flipped[i] = count(above[n], below[n + 1]) + count(below[n], above[n + 1])
            np.subtract(row, rows[0], out=row)
            signs(i, row)
            found.changed[i] = np.count_nonzero(above[i]) + np.count_nonzero(below[i])
            found.largest[i] = max(row.max(), -row.min())
            for j in range(i):
                opposite = count(above[i], below[j]) + count(below[i], above[j])
                same = count(above[i], above[j]) + count(below[i], below[j])
                found.conflict[i, j] = found.conflict[j, i] = opposite
                found.both[i, j] = found.both[j, i] = opposite + same
        runs = rows.reshape(n + 1, -1, ROW)
        for i in range(n + 1):
            for j in range(i + 1):
                found.gram[i, j] = found.gram[j, i] = np.vecdot(runs[i], runs[j]).sum(dtype=np.float64)
        return found


def summarise(total: Moments) -> dict[str, Any]:
    r"""Turn sums into measures, as plain numbers; None where one is not defined (0/0).

    norm $\|a\|$; for each model norm $\|d\|$, relative $\|d\|/\|a\|$, cosine of a and x, largest
    max|d|, changed and flipped as shares of the elements; for each pair of models the cosine of their deltas,
    overlap (share of elements that both change) and conflict (share of the overlap with opposite signs).
    """
    gram, n = total.gram, len(total.largest)
    own = float(gram[0, 0])
    models = []
    for i in range(n):
        square, product = float(gram[i + 1, i + 1]), float(gram[0, i + 1])
        models.append(
            {
                "norm": math.sqrt(square),
                "relative": _ratio(math.sqrt(square), math.sqrt(own)) if square else 0.0,
                # ‖x‖² = ‖a‖² + 2a·d + ‖d‖², at least 0 whatever was rounded.
                "cosine": _cosine(own + product, own, max(own + 2 * product + square, 0.0)),
                "largest": float(total.largest[i]),
                "changed": _ratio(int(total.changed[i]), total.elements),
                "flipped": _ratio(int(total.flipped[i]), total.elements),
            }
        )
    pairs = [
        {
            "models": [i, j],
            "cosine": _cosine(float(gram[i + 1, j + 1]), float(gram[i + 1, i + 1]), float(gram[j + 1, j + 1])),
            "overlap": _ratio(int(total.both[i, j]), total.elements),
            "conflict": _ratio(int(total.conflict[i, j]), int(total.both[i, j])),
        }
        for i in range(n)
        for j in range(i + 1, n)
    ]
    return {"elements": total.elements, "norm": math.sqrt(own), "models": models, "pairs": pairs}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _cosine(product: float, one: float, two: float) -> float | None:
    length = math.sqrt(one) * math.sqrt(two)
    return max(-1.0, min(1.0, product / length)) if length else None
