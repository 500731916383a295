"""GGUF files of the Llama architecture to (ModelConfig, Params): dequantised, renamed, un-permuted.

llama.cpp stores q and k in interleaved-RoPE order (pairs 2i, 2i+1); Hugging Face pairs i with i + H/2. Both
rotate the same pairs, so undoing the row permutation gives Hugging Face's weights.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..log import UserError
from .config import ModelConfig, RopeScaling
from .decoder import Params
from .hf import place

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Metadata of the architecture, all of it read below; any other `llama.` key is refused.
NEEDED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
)  # fmt: skip
OPTIONAL = (
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scaling.type",
    "rope.scaling.factor", "vocab_size",
)  # fmt: skip


def read_gguf(path: str | os.PathLike[str]):
    """Open a GGUF file: metadata as a dict, and its tensors, memory-mapped.

    Returns:
      (metadata, tensors): key → value; the reader's tensors, each with name, shape, data, tensor_type.
    """
    import gguf

    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(f"{path}: truncated or not a GGUF file ({error})") from error
    return metadata, reader.tensors


def config_from_gguf(metadata: dict[str, Any], *, biases: tuple[bool, bool], tied: bool, source) -> ModelConfig:
    """Read the sizes of a Llama-architecture GGUF.

    Args:
      metadata: of the file, from `read_gguf`.
      biases: whether attention and MLP tensors have biases, which GGUF shows by the tensors alone.
      tied: whether the file has no output matrix.
    """
    family = metadata.get("general.architecture")
    if family != "llama":
        raise UserError(f"{source}: general.architecture {family!r} is not known; known: llama")
    given = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    unknown = [f"llama.{key} = {value!r}" for key, value in given.items() if key not in NEEDED + OPTIONAL]
    if unknown:
        raise UserError(f"{source}: not understood: {'; '.join(unknown)}")
    missing = [f"llama.{key}" for key in NEEDED if key not in given]
    if missing:
        raise UserError(f"{source}: {', '.join(missing)} missing from the metadata")
    heads, width = given["attention.head_count"], given["embedding_length"]
    head_dim = given.get("attention.key_length", width // max(heads, 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if given.get(key, head_dim) != head_dim:
            raise UserError(f"{source}: llama.{key} is {given[key]}; implemented: the head size, {head_dim}")
    scaling, kind = None, given.get("rope.scaling.type", "none")
    if kind == "linear" and "rope.scaling.factor" not in given:
        raise UserError(f"{source}: llama.rope.scaling.factor missing from the metadata")
    if kind == "linear":
        scaling = RopeScaling("linear", _shortest(given["rope.scaling.factor"]))
    elif kind != "none":
        raise UserError(f"{source}: llama.rope.scaling.type {kind!r} is not known; known: none, linear")
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    try:
        return ModelConfig(
            vocab_size=given.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
            hidden_size=width,
            intermediate_size=given["feed_forward_length"],
            num_hidden_layers=given["block_count"],
            num_attention_heads=heads,
            num_key_value_heads=given.get("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=given["context_length"],
            rms_norm_eps=_shortest(given.get("attention.layer_norm_rms_epsilon", 1e-5)),
            rope_theta=_shortest(given.get("rope.freq_base", 10000.0)),
            rope_scaling=scaling,
            tie_word_embeddings=tied,
            attention_bias=biases[0],
            mlp_bias=biases[1],
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=() if eos is None else (eos,),
            pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        )
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def _shortest(stored: float) -> float:
    """The number a float32 was written from: 9.999999747e-06 → 1e-05."""
    return float(str(np.float32(stored)))


def load_gguf(
    path: str | os.PathLike[str], *, sharding=None, dtype=jnp.float32, check_finite: bool = True
) -> tuple[ModelConfig, Params]:
    """Load a Llama-architecture GGUF file, each tensor dequantised in float32 and sent to its sharding.

    Arguments and result as for `load_hf`; a missing output matrix means a tied head.
    """
    metadata, tensors = read_gguf(path)
    return from_gguf(metadata, tensors, source=path, sharding=sharding, dtype=dtype, check_finite=check_finite)


def config_of_file(metadata, tensors, *, source) -> ModelConfig:
    """The config of an opened file; biases and a tied head show in its tensors."""
    names = {hf_name(t.name) for t in tensors}
    return config_from_gguf(
        metadata,
        biases=("model.layers.0.self_attn.q_proj.bias" in names, "model.layers.0.mlp.up_proj.bias" in names),
        tied="lm_head.weight" not in names,
        source=source,
    )


def from_gguf(metadata, tensors, *, source, **placing) -> tuple[ModelConfig, Params]:
    """The same from an opened file: reading metadata takes two seconds, and the tokenizer needs them too."""
    from gguf.quants import dequantize

    config = config_of_file(metadata, tensors, source=source)
    named = {hf_name(t.name): t for t in tensors}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def read(name: str) -> np.ndarray:
        tensor = named[name]
        try:
            weight = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(f"{source}: {tensor.name}: {error}") from error
        kind = name.split(".")[-2]
        # A copy where nothing was dequantised: the array must not stay a view of the file.
        return unpermute(weight, heads[kind]) if kind in heads else np.array(weight, np.float32)

    # GGUF lists the fastest dimension first.
    found = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in named.items()}
    return config, place(config, found, read, source=source, **placing)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, [heads · H, …], from interleaved pairs (2i, 2i+1) to halves (i, i + H/2).

    Example:
      >>> unpermute(np.array([0, 1, 2, 3]), heads=1)
      array([0, 2, 1, 3])
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def hf_name(name: str) -> str:
    """GGUF tensor name → Hugging Face name; one that is not known stays, and is refused by name later.

    Example:
      >>> hf_name("blk.3.attn_q.weight")
      'model.layers.3.self_attn.q_proj.weight'
    """
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, kind, leaf = match.groups()
        return f"model.layers.{layer}.{INNER[kind]}.{leaf}" if kind in INNER else name
    kind, _, leaf = name.rpartition(".")
    return f"{OUTER[kind]}.{leaf}" if kind in OUTER else name
