"""Architectures of GGUF files: what each calls its tensors and sizes, and the config.json that it stands for.

The file names an architecture, llama.cpp's code fixes what the file leaves out: which layers have a window, what the
scores are divided by, which layers do not rotate. What is fixed there is written into the config.json here.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxmerge.files.checkpoints.gguf_rope import WINDOW, Rotation, read_rope, shortest

Given = Mapping[str, Any]
"""Metadata of the architecture without its name in front: `block_count`, `attention.head_count`."""

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
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
FUSED_MLP = {"ffn_up": "mlp.gate_up_proj"}
FUSED = {"attn_qkv": "self_attn.qkv_proj", **FUSED_MLP}
OLMO_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
ROUTED = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
"""Of a mixture of experts; `{}` stands for the expert, whose matrices one tensor [E, out, in] holds."""
SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
GLM4_NORMS = {"post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"}
PATTERN = "attention.sliding_window_pattern"
EXPERTS = ("expert_count", "expert_used_count")
WIDE, SHARED_WIDE = "expert_feed_forward_length", "expert_shared_feed_forward_length"
# What llama.cpp's code says of the weights of the chosen experts; a file may say so too, and nothing else.
WEIGHTING = ("expert_gating_func", "expert_weights_norm", "expert_weights_scale")
SOFTMAX = 1

# Metadata of the architecture, all of it read below; any other key with its name is refused.
NEEDED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
)  # fmt: skip
OPTIONAL = (
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.finetuned", "vocab_size",
)  # fmt: skip


# --- what an architecture fixes or reads beside the others: (metadata, tensor names) → attributes ---


def _llama(given: Given, names: set[str]) -> dict[str, Any]:
    """Llama, or Mixtral where there are experts."""
    mixture = {}
    if given.get("expert_count"):
        kind = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
        mixture = {**kind, **_experts(given, "num_local_experts", normalized=True)}
    return {
        **mixture,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in names,
        "hidden_act": "silu",
    }


def _smollm3(given: Given, names: set[str]) -> dict[str, Any]:
    rotates = [int((i + 1) % 4 != 0) for i in range(given["block_count"])]
    return {**_llama(given, names), "no_rope_layers": rotates, "use_sliding_window": False}


def _qwen2(given: Given, names: set[str]) -> dict[str, Any]:
    del given, names
    return {"hidden_act": "silu", "use_sliding_window": False}


def _qwen3(given: Given, names: set[str]) -> dict[str, Any]:
    return {**_qwen2(given, names), "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names}


def _experts(given: Given, count: str, *, normalized: bool) -> dict[str, Any]:
    """The number of experts under a family's name for it; raise where their weights are said to be others.

    normalized: whether llama.cpp lets the weights of a token's experts sum to 1 in this architecture.
    """
    # llama.cpp takes a scale of 0 for one that is not there.
    for key, same in zip(WEIGHTING, ((SOFTMAX,), (normalized,), (1.0, 0.0)), strict=True):
        if key in given and given[key] not in same:
            raise ValueError(f"{key} is {given[key]!r:.80}; implemented: {same[0]}")
    if missing := [key for key in EXPERTS if key not in given]:
        raise ValueError(f"{', '.join(missing)} missing from the metadata of a mixture of experts")
    return {count: given["expert_count"], "num_experts_per_tok": given["expert_used_count"]}


def _qwen2_moe(given: Given, names: set[str]) -> dict[str, Any]:
    return {
        **_qwen2(given, names),
        **_experts(given, "num_experts", normalized=False),
        "norm_topk_prob": False,
        "moe_intermediate_size": given[WIDE],
        "shared_expert_intermediate_size": given[SHARED_WIDE],
    }


def _qwen3_moe(given: Given, names: set[str]) -> dict[str, Any]:
    return {
        **_qwen3(given, names),
        **_experts(given, "num_experts", normalized=True),
        "norm_topk_prob": True,
        "moe_intermediate_size": given[WIDE],
    }


def _olmoe(given: Given, names: set[str]) -> dict[str, Any]:
    del names
    experts = _experts(given, "num_experts", normalized=False)
    return {"hidden_act": "silu", "attention_bias": False, **experts, "norm_topk_prob": False}


def _gemma(given: Given, every: int, largest: int) -> dict[str, Any]:
    """Gemma's windows in all but every nth layer; its largest model divides scores by D / N and not by H."""
    layers, heads, width = given["block_count"], given["attention.head_count"], given["embedding_length"]
    scalar = width // heads if layers == largest else given.get("attention.key_length", width // heads)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": scalar,
        "sliding_window": given["attention.sliding_window"],
        "layer_types": ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)],
    }


