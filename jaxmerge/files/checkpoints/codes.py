r"""Tensors that are stored as codes and scales, and are float32 when they are read.

    Scaled        W = (q − z)·s                            FP8 and INT8: a scale for the tensor, a row, or a block
    Packed        W[o, i] = s[g, o]·(q[i, o] − z[g, o])    GPTQ and AWQ: g = g_idx[i], or i // group_size
    Microscaled   W = e·2^(x − 127)                        MXFP4: 32 codes e of four bits share the exponent x

Products are float32 and rounded once.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxmerge.files.checkpoints.source import MadeByRows, Tensor, read, read_run

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ's k-th nibble of a word is this one of its eight columns
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FP4_BLOCK = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Made(MadeByRows):
    """A float32 tensor that is made of others when it is read."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]

    @property
    def where(self) -> str:
        return " and ".join(dict.fromkeys(part.where for part in self.parts))


def _read_rows(tensor: Tensor, first: int, last: int) -> np.ndarray:
    """Read indices [first, last) of the first axis."""
    width = math.prod(tensor.shape[1:])
    return read_run(tensor, first * width, last * width).reshape(last - first, *tensor.shape[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Turned(Made):
    """The transpose of a matrix, made whole when any of it is read."""

    @classmethod
    def of(cls, matrix: Tensor) -> Turned:
        """Turn a matrix of float32."""
        return cls(matrix.name, matrix.shape[::-1], (matrix,))

    @property
    def chunked(self) -> bool:
        return False

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        whole = np.ascontiguousarray(read(self.parts[0]).T)
        buffer[:] = whole.reshape(-1).view(np.uint8)[start : start + buffer.size]


@dataclasses.dataclass(frozen=True, eq=False)
class Scaled(Made):
    """(q − z)·s with a scale, and perhaps a zero point, for each block of `blocks` elements of every axis."""

    blocks: tuple[int, ...]

    def _rows(self, first: int, last: int) -> np.ndarray:
        codes, *others = self.parts
        made = _read_rows(codes, first, last).astype(np.float32)
        spread = [self._spread(part, first, last) for part in others]
        if len(spread) > 1:
            made -= spread[1]
        return made * spread[0]

    def _spread(self, part: Tensor, first: int, last: int) -> np.ndarray:
        """A scale or zero point for each element of these rows; of axes with one block, one that broadcasts."""
        stored = read(part)
        exponents = part.dtype == np.uint8  # E8M0: the bits of a power of two
        found = np.ldexp(np.float32(1), stored.astype(np.int32) - 127) if exponents else stored.astype(np.float32)
        found = found.reshape(grid(self.shape, part.shape) or ())
        for axis, (length, block) in enumerate(zip(self.shape, self.blocks, strict=True)):
            if block < length:
                at = np.arange(first, last) if axis == 0 else np.arange(length)
                found = np.take(found, at // block, axis)
        return found


def grid(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a scale with as many axes as the weight; None where it has none that fits."""
    if math.prod(scale) == 1:
        return (1,) * len(shape)
    if len(scale) < len(shape) and tuple(scale) == tuple(shape[: len(scale)]):
        return (*scale, *(1,) * (len(shape) - len(scale)))
    return tuple(scale) if len(scale) == len(shape) else None


@dataclasses.dataclass(frozen=True, eq=False)
class Packed(Made):
    """A matrix of codes packed in words of 32 bits, with a scale and a zero point for each group of inputs.

    parts: qweight, qzeros, scales, and g_idx where there is one. bits: of a code. awq: packed as AWQ does, else as
    GPTQ. shift: what the stored zero points lack. transposed: the layer stores [in, out].
    """

    bits: int
    awq: bool
    shift: int
    transposed: bool

    @property
    def chunked(self) -> bool:
        return False  # a row of the weight is a column of the words

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        buffer[:] = self._whole().reshape(-1).view(np.uint8)[start : start + buffer.size]

    def _whole(self) -> np.ndarray:
        words, zeros, scales, *index = (read(part) for part in self.parts)
        codes = self._unpack(words, axis=1 if self.awq else 0)
        zeros = (self._unpack(zeros, axis=1) + self.shift) & (2**self.bits - 1)
        scales = scales.astype(np.float32)
        count = len(codes)
        groups = index[0] if index else np.arange(count) // -(-count // len(scales))
        if groups.min() < 0 or groups.max() >= len(scales):
            raise ValueError(f"{self.where}: g_idx of {self.name} names groups beyond its {len(scales)}; copy it again")
        made = scales[groups] * (codes - zeros[groups]).astype(np.float32)
        return np.ascontiguousarray(made if self.transposed else made.T)

    def _unpack(self, words: np.ndarray, axis: int) -> np.ndarray:
        """Cut words into codes, which follow each other along an axis."""
        count = 32 // self.bits
        order = np.argsort(AWQ_ORDER) if self.awq else np.arange(count)
        shifts = (order * self.bits).astype(np.uint32)
        codes = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**self.bits - 1)
        codes = np.moveaxis(codes, -1, axis + 1)
        shape = [size * (count if place == axis else 1) for place, size in enumerate(words.shape)]
        return codes.reshape(shape).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Microscaled(Made):
    """Experts [E, in, out] of codes [E, out, in/32, 16], two a byte, the low half first, and exponents [E, out, in/32].

    The axes are turned because gpt-oss computes x·W with the weights that transformers makes of these.
    """

    def _rows(self, first: int, last: int) -> np.ndarray:
        codes, exponents = (_read_rows(part, first, last) for part in self.parts)
        values = FP4[np.stack([codes & 15, codes >> 4], axis=-1)]
        made = np.ldexp(values, exponents.astype(np.int32)[..., None, None] - 127)
        return np.swapaxes(made.reshape(*codes.shape[:2], -1), 1, 2)
