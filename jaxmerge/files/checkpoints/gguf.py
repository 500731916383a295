r"""GGUF files of the Llama architecture: tensors under Hugging Face names, dequantised when read; config, tokenizer.

llama.cpp stores q and k in interleaved-RoPE order (pairs 2i, 2i+1); Hugging Face pairs i with i + H/2. Both rotate
the same pairs, so undoing the row permutation gives Hugging Face's weights.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxmerge.files.checkpoints.source import MadeByRows, Source, Tensor

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
# GGUF names a pre-tokenizer; each is rebuilt from parts here, or refused.
TOKENIZERS = ("gpt2",)
PRE_TOKENIZERS = ("smollm",)
CONTROL, USER_DEFINED = 3, 4  # token types that are never split
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


# --- the file and its tensors ---


def read_file(path: pathlib.Path) -> tuple[dict[str, Any], list[Any]]:
    """Open a GGUF file: its metadata, and the reader's tensors (name, shape, data, tensor_type), memory-mapped."""
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{path}: GGUF files need the package gguf; pip install 'jaxmerge[train]'") from None
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
    """A tensor of a GGUF file in float32; heads: of q and k, whose rows are stored in another order."""

    name: str
    shape: tuple[int, ...]
    file: pathlib.Path
    stored: Any
    heads: int | None

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
        return np.asarray(weight, np.float32)

    @functools.cached_property
    def _order(self) -> np.ndarray:
        """The stored row of each row: a row keeps its blocks, so rows are put in order before they are made."""
        assert self.heads is not None
        return unpermute(np.arange(self.shape[0]), self.heads)


def open_file(name: str, path: pathlib.Path) -> Source:
    """Open a GGUF file as a checkpoint."""
    metadata, stored = read_file(path)
    config = config_of(metadata, (hf_name(tensor.name) for tensor in stored), source=path)
    tensors: dict[str, Tensor] = {tensor.name: tensor for tensor in tensors_of(config, stored, path)}
    notes: tuple[str, ...] = ()
    try:
        check_tokenizer(metadata, source=path)
    except ValueError as error:
        notes = (f"{name} counts as a model without tokenizer: {error}",)
    companions = functools.partial(companions_of, metadata, config, with_tokenizer=not notes)
    return Source(name, path.parent, tensors, config, (path,), notes, companions)


def tensors_of(config: Mapping[str, Any], stored: Iterable[Any], path: pathlib.Path) -> list[Quantised]:
    """The reader's tensors under Hugging Face names, for the sizes of a config.json."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    found = []
    for tensor in stored:
        name = hf_name(tensor.name)
        # GGUF lists the fastest dimension first.
        shape = tuple(int(n) for n in reversed(tensor.shape))
        kind = name.split(".")[-2] if "." in name else ""
        if kind in heads and (not heads[kind] or shape[0] % (2 * heads[kind])):
            raise ValueError(f"{path}: {tensor.name} has {shape[0]} rows, not a multiple of two a head ({heads[kind]})")
        found.append(Quantised(name, shape, path, tensor, heads.get(kind)))
    return found


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


# --- config.json ---


def config_of(metadata: Mapping[str, Any], names: Iterable[str], *, source: object) -> dict[str, Any]:
    """The config.json of a Llama-architecture GGUF.

    Args:
      metadata: of the file, from `read_file`.
      names: of its tensors in Hugging Face; biases and a tied head show in them alone.
      source: the file, for messages.
    """
    family = metadata.get("general.architecture")
    if family != "llama":
        raise ValueError(f"{source}: general.architecture {family!r} is not known; known: llama")
    given = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    unknown = [f"llama.{key} = {value!r}" for key, value in given.items() if key not in NEEDED + OPTIONAL]
    if unknown:
        raise ValueError(f"{source}: not understood: {'; '.join(unknown)}")
    missing = [f"llama.{key}" for key in NEEDED if key not in given]
    if missing:
        raise ValueError(f"{source}: {', '.join(missing)} missing from the metadata")
    heads, width, names = given["attention.head_count"], given["embedding_length"], set(names)
    head_dim = given.get("attention.key_length", width // max(heads, 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if given.get(key, head_dim) != head_dim:
            raise ValueError(f"{source}: llama.{key} is {given[key]}; implemented: the head size, {head_dim}")
    theta, scaling = _shortest(given.get("rope.freq_base", 10000.0)), _rope_scaling(given, source)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": given.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
        "hidden_size": width,
        "intermediate_size": given["feed_forward_length"],
        "num_hidden_layers": given["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": given.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": given["context_length"],
        "rms_norm_eps": _shortest(given.get("attention.layer_norm_rms_epsilon", 1e-5)),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in names,
        "hidden_act": "silu",
        # Twice: old readers know the second form only.
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
        "rope_theta": theta,
        "rope_scaling": scaling,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _rope_scaling(given: Mapping[str, Any], source) -> dict[str, Any] | None:
    kind = given.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise ValueError(f"{source}: llama.rope.scaling.type {kind!r} is not known; known: none, linear")
    if "rope.scaling.factor" not in given:
        raise ValueError(f"{source}: llama.rope.scaling.factor missing from the metadata")
    return {"rope_type": "linear", "factor": _shortest(given["rope.scaling.factor"])}


def _shortest(stored: float) -> float:
    """The number a float32 was written from: 9.999999747e-06 → 1e-05."""
    return float(str(np.float32(stored)))


# --- the tokenizer ---


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


def check_tokenizer(metadata: Mapping[str, Any], *, source: object) -> None:
    """Raise unless the tokenizer can be rebuilt."""
    for key, known in (("ggml.model", TOKENIZERS), ("ggml.pre", PRE_TOKENIZERS)):
        if metadata.get(f"tokenizer.{key}") not in known:
            raise ValueError(
                f"{source}: tokenizer.{key} {metadata.get(f'tokenizer.{key}')!r} is not known; known: "
                f"{', '.join(known)}. Use the model's Hugging Face folder instead"
            )


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The tokens with a role, as tokenizer_config.json names them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    places = {role: f"tokenizer.ggml.{name}_token_id" for role, name in ROLES.items()}
    return {role: tokens[metadata[place]] for role, place in places.items() if place in metadata}


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE; `check_tokenizer` says whether it is one."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **plain, "special": kind == CONTROL}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [pair.split(" ") for pair in metadata["tokenizer.ggml.merges"]],
        },
    }
