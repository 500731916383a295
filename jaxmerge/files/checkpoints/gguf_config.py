"""Architectures of GGUF files: what each calls its tensors and sizes, and the config.json that it stands for.

The file names an architecture, llama.cpp's code fixes what the file leaves out: which layers have a window, what the
scores are divided by, which layers do not rotate. What is fixed there is written into the config.json here.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

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
FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are no weights: what rotary frequencies are divided by."""

# Metadata of the architecture, all of it read below; any other key with its name is refused.
NEEDED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
)  # fmt: skip
OPTIONAL = (
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.finetuned", "vocab_size",
)  # fmt: skip
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every Llama 3 so far; a file holds the frequencies' factors alone, from which these do not follow."""


# --- what an architecture fixes or reads beside the others: (metadata, tensor names) → attributes ---


def _llama(given: Given, names: set[str]) -> dict[str, Any]:
    del given
    return {
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
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return {**_gemma(given, 2, 46), **{key: shortest(given.get(key, value)) for key, value in caps.items()}}


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


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    family, model: its `model_type`, and the class that transformers loads it as. attributes: those of config.json that
    are its own. inner: what its modules are called where INNER does not say. needed, optional: metadata of its own.
    permuted: rows of q and k are stored in interleaved pairs. offset: norms are stored with 1 added to each weight.
    """

    family: str
    model: str
    attributes: Callable[[Given, set[str]], dict[str, Any]]
    inner: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    permuted: bool = False
    offset: bool = False

    def hf_name(self, name: str) -> str:
        """GGUF tensor name → Hugging Face name; one that is not known stays, and is refused by name later.

        Example:
          >>> ARCHITECTURES["llama"].hf_name("blk.3.attn_q.weight")
          'model.layers.3.self_attn.q_proj.weight'
        """
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            layer, kind, leaf = match.groups()
            module = self.inner.get(kind) or INNER.get(kind)
            return f"model.layers.{layer}.{module}.{leaf}" if module else name
        kind, _, leaf = name.rpartition(".")
        return f"{OUTER[kind]}.{leaf}" if kind in OUTER else name


WINDOW = "attention.sliding_window"
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", _llama, permuted=True),  # also Mistral and SmolLM2
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _qwen2),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _qwen3, HEAD_NORMS),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", _gemma2, GEMMA_NORMS,
        needed=(WINDOW,), optional=("attn_logit_softcapping", "final_logit_softcapping"), offset=True,
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _gemma3, {**GEMMA_NORMS, **HEAD_NORMS},
        needed=(WINDOW,), optional=("rope.freq_base_swa",), offset=True,
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", _smollm3, permuted=True),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _phi3, FUSED, optional=(WINDOW,)),
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
    needed, optional = NEEDED + arch.needed, OPTIONAL + arch.optional
    if unknown := [f"{prefix}{key} = {value!r:.80}" for key, value in given.items() if key not in needed + optional]:
        raise ValueError(f"{source}: not understood: {'; '.join(unknown)}")
    if missing := [f"{prefix}{key}" for key in needed if key not in given]:
        raise ValueError(f"{source}: {', '.join(missing)} missing from the metadata")
    if given["block_count"] > len(names):
        raise ValueError(f"{source}: {prefix}block_count is {given['block_count']}, and it holds {len(names)} tensors")
    heads, width = given["attention.head_count"], given["embedding_length"]
    head_dim = given.get("attention.key_length", width // max(heads, 1))
    fixed = ("attention.value_length",) if arch.family == "phi3" else ("rope.dimension_count", "attention.value_length")
    for key in fixed:
        if given.get(key, head_dim) != head_dim:
            raise ValueError(f"{source}: {prefix}{key} is {given[key]}; implemented: the head size, {head_dim}")
    if heads < 1:
        raise ValueError(f"{source}: num_attention_heads is {heads}; it must be at least 1")
    ends = [metadata[key] for key in map("tokenizer.ggml.{}_token_id".format, ("eos", "eot", "eom")) if key in metadata]
    eos = list(dict.fromkeys(ends))
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
        **arch.attributes(given, names),
        **_rope(given, factors, arch, prefix, source),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


# --- rotary settings ---


def _rope(
    given: Given, factors: Mapping[str, np.ndarray], arch: Architecture, prefix: str, source: pathlib.Path | str
) -> dict[str, Any]:
    default = 1e6 if arch.family == "gemma3_text" else 10000.0
    theta = shortest(given.get("rope.freq_base", default))
    scaling = _scaling(given, factors, theta, prefix, source)
    old = {"rope_theta": theta, "rope_scaling": scaling}
    # Twice: old readers know the second form only. Of several kinds of rotation the second says all.
    new = {"rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})}}
    return old if arch.family in ("gemma3_text", "phi3") else new | old


def _scaling(
    given: Given, factors: Mapping[str, np.ndarray], theta: float, prefix: str, source: pathlib.Path | str
) -> dict[str, Any] | None:
    """The scaling of a file: its kind by name, or by the factors that only one kind has."""
    named = given.get("rope.scaling.type", "none")
    if named not in ("none", "linear", "yarn", "longrope"):
        raise ValueError(
            f"{source}: {prefix}rope.scaling.type {named!r:.80} is not known; known: none, linear, yarn, longrope"
        )
    kind = "llama3" if "rope_freqs.weight" in factors and named == "none" else named
    kind = "longrope" if "rope_factors_long.weight" in factors else kind
    takes = {"llama3": FACTORS[:1], "longrope": FACTORS[1:]}.get(kind, ())
    if set(takes) != set(factors):
        raise ValueError(
            f"{source}: rope scaling {kind!r} takes the tensors {', '.join(takes) or 'none'}; "
            f"found {', '.join(sorted(factors)) or 'none'}"
        )
    if kind in ("linear", "yarn") and "rope.scaling.factor" not in given:
        raise ValueError(f"{source}: {prefix}rope.scaling.factor missing from the metadata")
    original = given.get("rope.scaling.original_context_length", given["context_length"])
    if kind == "longrope" and prefix != "phi3.":
        raise ValueError(f"{source}: rope scaling 'longrope' is known of phi3 alone")
    if kind == "longrope":
        return _longrope(given, factors, original)
    if shortest(given.get("rope.scaling.attn_factor", 1.0)) != 1:
        raise ValueError(f"{source}: not understood: {prefix}rope.scaling.attn_factor of rope scaling {kind!r}")
    if kind == "llama3":
        return _llama3(factors["rope_freqs.weight"], theta, source)
    if kind == "linear":
        return {"rope_type": "linear", "factor": shortest(given["rope.scaling.factor"])}
    if kind == "yarn":
        betas = {name: f"rope.scaling.yarn_{name}" for name in ("beta_fast", "beta_slow")}
        return {
            "rope_type": "yarn",
            "factor": shortest(given["rope.scaling.factor"]),
            "original_max_position_embeddings": original,
            **{name: shortest(given[key]) for name, key in betas.items() if key in given},
        }
    return None


def _longrope(given: Given, factors: Mapping[str, np.ndarray], original: int) -> dict[str, Any]:
    long, short = ([shortest(x) for x in factors[name]] for name in FACTORS[1:])
    found = {"rope_type": "longrope", "type": "longrope", "short_factor": short, "long_factor": long}
    written = np.float32(given.get("rope.scaling.attn_factor", 1.0))
    follows = np.float32(attention_factor(given["context_length"], original))
    return found if written == follows else found | {"attention_factor": shortest(written)}


def attention_factor(longest: int, original: int) -> float:
    """What LongRoPE multiplies cos and sin by, √(1 + ln s / ln m), where a config does not say."""
    return math.sqrt(1 + math.log(longest / original) / math.log(original)) if longest > original > 1 else 1.0


def _llama3(factors: np.ndarray, theta: float, source: pathlib.Path | str) -> dict[str, Any]:
    """Find the settings of Llama 3's scaling from what it divides each frequency by."""
    scaling = {"rope_type": "llama3", "factor": shortest(factors.max()), **LLAMA3}
    if factors.min() <= 0 or not np.allclose(factors, llama3_factors(len(factors), theta, scaling), rtol=1e-5):
        raise ValueError(
            f"{source}: rope_freqs.weight holds no Llama 3 scaling with {LLAMA3}; use the model's Hugging Face folder"
        )
    return scaling


def llama3_factors(count: int, theta: float, scaling: Mapping[str, Any]) -> np.ndarray:
    """What Llama 3's scaling divides each of `count` frequencies by, float32."""
    inverse = 1.0 / theta ** (np.arange(count, dtype=np.float64) / count)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1.0 / (keep + (1 - keep) / scaling["factor"])).astype(np.float32)


def shortest(stored: Any) -> float:
    """The number a float32 was written from: 9.999999747e-06 → 1e-05."""
    return float(str(np.float32(stored)))
