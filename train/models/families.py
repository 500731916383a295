"""The families of models: what each calls things in config.json, and what it switches on in the decoder.

A new family is an entry of FAMILIES, and a flag of ModelConfig for what it does that no other does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from .config import FULL, SLIDING

Attributes = Mapping[str, Any]

# What an attribute means in every family, where config.json has none.
COMMON: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

# Attribute → the fields of ModelConfig that it sets, where the family has it.
FIELDS: dict[str, tuple[str, ...]] = {
    "hidden_act": ("activation",),
    "hidden_activation": ("activation",),
    "attention_bias": ("qkv_bias", "o_bias"),
    "qkv_bias": ("qkv_bias",),
    "mlp_bias": ("mlp_bias",),
    "query_pre_attn_scalar": ("query_pre_attn_scalar",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention_multiplier": ("attention_multiplier",),
    "embedding_multiplier": ("embedding_multiplier",),
    "residual_multiplier": ("residual_multiplier",),
    "logits_scaling": ("logits_scaling",),
}


# --- which layers have a window, where config.json does not list them --------------------------------------


def every(given: Attributes, window: int | None) -> list[str]:
    return [FULL if window is None else SLIDING] * given["num_hidden_layers"]


def upper(given: Attributes, window: int | None) -> list[str]:
    first = given["max_window_layers"] if window is not None else given["num_hidden_layers"]
    return [SLIDING if i >= first else FULL for i in range(given["num_hidden_layers"])]


def all_but_every_nth(given: Attributes, window: int | None, *, n: int = 2) -> list[str]:
    del window
    n = given.get("sliding_window_pattern") or n
    return [SLIDING if (i + 1) % n else FULL for i in range(given["num_hidden_layers"])]


def every_other(given: Attributes, window: int | None) -> list[str]:
    """The even ones of the first `max_window_layers` (transformers' rule for Qwen2-MoE)."""
    first = given["max_window_layers"] if window is not None else 0
    return [SLIDING if i < first and i % 2 == 0 else FULL for i in range(given["num_hidden_layers"])]


def without_rope(given: Attributes, window: int | None) -> list[str]:
    return [SLIDING if window is not None and not rotates else FULL for rotates in rope_layers(given)]


def rope_layers(given: Attributes) -> list[bool]:
    """Which layers rotate: `no_rope_layers` says 1 of those that do."""
    count = given["num_hidden_layers"]
    if (listed := given.get("no_rope_layers")) is not None:
        return [bool(x) for x in listed]
    interval = given.get("no_rope_layer_interval")
    return [not interval or bool((i + 1) % interval) for i in range(count)]


# --- the families ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    architecture: the class that transformers loads it as.
    absent: its attributes beside the common ones, with what they mean where config.json has none.
    fixed: fields of ModelConfig that no attribute of the family names, or not as FIELDS has it.
    slides: (attributes, window) → the kind of each layer.
    theta, local_theta: of the rotation where config.json does not say, of all layers and of those with a window; None:
      these rotate as the others do.
    harmless: attribute → values at which it changes nothing; "any" whatever its value.
    """

    architecture: str
    absent: dict[str, Any]
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    slides: Callable[[Attributes, int | None], list[str]] = every
    theta: float = 10000.0
    local_theta: float | None = None
    harmless: dict[str, Any] = dataclasses.field(default_factory=dict)


QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
QWEN_SIZES = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "bos_token_id": None, "eos_token_id": None}
GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
GEMMA_FIXED = {"block_norms": GEMMA_NORMS, "unit_offset_norms": True, "scaled_embedding": True}
# transformers reads hidden_activation, and writes the other beside it.
GEMMA_HARMLESS = {"hidden_act": "any", "cache_implementation": "any", "use_bidirectional_attention": (False, None)}
OLMO = {
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 50279,
}
OLMO_FIXED = {
    "block_norms": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "qk_norm_all": True,
}
GLM = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "pad_token_id": 151329,
    "bos_token_id": None,
    "eos_token_id": [151329, 151336, 151338],
}
# The bias is of q, k and v alone.
GLM_FIXED = {"o_bias": False, "rope_interleaved": True, "fused_mlp": True}
GLM4_NORMS = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
LOCAL_THETA = 10000.0
"""θ of Gemma 3's layers with a window, where config.json does not say."""

# Attributes of mixtures of experts (hf_experts.py); `num_local_experts` is another name of `num_experts`.
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.001}
QWEN_EXPERTS = {
    **EXPERTS,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}
