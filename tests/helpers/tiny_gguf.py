"""Tiny models as GGUF files."""

from __future__ import annotations

import gguf
import numpy as np

from helpers.tiny_tokenizers import byte_level, gguf_metadata
from jaxmerge.files.checkpoints.gguf import permute
from jaxmerge.files.checkpoints.gguf_config import INNER, OUTER
from train.models.hf import named


def gguf_name(name: str) -> str:
    back = {value: key for key, value in {**OUTER, **INNER}.items()}
    stem, leaf = name.rsplit(".", 1)
    if stem in back:
        return f"{back[stem]}.{leaf}"
    _, _, layer, kind = stem.split(".", 3)
    return f"blk.{layer}.{back[kind]}.{leaf}"


def write_gguf(path, config, params, *, kind=gguf.GGMLQuantizationType.F32, keys=(), drop=(), arch="llama", **extra):
    """Write a GGUF with the package's writer: `keys` replace metadata, `drop` leaves tensors out."""
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.dimension_count": config.head_dim,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.vocab_size": config.vocab_size,
        **gguf_metadata(byte_level()),
        **dict(keys),
    }
    if config.rope_scaling:
        numbers["llama.rope.scaling.type"] = config.rope_scaling.kind
        numbers["llama.rope.scaling.factor"] = config.rope_scaling.factor
    for key, value in numbers.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, leaf in {**dict(named(params)), **extra}.items():
        array = np.asarray(leaf)
        short = name.split(".")[-2]
        array = permute(array, heads[short]) if short in heads else array
        if name not in drop:
            small = kind if array.ndim == 2 and array.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32
            tensor_name = gguf_name(name) if name not in extra else name
            writer.add_tensor(tensor_name, gguf.quants.quantize(array, small), raw_dtype=small)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
