r"""Open checkpoints: what a recipe's model string names, as tensors by name that are read when they are needed.

A `Tensor` knows its dtype and shape before a byte is read, and reads all or a run of its elements into a buffer
of the caller's. So a merge knows its plan, sizes and memory in advance and holds a tensor, or a chunk of one, at a
time. Kinds of model: a Hugging Face folder of safetensors, a GGUF file, an Orbax checkpoint, `model+adapter`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, Protocol

import numpy as np


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


@dataclasses.dataclass(frozen=True)
class Source:
    """An open checkpoint.

    name: as the recipe writes it. folder: where config.json and the tokenizer lie. tensors: by Hugging Face name, a
    tied head left out. config: config.json, {} without one. files: all that its tensors come from; a change of one
    of them between two runs is noticed.
    """

    name: str
    folder: pathlib.Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    files: tuple[pathlib.Path, ...]
    notes: tuple[str, ...] = ()


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON file, or {} if there is none."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
