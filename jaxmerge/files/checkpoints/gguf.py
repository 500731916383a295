r"""GGUF files: tensors under Hugging Face names, dequantised when read, and the folder that they stand for.

llama.cpp stores q and k of Llama in interleaved-RoPE order (pairs 2i, 2i+1); Hugging Face pairs i with i + H/2. Both
rotate the same pairs, so undoing the row permutation gives Hugging Face's weights. Gemma's norms, which scale by 1 + w,
are stored as 1 + w.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxmerge import install
from jaxmerge.files.checkpoints import gguf_config
from jaxmerge.files.checkpoints.gguf_config import architecture_of
from jaxmerge.files.checkpoints.gguf_rope import FACTORS
from jaxmerge.files.checkpoints.gguf_tokenizer import check_tokenizer, special_tokens, tokenizer_json
from jaxmerge.files.checkpoints.source import MadeByRows, Part, Source, Tensor

# --- the file and its tensors ---


def read_file(path: pathlib.Path) -> tuple[dict[str, Any], list[Any]]:
    """Open a GGUF file: its metadata, and the reader's tensors (name, shape, data, tensor_type), memory-mapped."""
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{path}: GGUF files need the package gguf; {install.extra('train')}") from None
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{path}: truncated or not a GGUF file ({error})") from error
    return metadata, list(reader.tensors)


@dataclasses.dataclass(frozen=True)
class Quantised(MadeByRows):
    """A tensor of a GGUF file in float32.

    heads: of q and k whose rows are stored in another order. offset: what is added to the weights as they are stored.
    """

    name: str
    shape: tuple[int, ...]
    file: pathlib.Path
    stored: Any
    heads: int | None
    offset: float = 0.0

    @property
    def where(self) -> str:
        return str(self.file)

    def _rows(self, first: int, last: int) -> np.ndarray:
        from gguf.quants import dequantize

        data = self.stored.data
        picked = data[first:last] if self.heads is None else data[self._order[first:last]]
        try:
            weight = dequantize(picked, self.stored.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{self.file}: {self.stored.name}: {error}") from error
        weight = np.asarray(weight, np.float32)
        return weight - np.float32(self.offset) if self.offset else weight

    @functools.cached_property
    def _order(self) -> np.ndarray:
        """The stored row of each row: a row keeps its blocks, so rows are put in order before they are made."""
        assert self.heads is not None
        return unpermute(np.arange(self.shape[0]), self.heads)


def open_file(name: str, path: pathlib.Path) -> Source:
    """Open a GGUF file as a checkpoint."""
    metadata, stored = read_file(path)
    config = config_of(metadata, stored, source=path)
    tensors: dict[str, Tensor] = {tensor.name: tensor for tensor in tensors_of(metadata, config, stored, path)}
    notes: tuple[str, ...] = ()
    try:
        check_tokenizer(metadata, source=path)
    except ValueError as error:
        notes = (f"{name} counts as a model without tokenizer: {error}",)
    companions = functools.partial(companions_of, metadata, config, with_tokenizer=not notes)
    return Source(name, path.parent, tensors, config, (path,), notes, companions)


def config_of(metadata: Mapping[str, Any], stored: Iterable[Any], *, source: pathlib.Path | str) -> dict[str, Any]:
    """The config.json that an opened file stands for."""
    arch, stored = architecture_of(metadata, source=source), list(stored)
    factors = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in stored if tensor.name in FACTORS}
    names = {arch.hf_name(tensor.name) for tensor in stored}
    try:
        return gguf_config.config_of(metadata, names, factors, source=source)
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{source}: the metadata are of other types than an architecture's ({error})") from error


def tensors_of(
    metadata: Mapping[str, Any], config: Mapping[str, Any], stored: Iterable[Any], path: pathlib.Path
) -> list[Tensor]:
    """The reader's tensors under Hugging Face names, for the sizes of a config.json; of experts one by one."""
    arch = architecture_of(metadata, source=path)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]} if arch.permuted else {}
    found: list[Tensor] = []
    for tensor in stored:
        if tensor.name in FACTORS:
            continue
        name = arch.hf_name(tensor.name)
        # GGUF lists the fastest dimension first.
        shape = tuple(int(n) for n in reversed(tensor.shape))
        kind = name.split(".")[-2] if "." in name else ""
        if kind in heads and (not heads[kind] or shape[0] % (2 * heads[kind])):
            raise ValueError(f"{path}: {tensor.name} has {shape[0]} rows, not a multiple of two a head ({heads[kind]})")
        offset = 1.0 if arch.offset and kind.endswith("norm") else 0.0
        found += _apart(Quantised(name, shape, path, tensor, heads.get(kind), offset))
    return found


def _apart(tensor: Quantised) -> list[Tensor]:
    """The tensors of a Hugging Face folder that one stands for: the matrices of a stack, or the tensor itself."""
    name, shape = tensor.name, tensor.shape
    if "{}" in name:
        size = math.prod(shape[1:]) * tensor.dtype.itemsize
        return [Part(name.format(expert), shape[1:], tensor, expert * size) for expert in range(shape[0])]
    if name.endswith("shared_expert_gate.weight"):  # a vector there, and a matrix of one row here
        return [Part(name, (1, *shape[-1:]), tensor, 0)]
    return [tensor]


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, [heads · H, …], from interleaved pairs (2i, 2i+1) to halves (i, i + H/2).

    Example:
      >>> unpermute(np.array([0, 1, 2, 3]), heads=1)
      array([0, 2, 1, 3])
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo `unpermute`.

    Example:
      >>> permute(np.array([0, 2, 1, 3]), heads=1)
      array([0, 1, 2, 3])
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


# --- the files beside the weights ---


def companions_of(metadata: Mapping[str, Any], config: Mapping[str, Any], *, with_tokenizer: bool) -> dict[str, bytes]:
    """The files that stand beside config.json in a Hugging Face folder: the tokenizer's, generation_config.json."""
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files: dict[str, Any] = {"generation_config.json": ends}
    if with_tokenizer:
        roles = special_tokens(metadata)
        # The one class name that transformers 4 and 5 both read as: do what tokenizer.json says.
        plain = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        files["tokenizer.json"] = tokenizer_json(metadata)
        files |= {"tokenizer_config.json": {**plain, **roles}, "special_tokens_map.json": roles}
    found = {name: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode() for name, value in files.items()}
    if with_tokenizer and "tokenizer.chat_template" in metadata:
        found["chat_template.jinja"] = metadata["tokenizer.chat_template"].encode()
    return found
