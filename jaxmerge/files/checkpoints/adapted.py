r"""Tensors as an adapter makes them of a checkpoint's: rows are made when they are read.

Arithmetic is float32 (float64 for float64 weights), then one rounding to the weight's dtype.

Law: any run of elements has the bits that it has in the whole tensor, on every processor. So B·A is made of tiles of
one shape (`multiply_rows`). Another processor may round the product otherwise in the last place.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

import numpy as np

from jaxmerge.files.checkpoints.source import Tensor, fill_by_rows, read

TILE_ROWS, TILE_RANK = 32, 256
TILE_PRODUCTS = 1 << 18  # multiplications in a tile: OpenBLAS gives no second thread to a product as small as this


def _wide(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class _Like:
    """A tensor in the place, and with the name, dtype and shape, of `base`."""

    base: Tensor

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def size(self) -> int:
        return self.base.size

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.base,)

    @property
    def where(self) -> str:
        return " and ".join(dict.fromkeys(part.where for part in self._parts()))

    @property
    def chunked(self) -> bool:
        return all(part.chunked for part in self._parts())


@dataclasses.dataclass(frozen=True, eq=False)
class Renamed(_Like):
    """The same tensor under another name."""

    title: str

    @property
    def name(self) -> str:
        return self.title

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        self.base.read_into(buffer, start)


@dataclasses.dataclass(frozen=True, eq=False)
class Replaced(_Like):
    """`tensor`, cast to the dtype of the one it stands for."""

    tensor: Tensor

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        own, wanted = self.tensor.dtype, self.dtype
        if own == wanted:
            self.tensor.read_into(buffer, start)
            return
        held = np.empty(buffer.size // wanted.itemsize, own)
        self.tensor.read_into(held.view(np.uint8), start // wanted.itemsize * own.itemsize)
        buffer.view(wanted)[:] = held.astype(wanted)


@dataclasses.dataclass(frozen=True, eq=False)
class Shifted(_Like):
    """A bias b + s·β."""

    shift: Tensor
    scale: float

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.base, self.shift)

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        wide = _wide(self.dtype)
        made = (read(self.base).astype(wide) + self.scale * read(self.shift).astype(wide)).astype(self.dtype)
        buffer[:] = made.view(np.uint8)[start : start + buffer.size]


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted(_Like):
    """W + s·B·A, or W + s·(B·A)ᵀ where the stored weight is [in, out]; with magnitudes, DoRA's rows."""

    a: Tensor
    b: Tensor
    scale: float
    flipped: bool
    magnitude: Tensor | None

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.base, self.a, self.b)

    @property
    def chunked(self) -> bool:
        return self.base.chunked

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        wide, columns = _wide(self.dtype), self.shape[1]
        left, right, magnitude = _factors(self)
        # Where any run costs as much as all, all is read once and kept while its rows are made.
        held = None if self.base.chunked else read(self.base)

        def rows(first: int, last: int) -> np.ndarray:
            if held is None:
                stored = np.empty((last - first, columns), self.dtype)
                self.base.read_into(stored.reshape(-1).view(np.uint8), first * columns * self.dtype.itemsize)
            else:
                stored = held[first:last]
            made = multiply_rows(left, right, first, last)
            made *= self.scale
            made += stored.astype(wide)
            if magnitude is not None:
                made *= (magnitude[first:last] / np.linalg.norm(made, axis=1))[:, None]
            return made.astype(self.dtype)

        fill_by_rows(self, buffer, start, rows)


@functools.lru_cache(maxsize=8)
def _factors(tensor: Adapted) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Read the small factors (left [rows, r], right [r, columns], magnitudes); kept for a tensor's other chunks.

    Left repeats its last row up to a whole number of tiles.
    """
    wide = _wide(tensor.dtype)
    a, b = read(tensor.a).astype(wide), read(tensor.b).astype(wide)
    magnitude = None if tensor.magnitude is None else read(tensor.magnitude).astype(wide)
    left, right = (a.T, b.T) if tensor.flipped else (b, a)
    return np.pad(left, ((0, -len(left) % TILE_ROWS), (0, 0)), "edge"), np.ascontiguousarray(right), magnitude


def multiply_rows(left: np.ndarray, right: np.ndarray, first: int, last: int) -> np.ndarray:
    """Return rows [first, last) of left @ right, bit for bit those of the whole product.

    BLAS chooses its kernel, and with it the order of sums, by the shapes it is given and by the processor. So a product
    of a few rows may differ in the last place from the same rows of the whole. Here every product is a tile whose
    shape depends on the factors alone: tiles begin at multiples of TILE_ROWS rows, and those that hold a wanted row are
    computed whole. Tiles are so small that BLAS keeps to one thread, so the number of threads changes nothing either.

    Args:
      left: [n, r], n a multiple of TILE_ROWS.
      right: [r, columns].
      first, last: 0 ≤ first < last ≤ n.
    """
    begin, end = first // TILE_ROWS, -(-last // TILE_ROWS)
    rows = left.reshape(-1, TILE_ROWS, left.shape[1])[begin:end]
    ranks = range(0, left.shape[1], TILE_RANK)
    parts = (_multiply_tiles(rows[..., k : k + TILE_RANK], right[k : k + TILE_RANK]) for k in ranks)
    made = functools.reduce(operator.iadd, parts).reshape(-1, right.shape[1])
    return made[first - begin * TILE_ROWS : last - begin * TILE_ROWS]


def _multiply_tiles(rows: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiply [blocks, TILE_ROWS, r] by [r, columns], r at most TILE_RANK."""
    blocks, (rank, columns) = len(rows), right.shape
    made = np.empty((blocks, TILE_ROWS, columns), right.dtype)
    width = TILE_PRODUCTS // (TILE_ROWS * rank)
    count = columns // width
    whole = count * width
    tiles = right[:, :whole].reshape(rank, count, width).swapaxes(0, 1)
    out = made[:, :, :whole].reshape(blocks, TILE_ROWS, count, width).swapaxes(1, 2)
    np.matmul(rows[:, None], tiles, out=out)
    if whole < columns:
        np.matmul(rows, right[:, whole:], out=made[:, :, whole:])
    return made
