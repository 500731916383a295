"""Tiny Llama configs, one a feature, with weights that NumPy draws alike on every version.

Each is a Hugging Face config.json, in the old style or the new. `make.py` has transformers compute the logits.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

BASE = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, dict[str, Any]] = {
    "grouped": BASE,
    "multi_head": {**BASE, "num_key_value_heads": 4},
    "multi_query": {**BASE, "num_key_value_heads": 1},
    "tied": {**BASE, "tie_word_embeddings": True},
    "attention_bias": {**BASE, "attention_bias": True},
    "mlp_bias": {**BASE, "mlp_bias": True},
    "theta": {**BASE, "rope_theta": 500000.0},
    "eps": {**BASE, "rms_norm_eps": 0.1},
    "linear": {**BASE, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {**BASE, "rope_parameters": {**LLAMA3, "rope_theta": 100.0}},
    "odd_sizes": {
        **BASE, "vocab_size": 53, "hidden_size": 33, "intermediate_size": 37, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 14, "num_hidden_layers": 3,
    },
}  # fmt: skip


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of that name: large enough for attention and gates to bite, norms about 1, biases not 0."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("norm.weight"):
        return (1 + 0.2 * noise).astype(np.float32)
    scale = 0.5 if name.endswith("bias") else 1.5 * shape[-1] ** -0.5
    return (scale * noise).astype(np.float32)


def tokens(vocab_size: int) -> np.ndarray:
    """[2, 24] token ids."""
    return np.random.default_rng(7).integers(0, vocab_size, (2, 24)).astype(np.int32)
