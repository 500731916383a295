"""config.json of Hugging Face to ModelConfig and back.

Every attribute is either understood, known to leave the logits alone (IRRELEVANT, HARMLESS), or refused by
name and value: a model that loads computes what its authors computed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..log import UserError
from .config import ModelConfig, RopeScaling

# What an absent attribute means. Mistral is the same computation as Llama once its window is off.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}
SHARED_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
# Attributes that say nothing about the logits, whatever their value.
IRRELEVANT = {
    "_attn_implementation", "_from_model_config", "_name_or_path", "attn_implementation",
    "chunk_size_feed_forward", "dtype", "id2label", "is_llama_config", "label2id", "model_type",
    "name_or_path", "output_attentions", "output_hidden_states", "problem_type", "return_dict", "torch_dtype",
    "transformers.js_config", "transformers_version", "use_cache",
}  # fmt: skip
# Attributes that would change the computation, with the values at which they do not.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "architectures": (["LlamaForCausalLM"], ["MistralForCausalLM"], None),
    "attention_dropout": (0, None),
    "hidden_act": ("silu",),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False,),
    "torchscript": (False,),
    "use_bfloat16": (False,),
}
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def config_from_hf(attributes: Mapping[str, Any], *, source: str | os.PathLike[str]) -> ModelConfig:
    """Read the attributes of a config.json.

    Old style (`rope_theta` with `rope_scaling`) and new style (`rope_parameters`) alike.

    Args:
      attributes: the JSON object; `model_type` llama, or mistral without a sliding window (the same model).
      source: the file's name, for error messages.

    Raises:
      UserError: an unknown family or attribute, or a known one with a value that is not implemented.
    """
    family = attributes.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{source}: model_type {family!r} is not known; known: {', '.join(FAMILIES)}")
    given = {**SHARED_DEFAULTS, **FAMILIES[family], **attributes}
    _refuse_unknown(given, source)

    missing = [name for name in SIZES[:5] if given.get(name) is None]
    if missing:
        raise UserError(f"{source}: {', '.join(missing)} missing; a {family} config must give these sizes")
    if given.get("num_key_value_heads") is None:
        given["num_key_value_heads"] = given["num_attention_heads"]
    if given.get("head_dim") is None:
        given["head_dim"] = given["hidden_size"] // given["num_attention_heads"]
    _check_types(given, source)
    theta, scaling = _read_rope(given, source)
    try:
        return ModelConfig(
            **{name: given[name] for name in SIZES},
            rms_norm_eps=float(given["rms_norm_eps"]),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(given["tie_word_embeddings"]),
            attention_bias=bool(given["attention_bias"]),
            mlp_bias=bool(given["mlp_bias"]),
            initializer_range=float(given["initializer_range"]),
            bos_token_id=_token_id(given["bos_token_id"]),
            eos_token_id=token_ids(given["eos_token_id"]),
            pad_token_id=_token_id(given["pad_token_id"]),
        )
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def _refuse_unknown(given: Mapping[str, Any], source) -> None:
    understood = {*SHARED_DEFAULTS, *SIZES, "rope_theta", "rope_scaling", "rope_parameters"}
    bad = []
    for name, value in given.items():
        # transformers writes one type a layer for models that mix windows.
        full = name == "layer_types" and (value is None or set(value) == {"full_attention"})
        if name in understood or name in IRRELEVANT or full or value in HARMLESS.get(name, ()):
            continue
        wanted = f" (implemented: {HARMLESS[name][0]!r})" if name in HARMLESS else ""
        bad.append(f"{name} = {value!r}{wanted}")
    if bad:
        raise UserError(
            f"{source}: not understood: {'; '.join(bad)}. Loading could compute something else than its "
            "authors did; remove from config.json what is known not to matter"
        )


def _check_types(given: Mapping[str, Any], source) -> None:
    def is_number(x, *kinds):
        return isinstance(x, kinds) and not isinstance(x, bool)

    def is_ids(x):
        return x is None or is_number(x, int) or (isinstance(x, list) and all(is_number(i, int) for i in x))

    expected = {
        "a whole number": (SIZES, lambda x: is_number(x, int)),
        "a number": (("rms_norm_eps", "initializer_range"), lambda x: is_number(x, int, float)),
        "true or false": (("tie_word_embeddings", "attention_bias", "mlp_bias"), lambda x: isinstance(x, bool)),
        "a whole number or null": (("bos_token_id", "pad_token_id"), lambda x: x is None or is_number(x, int)),
        "whole numbers or null": (("eos_token_id",), is_ids),
        "an object or null": (("rope_scaling", "rope_parameters"), lambda x: x is None or isinstance(x, dict)),
        "a number or null": (("rope_theta",), lambda x: x is None or is_number(x, int, float)),
    }
    for wanted, (names, fits) in expected.items():
        for name in names:
            if not fits(given.get(name)):
                raise UserError(f"{source}: {name} is {given.get(name)!r}; expected {wanted}")


def _read_rope(given: Mapping[str, Any], source) -> tuple[float, RopeScaling | None]:
    """θ and scaling, from either style; a config that gives both must say the same twice."""
    old = {**(given.get("rope_scaling") or {})}
    if given.get("rope_theta") is not None:
        old["rope_theta"] = given["rope_theta"]
    new = {**(given.get("rope_parameters") or {})}
    old, new = (_normal_rope(style, source) for style in (old, new))
    if given.get("rope_parameters") and (given.get("rope_scaling") or "rope_theta" in given) and old != new:
        raise UserError(
            f"{source}: rope_parameters {new} and rope_theta with rope_scaling {old} differ; keep one of them"
        )
    rope = new if given.get("rope_parameters") else old
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    try:
        return theta, None if kind == "default" else RopeScaling(kind, **rope)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def _normal_rope(rope: dict[str, Any], source) -> dict[str, Any]:
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if rope.get("partial_rotary_factor") in (1, None):
        rope.pop("partial_rotary_factor", None)
    theta = rope.pop("rope_theta", 10000.0)
    if not isinstance(theta, int | float) or theta <= 0:
        raise UserError(f"{source}: rope_theta is {theta!r}; expected a positive number")
    if kind not in ROPE_KEYS:
        raise UserError(f"{source}: rope scaling {kind!r} is not known; known: {', '.join(ROPE_KEYS)}")
    if rope.keys() != ROPE_KEYS[kind]:
        raise UserError(
            f"{source}: rope scaling {kind!r} takes {sorted(ROPE_KEYS[kind]) or 'nothing else'}, found {sorted(rope)}"
        )
    bad = {name: value for name, value in rope.items() if not isinstance(value, int | float)}
    if bad:
        raise UserError(f"{source}: rope scaling {kind!r} takes numbers, found {bad}")
    whole = "original_max_position_embeddings"
    numbers = {name: int(value) if name == whole else float(value) for name, value in rope.items()}
    return {"rope_theta": float(theta), "rope_type": kind, **numbers}


def _token_id(value: int | None) -> int | None:
    # Llama 1 conversions write -1 where there is no padding token.
    return None if value is None or value < 0 else value


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """One id, several or none, as Hugging Face writes them, to a tuple."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Write the attributes of a config.json that old readers and new ones understand alike.

    Rotary settings stand twice, as `rope_parameters` and as `rope_theta` with `rope_scaling`. The family is
    always llama. `config_from_hf(config_to_hf(c)) == c`.
    """
    s, eos = config.rope_scaling, config.eos_token_id
    scaling = None if s is None else {"rope_type": s.kind, **{k: getattr(s, k) for k in ROPE_KEYS[s.kind]}}
    scaling = scaling and dict(sorted(scaling.items()))
    same = (*SIZES, "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "initializer_range")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: getattr(config, name) for name in same},
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
    }
