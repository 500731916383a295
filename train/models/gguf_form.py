"""GGUF as a form of `jaxmerge merge`: a merged folder becomes a folder with one GGUF file, a tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge.files.checkpoints.open import open_folder
from jaxmerge.files.checkpoints.source import Tensor, read
from jaxmerge.files.forms import Form, Tensors
from jaxmerge.files.model_card import gguf_usage

from ..log import mistakes
from ..runtime.disk import new_folder
from .config import ModelConfig
from .gguf_write import KINDS, Type, file_of, prepare, save_gguf
from .hf import config_of_folder, tree_of
from .tokenizer import Tokenizer

SAID = ("README.md", "merge.json", "mergekit_config.yml")
"""What a merged folder says of itself."""


def gguf_form(out: Path, type: Type, pre: str | None) -> Form:
    """The form of a result at `out`; `type` and `pre` are as for `save_gguf`."""
    name = " ".join(["gguf", type, *([pre] if pre else [])])
    file = file_of(out, KINDS[type][0])
    return Form(
        name,
        functools.partial(_write, type=type, pre=pre),
        functools.partial(_layout, type),
        functools.partial(_check, file=file, pre=pre),
        gguf_usage(file.name, out.name),
    )


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """A tensor of a folder as what `save_gguf` takes of an array: it is read when it is cast."""

    shape: tuple[int, ...]
    tensor: Tensor | None = None
    stacked: tuple[_Lazy, ...] = ()
    """In place of a tensor: the matrices of all experts."""

    def astype(self, dtype: Any) -> np.ndarray:
        if self.stacked:
            array = np.empty(self.shape, dtype)
            for i, lazy in enumerate(self.stacked):
                array[i] = lazy.astype(dtype)
            return array
        assert self.tensor is not None
        return read(self.tensor).astype(dtype)


def _stack(lazies: list[_Lazy]) -> _Lazy:
    return _Lazy((len(lazies), *lazies[0].shape), stacked=tuple(lazies))


def _opened(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    config = config_of_folder(folder)
    tokenizer = Tokenizer.from_folder(folder)
    return config, tokenizer.fitted(vocab_size=config.vocab_size, eos_ids=config.eos_token_id, source=folder)


def _check(folder: Path, tensors: Tensors, *, file: Path, pre: str | None) -> list[str]:
    """Raise where the model or its tokenizer cannot be written, before anything is merged."""
    config, tokenizer = _opened(folder)
    prepare(config, tokenizer, file, pre=pre)
    lazy: dict[str, Any] = {name: _Lazy(tuple(shape)) for name, (_, shape) in tensors.items()}
    tree_of(config, lazy, source="the result", stack=_stack)
    return []


def _layout(type: Type, tensors: Tensors, config: Any) -> Tensors:
    """What the tensors take in the file, nearly: codes with their scales as so many bytes."""
    del config
    bits = {"f16": 16, "bf16": 16, "q8_0": 8.5}[type]
    byte = np.dtype(np.uint8)
    return {
        name: (byte, (math.ceil(math.prod(shape) * (bits if len(shape) > 1 else 32) / 8),))
        for name, (_, shape) in tensors.items()
    }


def _write(folder: Path, out: Path, max_shard_bytes: int, *, type: Type, pre: str | None) -> None:
    del max_shard_bytes  # a file of GGUF is one
    config, tokenizer = _opened(folder)
    with mistakes():
        source = open_folder(str(folder), folder)
    lazy: dict[str, Any] = {name: _Lazy(tuple(tensor.shape), tensor) for name, tensor in source.tensors.items()}
    made = folder.parent / "gguf" / out.name  # the file is named after its folder
    shutil.rmtree(made, ignore_errors=True)
    file = save_gguf(made, config, tree_of(config, lazy, source=folder, stack=_stack), tokenizer, type=type, pre=pre)
    with new_folder(out) as partial:
        os.replace(file, partial / file.name)
        for name in SAID:
            shutil.copyfile(folder / name, partial / name)
