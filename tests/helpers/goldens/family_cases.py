"""A tiny config.json a family, every feature biting: windows and contexts shorter than the tokens, low caps.

`make.py` has transformers compute the logits of each; OFF says how a feature is switched off, here and there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ONE_LAYER = {**SIZES, "num_hidden_layers": 1}
LLAMA = {"model_type": "llama", **SIZES}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
HALF_PHI = {"model_type": "phi3", **SIZES, "hidden_size": 48, "partial_rotary_factor": 0.5}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.3, 2.0], "long_factor": [1.5, 3.0, 9.0]}
GEMMA = {"head_dim": 10, "query_pre_attn_scalar": 20, "sliding_window": 8}
GRANITE = {
    "attention_multiplier": 0.7, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0,
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"

FAMILY_CASES: dict[str, dict[str, Any]] = {
    "llama_dynamic": {
        **LLAMA, "max_position_embeddings": 24, "rope_scaling": {"type": "dynamic", "factor": 3.0}, "rope_theta": 100.0,
    },
    "llama_yarn": {
        **LLAMA, "rope_theta": 100.0, "rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
    },
    "llama_yarn_mscale": {
        **LLAMA, "rope_parameters": {**YARN, "rope_theta": 1000.0, "mscale": 2.0, "mscale_all_dim": 0.5},
    },
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": 8, "head_dim": 12, "rope_theta": 100.0},
    "mixtral": {
        "model_type": "mixtral", **ONE_LAYER, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
        "rope_theta": 100.0,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe", **SIZES, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16, "mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 8,
        "rope_theta": 100.0,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", **ONE_LAYER, "num_experts": 5, "num_experts_per_tok": 2, "head_dim": 10,
        "moe_intermediate_size": 24, "norm_topk_prob": True, "attention_bias": True, "rope_theta": 100.0,
    },
    "olmoe": {
        "model_type": "olmoe", **ONE_LAYER, "num_experts": 4, "num_experts_per_tok": 2, "rope_theta": 100.0,
    },
    "qwen2": {
        "model_type": "qwen2", **SIZES, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
        "tie_word_embeddings": True, "rope_theta": 1000.0,
    },
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 10, "rope_theta": 100.0, "rope_scaling": YARN},
    "qwen3_windows": {
        "model_type": "qwen3", **SIZES, "num_hidden_layers": 3, "head_dim": 8, "attention_bias": True,
        "use_sliding_window": True, "sliding_window": 6, "layer_types": [SLIDING, FULL, SLIDING],
    },
    "gemma2": {
        "model_type": "gemma2", **SIZES, **GEMMA, "num_hidden_layers": 3, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text", **SIZES, **GEMMA, "num_hidden_layers": 4, "sliding_window_pattern": 3,
        "rope_theta": 1000.0, "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "final_logit_softcapping": 4.0,
    },
    "smollm3": {
        "model_type": "smollm3", **SIZES, "num_hidden_layers": 4, "no_rope_layer_interval": 2, "rope_theta": 500.0,
        "attention_bias": True,
    },
    "smollm3_windows": {
        "model_type": "smollm3", **SIZES, "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1],
        "tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 8, "rope_scaling": YARN,
    },
    "phi3": {
        "model_type": "phi3", **SIZES, "sliding_window": 8, "rope_theta": 100.0, "partial_rotary_factor": 0.5,
    },
    "phi3_long": {**HALF_PHI, "original_max_position_embeddings": 16, "rope_scaling": LONGROPE},
    "phi3_short": {**HALF_PHI, "original_max_position_embeddings": 48, "rope_scaling": LONGROPE},
    "ministral": {
        "model_type": "ministral", **SIZES, "num_hidden_layers": 3, "head_dim": 12, "sliding_window": 8,
        "layer_types": [SLIDING, FULL, SLIDING], "rope_theta": 100.0,
    },
    "olmo2": {"model_type": "olmo2", **SIZES, "rope_theta": 100.0, "attention_bias": True},
    "olmo3": {
        "model_type": "olmo3", **SIZES, "num_hidden_layers": 4, "sliding_window": 8, "rope_theta": 500000.0,
        "rope_scaling": YARN,
    },
    "granite": {
        "model_type": "granite", **SIZES, "tie_word_embeddings": True, "mlp_bias": True, **GRANITE,
    },
    "glm": {"model_type": "glm", **SIZES, "head_dim": 12, "rope_theta": 100.0},
    "glm4": {"model_type": "glm4", **SIZES, "head_dim": 12, "rope_theta": 100.0, "rope_scaling": YARN},
}  # fmt: skip

# Case → feature → what says in config.json that it is off.
OFF: dict[str, dict[str, dict[str, Any]]] = {
    "llama_dynamic": {
        "dynamic": {"rope_scaling": None},
        "factor": {"rope_scaling": {"type": "dynamic", "factor": 1.5}},
    },
    "llama_yarn": {
        "yarn": {"rope_scaling": None},
        "truncate": {"rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5}},
        "beta": {"rope_scaling": {**YARN, "truncate": False}},
        "attention factor": {
            "rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.0}
        },
    },
    "llama_yarn_mscale": {"mscale": {"rope_parameters": {**YARN, "rope_theta": 1000.0}}},
    "mistral": {"window": {"sliding_window": None}, "narrower": {"sliding_window": 7}},
    "mixtral": {"window": {"sliding_window": None}, "fewer experts": {"num_experts_per_tok": 1}},
    "qwen2_moe": {
        "window": {"use_sliding_window": False},
        "weights of sum 1": {"norm_topk_prob": True},
        "fewer experts": {"num_experts_per_tok": 2},
    },
    "qwen3_moe": {"weights of any sum": {"norm_topk_prob": False}, "fewer experts": {"num_experts_per_tok": 1}},
    "olmoe": {"weights of sum 1": {"norm_topk_prob": True}, "more experts": {"num_experts_per_tok": 3}},
    "qwen2": {
        "window": {"use_sliding_window": False},
        "pattern": {"layer_types": [SLIDING, FULL]},
        "first layer": {"max_window_layers": 0},
    },
    "qwen3": {"yarn": {"rope_scaling": None}},
    "qwen3_windows": {"window": {"use_sliding_window": False, "layer_types": None}, "pattern": {"layer_types": None}},
    "gemma2": {
        "attention cap": {"attn_logit_softcapping": None},
        "final cap": {"final_logit_softcapping": None},
        "window": {"sliding_window": 64},
        "pattern": {"layer_types": [FULL, SLIDING, FULL]},
        "scalar": {"query_pre_attn_scalar": 10},
        "gelu": {"hidden_activation": "silu"},
    },
    "gemma3": {
        "final cap": {"final_logit_softcapping": None},
        "window": {"sliding_window": 64},
        "pattern": {"sliding_window_pattern": 2},
        "local theta": {"rope_local_base_freq": 1000.0},
        "scaling": {"rope_scaling": None},
        "scalar": {"query_pre_attn_scalar": 10},
        "gelu": {"hidden_activation": "silu"},
    },
    "smollm3": {"NoPE": {"no_rope_layers": [1, 1, 1, 1]}, "which NoPE": {"no_rope_layers": [0, 1, 0, 1]}},
    "smollm3_windows": {"window": {"use_sliding_window": False}, "yarn": {"rope_scaling": None}},
    "phi3": {"window": {"sliding_window": None}, "partial": {"partial_rotary_factor": 1.0}},
    "phi3_long": {
        "longrope": {"rope_scaling": None},
        "which": {"original_max_position_embeddings": 63},
        "attention factor": {"rope_scaling": {**LONGROPE, "attention_factor": 1.0}},
    },
    "phi3_short": {"longrope": {"rope_scaling": None}, "which": {"original_max_position_embeddings": 8}},
    "ministral": {"window": {"sliding_window": 64}, "pattern": {"layer_types": [FULL, SLIDING, FULL]}},
    "olmo2": {"theta": {"rope_theta": 10.0}},
    "olmo3": {
        "window": {"sliding_window": 64},
        "pattern": {"layer_types": [FULL, SLIDING, SLIDING, SLIDING]},
        "yarn": {"rope_scaling": None},
        "local theta": {
            "rope_theta": None,
            "rope_scaling": None,
            "rope_parameters": {
                FULL: {**YARN, "rope_theta": 500000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    },
    "granite": {name: {name: 1.0} for name in GRANITE},
    "glm": {"partial": {"partial_rotary_factor": 1.0}},
    "glm4": {"partial": {"partial_rotary_factor": 1.0}, "yarn": {"rope_scaling": None}},
}


def family_tokens(vocab_size: int, length: int = 40) -> np.ndarray:
    """[2, length] token ids."""
    return np.random.default_rng(11).integers(0, vocab_size, (2, length)).astype(np.int32)


KEPT = slice(3, None, 4)
"""Positions whose logits are stored."""
