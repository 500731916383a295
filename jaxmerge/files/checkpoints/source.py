r"""Open checkpoints: what a recipe's model string names, as tensors by name that are read when they are needed.

A `Tensor` knows its dtype and shape before a byte is read, and reads all or a run of its elements into a buffer
of the caller's. So a merge knows its plan, sizes and memory in advance and holds a tensor, or a chunk of one, at a
time. Kinds of model: a Hugging Face folder of safetensors, a GGUF file, an Orbax checkpoint, `model+adapter`.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, cast

import jax.numpy as jnp
import numpy as np

BLOCK_BYTES = 1 << 24  # scratch of tensors that are made row by row, of two tied heads compared


class Tensor(Protocol):
    """One tensor of a checkpoint, not read yet."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def size(self) -> int:
        """Bytes of all elements in `dtype`."""
        ...

    @property
    def where(self) -> str:
        """The file or files it comes from, for messages."""
        ...

    @property
    def chunked(self) -> bool:
        """Whether a run of elements is read at its own cost; otherwise reading any reads all."""
        ...

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        """Fill `buffer` (uint8, C order) with the bytes from byte `start` of the tensor on."""
        ...


def read(tensor: Tensor) -> np.ndarray:
    """Read a whole tensor into a fresh array."""
    buffer = np.empty(tensor.size, np.uint8)
    tensor.read_into(buffer)
    return buffer.view(tensor.dtype).reshape(tensor.shape)


def read_run(tensor: Tensor, first: int, last: int) -> np.ndarray:
    """Read elements [first, last), counted in C order, into a fresh array of one axis."""
    size = tensor.dtype.itemsize
    buffer = np.empty((last - first) * size, np.uint8)
    tensor.read_into(buffer, first * size)
    return buffer.view(tensor.dtype)


def fill_by_rows(tensor: Tensor, buffer: np.ndarray, start: int, rows: Callable[[int, int], np.ndarray]) -> None:
    """Do the `read_into` of a tensor that can make its rows [first, last) as an array of its dtype.

    A row is what one index of the first axis selects; at most BLOCK_BYTES of them are made at a time.
    """
    count = tensor.shape[0] if tensor.shape else 1
    width = tensor.size // max(count, 1)
    step = max(1, BLOCK_BYTES // max(width, 1))
    done = 0
    while done < buffer.size:
        first, skip = divmod(start + done, width)
        last = min(first + step, -(-(start + buffer.size) // width))
        made = np.ascontiguousarray(rows(first, last)).reshape(-1).view(np.uint8)[skip:]
        made = made[: buffer.size - done]
        buffer[done : done + made.size] = made
        done += made.size


class MadeByRows:
    """A float32 tensor whose rows are made when they are read; a subclass has `name`, `shape`, `where` and `_rows`."""

    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def size(self) -> int:
        return math.prod(self.shape) * 4

    @property
    def chunked(self) -> bool:
        return True

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        """Fill `buffer` (uint8, C order) with the bytes from byte `start` of the tensor on."""
        fill_by_rows(cast(Tensor, self), buffer, start, self._rows)

    def _rows(self, first: int, last: int) -> np.ndarray:
        """Make rows [first, last)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A run of a tensor's elements, in the order in which they are stored, as a tensor of its own."""

    name: str
    shape: tuple[int, ...]
    whole: Tensor
    first: int
    """Its first byte in the whole."""

    @property
    def dtype(self) -> np.dtype:
        return self.whole.dtype

    @property
    def size(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def where(self) -> str:
        return self.whole.where

    @property
    def chunked(self) -> bool:
        return self.whole.chunked

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        """Fill `buffer` (uint8, C order) with the bytes from byte `start` of the part on."""
        self.whole.read_into(buffer, self.first + start)


def main_dtype(tensors: Iterable[tuple[np.dtype, int]]) -> np.dtype | None:
    """Return the floating dtype that most bytes have, of tensors given as (dtype, bytes); None without one."""
    sizes: dict[np.dtype, int] = {}
    for dtype, size in tensors:
        if jnp.issubdtype(dtype, jnp.floating):
            sizes[dtype] = sizes.get(dtype, 0) + size
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def nothing() -> Mapping[str, bytes]:
    """The companions of a checkpoint of weights alone."""
    return {}


@dataclasses.dataclass(frozen=True)
class Source:
    """An open checkpoint.

    name: as the recipe writes it. folder: where config.json and the tokenizer lie. tensors: by Hugging Face name, a
    tied head left out. config: config.json, {} without one. files: all that its tensors come from; a change of one
    of them between two runs is noticed. companions: reads what belongs to the model beside weights and config.json,
    as file name → content: the tokenizer's files, generation_config.json. natural: of tensors that are stored in
    another form than they are read in (quantised), the dtype that a result has of them unless the recipe names one.
    """

    name: str
    folder: pathlib.Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    files: tuple[pathlib.Path, ...]
    notes: tuple[str, ...] = ()
    companions: Callable[[], Mapping[str, bytes]] = nothing
    natural: Mapping[str, np.dtype] = dataclasses.field(default_factory=dict)
