r"""Open checkpoints: what a recipe's model string names, as tensors by name that are read when they are needed.

A `Tensor` knows its dtype and shape before a byte is read, and reads all or a run of its elements into a buffer
of the caller's. So a merge knows its plan, sizes and memory in advance and holds a tensor, or a chunk of one, at a
time. Kinds of model: a Hugging Face folder of safetensors, a GGUF file, an Orbax checkpoint, `model+adapter`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
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


def nothing() -> Mapping[str, bytes]:
    """The companions of a checkpoint of weights alone."""
    return {}


@dataclasses.dataclass(frozen=True)
class Source:
    """An open checkpoint.

    name: as the recipe writes it. folder: where config.json and the tokenizer lie. tensors: by Hugging Face name, a
    tied head left out. config: config.json, {} without one. files: all that its tensors come from; a change of one
    of them between two runs is noticed. companions: reads what belongs to the model beside weights and config.json,
    as file name → content: the tokenizer's files, generation_config.json.
    """

    name: str
    folder: pathlib.Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    files: tuple[pathlib.Path, ...]
    notes: tuple[str, ...] = ()
    companions: Callable[[], Mapping[str, bytes]] = nothing


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON file, or {} if there is none."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def is_tied(source: Source) -> bool:
    """Whether a model's head is its embedding: it has none, and its config, if it has one, does not deny it."""
    text = source.config.get("text_config") or {}
    said = source.config.get("tie_word_embeddings", text.get("tie_word_embeddings", bool(source.config)))
    return bool(said) and HEAD not in source.tensors and EMBEDDING in source.tensors


def drop_tied_head(name: str, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Take a head that the config ties to the embedding out of `tensors`: it is the same and written only once.

    Returns:
      A note where it had been stored twice.

    Raises:
      ValueError: head and embedding differ, so one of them would be lost.
    """
    tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False))
    if not tied or HEAD not in tensors or EMBEDDING not in tensors:
        return ()
    if not _equal(tensors[HEAD], tensors[EMBEDDING]):
        raise ValueError(
            f"{name}: config.json says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}; set it to false to "
            "merge both, or remove the head"
        )
    del tensors[HEAD]
    return (f"{name}: {HEAD} is tied to the embedding and stored twice; written once",)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, a chunk at a time."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = BLOCK_BYTES if a.chunked and b.chunked else max(a.size, 1)
    left, right = np.empty((2, min(step, a.size)), np.uint8)
    for start in range(0, a.size, step):
        count = min(step, a.size - start)
        a.read_into(left[:count], start)
        b.read_into(right[:count], start)
        if not np.array_equal(left[:count], right[:count]):
            return False
    return True