# Of training in transformers alone: whether the routers' scores are returned.
EXPERTS_HARMLESS = {"output_router_logits": "any"}

FAMILIES: dict[str, Family] = {
    "llama": Family(  # also SmolLM2
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048, "num_key_value_heads": None, "attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(  # also Qwen2.5
        "Qwen2ForCausalLM",
        {**QWEN_SIZES, **QWEN_WINDOWS},
        fixed={"qkv_bias": True},
        slides=upper,
        harmless={"attention_bias": "any", "use_mrope": (False,)},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**QWEN_SIZES, **QWEN_WINDOWS, "head_dim": 128, "attention_bias": False},
        fixed={"qk_norm": True},
        slides=upper,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            **EXPERTS,
            "num_local_experts": 8,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        theta=1e6,
        harmless={**EXPERTS_HARMLESS, "router_jitter_noise": (0,)},
    ),
    "qwen2_moe": Family(  # also Qwen1.5-MoE
        "Qwen2MoeForCausalLM",
        {
            **QWEN_SIZES,
            **QWEN_WINDOWS,
            **QWEN_EXPERTS,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "qkv_bias": True,
        },
        slides=every_other,
        harmless=EXPERTS_HARMLESS,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            **QWEN_SIZES,
            **QWEN_EXPERTS,
            "num_key_value_heads": 4,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "attention_bias": False,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        fixed={"qk_norm": True},
        harmless={**EXPERTS_HARMLESS, "max_window_layers": "any"},
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {
            **EXPERTS,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.01,
            "max_position_embeddings": 4096,
            "num_key_value_heads": None,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "bos_token_id": None,
            "eos_token_id": 50279,
            "pad_token_id": 1,
        },
        fixed={"qk_norm_all": True},
        harmless={**EXPERTS_HARMLESS, "clip_qkv": (None,)},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **GEMMA,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        fixed=GEMMA_FIXED,
        slides=all_but_every_nth,
        harmless=GEMMA_HARMLESS,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            **GEMMA,
            "max_position_embeddings": 131072,
            "rope_local_base_freq": None,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
        },
        fixed={**GEMMA_FIXED, "qk_norm": True},
        slides=all_but_every_nth,
        theta=1e6,
        local_theta=LOCAL_THETA,
        # transformers has the attribute and caps no scores by it.
        harmless={**GEMMA_HARMLESS, "attn_logit_softcapping": (None,), "_sliding_window_pattern": "any"},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
        },
        slides=without_rope,
        theta=2e6,
        harmless={"max_window_layers": "any", "pretraining_tp": "any"},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {
            "max_position_embeddings": 4096,
            "num_key_value_heads": None,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
        fixed={"fused_projections": True, "fused_mlp": True},
        # The code that auto_map names is what transformers has built in.
        harmless={
            "auto_map": "any",
            "embd_pdrop": (0,),
            "full_attn_mod": (1,),
            "interpolate_factor": (1,),
            "lm_head_bias": (False,),
            "resid_pdrop": (0,),
        },
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096, "layer_types": None},
    ),
    "olmo2": Family("Olmo2ForCausalLM", OLMO, fixed=OLMO_FIXED),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        {**OLMO, "sliding_window": 4096, "layer_types": None},
        fixed=OLMO_FIXED,
        slides=functools.partial(all_but_every_nth, n=4),
        theta=500000.0,
        local_theta=500000.0,
    ),
    "granite": Family(  # Granite 3
        "GraniteForCausalLM",
        {
            "max_position_embeddings": 2048,
            "num_key_value_heads": None,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "glm": Family("GlmForCausalLM", GLM, fixed=GLM_FIXED),
    "glm4": Family(
        "Glm4ForCausalLM",
        GLM,
        fixed={**GLM_FIXED, "block_norms": GLM4_NORMS},
    ),
}

# model_type → what the decoder lacks for it.
LACKING: dict[str, str] = {
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_text", "qwen3_next"),
        "three of four of its layers are linear attention (Gated DeltaNet), which is not implemented",
    ),
    **dict.fromkeys(
        ("gemma4", "gemma4_text", "gemma3n", "gemma3n_text"),
        "its layers differ in head size or share keys and values (and embeddings a layer), which is not implemented",
    ),
    "granitemoehybrid": "Mamba-2 layers and shared experts (shared_mlp) are not implemented",
    "ministral3": "the growth of its queries with the position (llama_4_scaling_beta) is not implemented",
}
