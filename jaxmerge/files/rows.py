r"""Tensors whose rows are taken from the rows of others: an embedding in the order of another vocabulary."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from jaxmerge.files.checkpoints.source import BLOCK_BYTES, Tensor, fill_by_rows, read


@dataclasses.dataclass(frozen=True)
class Gathered:
    r"""Row t is the mean of row $i_p(t)$ over the parts p where that is not negative; zero without any.

    parts: tensors of alike rows, and of each the row numbers $i_p$. used: rows that are made so; another one
    is the mean of all those (https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Means are of float32 (float64
    where the dtype is), a row of one part is copied bit for bit where the dtypes agree.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    parts: tuple[tuple[Tensor, np.ndarray], ...]
    used: np.ndarray

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def where(self) -> str:
        return ", ".join(dict.fromkeys(tensor.where for tensor, _ in self.parts))

    @property
    def chunked(self) -> bool:
        return all(tensor.chunked for tensor, _ in self.parts)

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        """Fill `buffer` (uint8, C order) with the bytes from byte `start` of the tensor on."""
        if self.chunked:
            fill_by_rows(self, buffer, start, self._rows)
        else:
            whole = self._rows(0, self.shape[0]).reshape(-1).view(np.uint8)
            buffer[:] = whole[start : start + buffer.size]

    def _rows(self, first: int, last: int) -> np.ndarray:
        made = self._gathered(first, last)
        spare = ~self.used[first:last]
        if spare.any():
            made[spare] = self._mean
        return made

    def _gathered(self, first: int, last: int) -> np.ndarray:
        wanted = [(tensor, numbers[first:last]) for tensor, numbers in self.parts]
        count = np.sum([numbers >= 0 for _, numbers in wanted], axis=0)
        made = np.zeros((last - first, *self.shape[1:]), self.dtype)
        several = np.flatnonzero(count > 1)
        place = np.zeros(last - first, int)
        place[several] = np.arange(several.size)
        total = np.zeros((several.size, *self.shape[1:]), np.float64 if self.dtype == np.float64 else np.float32)
        for tensor, numbers in wanted:
            at = np.flatnonzero(numbers >= 0)
            if not at.size:
                continue
            taken = take(tensor, numbers[at])
            alone = count[at] == 1
            made[at[alone]] = taken[alone].astype(self.dtype)
            total[place[at[~alone]]] += taken[~alone].astype(total.dtype)
        if several.size:
            made[several] = (total / count[several].reshape(-1, *[1] * (total.ndim - 1)).astype(total.dtype)).astype(
                self.dtype
            )
        return made

    @functools.cached_property
    def _mean(self) -> np.ndarray:
        """Mean of the used rows, as they are in `dtype`."""
        total = np.zeros(self.shape[1:], np.float64)
        width = max(1, self.size // self.shape[0])
        step = max(1, BLOCK_BYTES // width) if self.chunked else self.shape[0]
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            total += self._gathered(first, last)[self.used[first:last]].sum(0, dtype=np.float64)
        return (total / max(int(self.used.sum()), 1)).astype(self.dtype)


def take(tensor: Tensor, numbers: np.ndarray) -> np.ndarray:
    """Read rows of a tensor by number, in any order: runs of neighbours at a time, where it is chunked."""
    if not tensor.chunked:
        return read(tensor)[numbers]
    width = tensor.size // tensor.shape[0]
    distinct, back = np.unique(numbers, return_inverse=True)
    buffer = np.empty(distinct.size * width, np.uint8)
    starts = np.flatnonzero(np.diff(distinct, prepend=-2) != 1)
    for begin, end in zip(starts, [*starts[1:], distinct.size], strict=True):
        tensor.read_into(buffer[begin * width : end * width], int(distinct[begin]) * width)
    found = buffer.view(tensor.dtype).reshape(-1, *tensor.shape[1:])
    return found if np.array_equal(back, np.arange(distinct.size)) else found[back]