def _gemma2(given: Given, names: set[str]) -> dict[str, Any]:
    del names
    return {**_gemma(given, 2, 46), "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def _gemma3(given: Given, names: set[str]) -> dict[str, Any]:
    del names
    return {**_gemma(given, 6, 62), "rope_local_base_freq": shortest(given.get("rope.freq_base_swa", 10000.0))}


def _phi3(given: Given, names: set[str]) -> dict[str, Any]:
    del names
    head = given.get("attention.key_length", given["embedding_length"] // given["attention.head_count"])
    return {
        "hidden_act": "silu",
        "sliding_window": given.get("attention.sliding_window") or None,
        "partial_rotary_factor": given.get("rope.dimension_count", head) / head,
        "original_max_position_embeddings": given.get("rope.scaling.original_context_length", given["context_length"]),
    }


def _granite(given: Given, names: set[str]) -> dict[str, Any]:
    if not given.get("rope.scaling.finetuned", True):
        raise ValueError("rope.scaling.finetuned is false: a Granite without rotation is not implemented")
    head = given.get("attention.key_length", given["embedding_length"] // given["attention.head_count"])
    return {**_llama(given, names), "attention_multiplier": head**-0.5}


def _glm(given: Given, names: set[str]) -> dict[str, Any]:
    head = given.get("attention.key_length", given["embedding_length"] // given["attention.head_count"])
    return {
        "hidden_act": "silu",
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "partial_rotary_factor": given.get("rope.dimension_count", head) / head,
    }


def _chatglm(given: Given, names: set[str]) -> dict[str, Any]:
    """Heads have no size of their own."""
    head = given["embedding_length"] // given["attention.head_count"]
    return {**_glm({"attention.key_length": head, **given}, names), "head_dim": head}


def _olmo2(given: Given, names: set[str]) -> dict[str, Any]:
    """OLMo 2, and OLMo 3 where there is a window; neither has biases, a tied head or a head size of its own."""
    del names
    fixed = {
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "head_dim": given["embedding_length"] // given["attention.head_count"],
    }
    if not given.get(WINDOW):
        return fixed
    slides = [bool((i + 1) % 4) for i in range(given["block_count"])]
    if (pattern := given.get(PATTERN, slides)) not in (4, slides):
        raise ValueError(f"{PATTERN} is {pattern!r:.80}; implemented: windows in all but every fourth layer")
    kinds = ["sliding_attention" if x else "full_attention" for x in slides]
    more = {"sliding_window": given[WINDOW], "layer_types": kinds}
    return {**fixed, "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", **more}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    family, model: its `model_type`, and the class that transformers loads it as. attributes: those of config.json that
    are its own. inner: what its modules are called where INNER does not say; `{}` stands for an expert. needed,
    optional: metadata of its own. words: metadata of its own that are an attribute of config.json under another name.
    partial: it says how much of a head rotates. rope: what it fixes of the rotation. permuted: rows of q and k are
    stored in interleaved pairs. offset: norms are stored with 1 added to each weight.
    """

    family: str
    model: str
    attributes: Callable[[Given, set[str]], dict[str, Any]]
    inner: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)
    partial: bool = False
    rope: Rotation = dataclasses.field(default_factory=Rotation)
    permuted: bool = False
    offset: bool = False

    def hf_name(self, name: str) -> str:
        """GGUF tensor name → Hugging Face name; one that is not known stays, and is refused by name later.

        Example:
          >>> ARCHITECTURES["llama"].hf_name("blk.3.attn_q.weight")
          'model.layers.3.self_attn.q_proj.weight'

        A tensor of all experts has `{}` in the place of the expert:
          >>> ARCHITECTURES["qwen3moe"].hf_name("blk.0.ffn_up_exps.weight")
          'model.layers.0.mlp.experts.{}.up_proj.weight'
        """
        # Files from before April 2024 have a tensor for each expert.
        if match := re.fullmatch(r"blk\.(\d+)\.(ffn_(?:gate|up|down))\.(\d+)\.weight", name):
            layer, kind, expert = match.groups()
            module = self.inner.get(f"{kind}_exps")
            return f"model.layers.{layer}.{module.format(expert)}.weight" if module else name
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            layer, kind, leaf = match.groups()
            module = self.inner.get(kind) or INNER.get(kind)
            return f"model.layers.{layer}.{module}.{leaf}" if module else name
        kind, _, leaf = name.rpartition(".")
        return f"{OUTER[kind]}.{leaf}" if kind in OUTER else name


CAPS = {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")}
MULTIPLIERS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
PLAIN = ("linear", "yarn")
"""Kinds of rope scaling that need no factors of frequencies."""
ARCHITECTURES: dict[str, Architecture] = {
    # Also Mistral, SmolLM2 and Mixtral.
    "llama": Architecture("llama", "LlamaForCausalLM", _llama, MIXTRAL, optional=(*EXPERTS, *WEIGHTING), permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _qwen2),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _qwen3, HEAD_NORMS),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", _qwen2_moe, {**ROUTED, **SHARED},
        needed=(*EXPERTS, WIDE, SHARED_WIDE), optional=WEIGHTING,
    ),
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe, {**ROUTED, **HEAD_NORMS},
        needed=(*EXPERTS, WIDE), optional=WEIGHTING,
    ),
    "olmoe": Architecture(
        "olmoe", "OlmoeForCausalLM", _olmoe, {**ROUTED, **HEAD_NORMS}, needed=EXPERTS, optional=WEIGHTING,
    ),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", _gemma2, GEMMA_NORMS,
        needed=(WINDOW,), words=CAPS, offset=True,
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _gemma3, {**GEMMA_NORMS, **HEAD_NORMS},
        needed=(WINDOW,), optional=("rope.freq_base_swa",), rope=Rotation(1e6, old=True), offset=True,
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", _smollm3, permuted=True),
    "phi3": Architecture(
        "phi3", "Phi3ForCausalLM", _phi3, FUSED,
        optional=(WINDOW,), partial=True, rope=Rotation(scalings=(*PLAIN, "llama3", "longrope"), old=True),
    ),
    "olmo2": Architecture(  # also OLMo 3
        "olmo2", "Olmo2ForCausalLM", _olmo2, {**OLMO_NORMS, **HEAD_NORMS},
        optional=(WINDOW, PATTERN, "rope.freq_base_swa"), rope=Rotation(scalings=PLAIN, local=True),
    ),
    "granite": Architecture("granite", "GraniteForCausalLM", _granite, words=MULTIPLIERS, permuted=True),
    "chatglm": Architecture(
        "glm", "GlmForCausalLM", _chatglm, FUSED_MLP, partial=True, rope=Rotation(scalings=PLAIN),
    ),
    "glm4": Architecture(
        "glm4", "Glm4ForCausalLM", _glm, {**FUSED_MLP, **GLM4_NORMS}, partial=True, rope=Rotation(scalings=PLAIN),
    ),
}  # fmt: skip


def architecture_of(metadata: Mapping[str, Any], *, source: pathlib.Path | str) -> Architecture:
    """The architecture that a file names."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"{source}: general.architecture {name!r:.80} is not known; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def config_of(
    metadata: Mapping[str, Any], names: set[str], factors: Mapping[str, np.ndarray], *, source: pathlib.Path | str
) -> dict[str, Any]:
    """The config.json that the metadata of a GGUF file stand for.

    Args:
      metadata: of the file.
      names: of its tensors in Hugging Face; biases and a tied head show in them alone.
      factors: those tensors of FACTORS that it has.
      source: the file, for messages.
    """
    arch = architecture_of(metadata, source=source)
    prefix = f"{metadata['general.architecture']}."
    given = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    needed, optional = NEEDED + arch.needed, (*OPTIONAL, *arch.optional, *arch.words)
    if unknown := [f"{prefix}{key} = {value!r:.80}" for key, value in given.items() if key not in needed + optional]:
        raise ValueError(f"{source}: not understood: {'; '.join(unknown)}")
    if missing := [f"{prefix}{key}" for key in needed if key not in given]:
        raise ValueError(f"{source}: {', '.join(missing)} missing from the metadata")
    if given["block_count"] > len(names):
        raise ValueError(f"{source}: {prefix}block_count is {given['block_count']}, and it holds {len(names)} tensors")
    heads, width = given["attention.head_count"], given["embedding_length"]
    head_dim = given.get("attention.key_length", width // max(heads, 1))
    fixed = ("attention.value_length",) if arch.partial else ("rope.dimension_count", "attention.value_length")
    for key in fixed:
        if given.get(key, head_dim) != head_dim:
            raise ValueError(f"{source}: {prefix}{key} is {given[key]}; implemented: the head size, {head_dim}")
    if heads < 1:
        raise ValueError(f"{source}: num_attention_heads is {heads}; it must be at least 1")
    ends = [metadata[key] for key in map("tokenizer.ggml.{}_token_id".format, ("eos", "eot", "eom")) if key in metadata]
    eos = list(dict.fromkeys(ends))
    try:
        own = arch.attributes(given, names)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return {
        "architectures": [arch.model],
        "model_type": arch.family,
        "vocab_size": given.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
        "hidden_size": width,
        "intermediate_size": given["feed_forward_length"],
        "num_hidden_layers": given["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": given.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": given["context_length"],
        "rms_norm_eps": shortest(given.get("attention.layer_norm_rms_epsilon", 1e-5)),
        "tie_word_embeddings": "lm_head.weight" not in names,
        **own,
        # llama.cpp takes 0 for a factor that is not there.
        **{attribute: shortest(given[key]) for key, attribute in arch.words.items() if given.get(key)},
        **read_rope(given, factors, arch.rope, prefix, source),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }
