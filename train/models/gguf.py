"""GGUF files to (ModelConfig, Params); `jaxmerge.files.checkpoints.gguf` reads the format."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax.numpy as jnp

from jaxmerge.files.checkpoints import gguf
from jaxmerge.files.checkpoints.source import read

from ..log import mistakes
from .config import ModelConfig
from .decoder import Params
from .hf import place
from .hf_config import config_from_hf


def read_gguf(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Any]]:
    """Open a GGUF file: metadata as a dict, and its tensors, memory-mapped.

    Returns:
      (metadata, tensors): key → value; the reader's tensors, each with name, shape, data, tensor_type.
    """
    with mistakes():
        return gguf.read_file(pathlib.Path(path))


def load_gguf(
    path: str | os.PathLike[str], *, sharding=None, dtype=jnp.float32, check_finite: bool = True
) -> tuple[ModelConfig, Params]:
    """Load a GGUF file, each tensor dequantised in float32 and sent to its sharding.

    Arguments and result as for `load_hf`; a missing output matrix means a tied head.
    """
    metadata, tensors = read_gguf(path)
    return from_gguf(metadata, tensors, source=path, sharding=sharding, dtype=dtype, check_finite=check_finite)


def config_of_file(metadata, tensors, *, source) -> ModelConfig:
    """The config of an opened file; biases and a tied head show in its tensors."""
    with mistakes():
        attributes = gguf.config_of(metadata, tensors, source=source)
    return config_from_hf(attributes, source=source)


def from_gguf(metadata, tensors, *, source, **placing) -> tuple[ModelConfig, Params]:
    """The same from an opened file: reading metadata takes two seconds, and the tokenizer needs them too."""
    config = config_of_file(metadata, tensors, source=source)
    sizes = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    with mistakes():
        named = {tensor.name: tensor for tensor in gguf.tensors_of(metadata, sizes, tensors, pathlib.Path(source))}
        found = {name: tensor.shape for name, tensor in named.items()}
        return config, place(config, found, lambda name: read(named[name]), source=source, **placing)
