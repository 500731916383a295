"""config.json of Hugging Face to ModelConfig and back.

Every attribute is either understood, known to leave the logits alone (IRRELEVANT, HARMLESS), or refused by
name and value: a model that loads computes what its authors computed. families.py says what each family has.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from ..log import UserError
from .config import ACTIVATIONS, FULL, SLIDING, ModelConfig
from .families import COMMON, FAMILIES, FIELDS, LACKING, Family, every, rope_layers
from .hf_experts import read_experts, resolve_counts, write_experts
from .hf_rope import read_rope, write_rope
from .rope import yarn_attention_factor

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
MOST_LAYERS = 10_000  # lists with an entry a layer are made of this number before a tensor is looked at
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
    "attention_bias": (False,),
    "attention_dropout": (0, None),
    "hidden_act": ACTIVATIONS,
    "hidden_activation": ACTIVATIONS,
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False,),
    "torchscript": (False,),
    "use_bfloat16": (False,),
    "use_sliding_window": (False,),
}


def config_from_hf(attributes: Mapping[str, Any], *, source: str | os.PathLike[str]) -> ModelConfig:
    """Read the attributes of a config.json.

    Old style (`rope_theta` with `rope_scaling`) and new style (`rope_parameters`) alike.

    Args:
      attributes: the JSON object; `model_type` is one of FAMILIES.
      source: the file's name, for error messages.

    Raises:
      UserError: an unknown family or attribute, or a known one with a value that is not implemented.
    """
    name = attributes.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        lacking = f"cannot be loaded: {LACKING[name]}" if isinstance(name, str) and name in LACKING else "is not known"
        raise UserError(f"{source}: model_type {name!r:.80} {lacking}; known: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    given = resolve_counts({**COMMON, **family.absent, **attributes}, attributes, family, source)
    _refuse_unknown(given, family, source)

    missing = [size for size in SIZES[:5] if given.get(size) is None]
    if missing:
        raise UserError(f"{source}: {', '.join(missing)} missing; a {name} config must give these sizes")
    if given.get("num_key_value_heads") is None:
        given["num_key_value_heads"] = given["num_attention_heads"]
    if given.get("head_dim") is None and isinstance(given["hidden_size"], int):
        # What is no number of heads is named below.
        heads = given["num_attention_heads"]
        given["head_dim"] = given["hidden_size"] // heads if isinstance(heads, int) and heads else 0
    _check_types(given, source)
    fields: dict[str, Any] = {}
    for attribute, names in FIELDS.items():
        if attribute in family.absent or attribute in COMMON:
            fields |= dict.fromkeys(names, given[attribute])
    fields |= family.fixed
    try:
        return ModelConfig(
            **{size: given[size] for size in SIZES},
            family=name,
            rms_norm_eps=float(given["rms_norm_eps"]),
            tie_word_embeddings=bool(given["tie_word_embeddings"]),
            initializer_range=float(given["initializer_range"]),
            bos_token_id=_token_id(given["bos_token_id"]),
            eos_token_id=token_ids(given["eos_token_id"]),
            pad_token_id=_token_id(given["pad_token_id"]),
            **{field: float(x) if type(x) is int else x for field, x in fields.items()},
            **_read_layers(given, family, source),
            **read_rope(given, family, source),
            **read_experts(given, family, source),
        )
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def _read_layers(given: Mapping[str, Any], family: Family, source) -> dict[str, Any]:
    """Windows and rotations of the layers; in the fewest words: lists that say the same of all layers are ()."""
    window = given.get("sliding_window") if given.get("use_sliding_window", True) else None
    types = given.get("layer_types")
    inferred = family.slides(given, window)
    if types is None or "layer_types" not in family.absent:
        if types is not None and list(types) != inferred:
            raise UserError(f"{source}: not understood: layer_types = {types!r:.200} (implemented: {inferred!r})")
        types = inferred
    if len(types) != given["num_hidden_layers"]:
        raise UserError(
            f"{source}: layer_types has {len(types)} entries for {given['num_hidden_layers']} layers; give one each"
        )
    if SLIDING in types and window is None:
        raise UserError(f"{source}: layer_types has {SLIDING!r}, but no sliding_window is switched on; give one")
    rotates = rope_layers(given)
    return {
        "sliding_window": window if SLIDING in types else None,
        "layer_types": tuple(types) if len(set(types)) > 1 or not {*types} <= {SLIDING, FULL} else (),
        "rope_layers": () if all(rotates) else tuple(rotates),
    }


def _refuse_unknown(given: Mapping[str, Any], family: Family, source) -> None:
    understood = {*COMMON, *family.absent, *SIZES, "rope_theta", "rope_scaling", "rope_parameters", "layer_types"}
    understood -= {"hidden_act", "hidden_activation"}
    harmless = {**HARMLESS, "architectures": ([family.architecture], None), **family.harmless}
    bad = []
    for name, value in given.items():
        fits = harmless.get(name, ())
        if name in understood or name in IRRELEVANT or fits == "any" or value in fits:
            continue
        wanted = f" (implemented: {fits[0]!r})" if fits else ""
        bad.append(f"{name:.60} = {value!r:.60}{wanted}")
    if bad:
        raise UserError(
            f"{source}: not understood: {'; '.join(bad)}. Loading could compute something else than its "
            "authors did; remove from config.json what is known not to matter"
        )


def _check_types(given: Mapping[str, Any], source) -> None:
    def is_number(x, *kinds):
        return isinstance(x, kinds) and not isinstance(x, bool)

    def or_null(fits):
        return lambda x: x is None or fits(x)

    def is_whole(x):
        return is_number(x, int) and abs(x) < 2**31

    def is_real(x):
        return is_number(x, int, float) and abs(x) < 1e30  # neither infinite nor NaN

    def are(kind, extra=()):
        return lambda x: isinstance(x, list | tuple) and all(isinstance(i, kind) or i in extra for i in x)

    def is_ids(x):
        return is_whole(x) or (isinstance(x, list) and all(is_whole(i) for i in x))

    flags = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "qkv_bias")
    expected = {
        "a whole number": ((*SIZES, "max_window_layers", "no_rope_layer_interval", "sliding_window_pattern"), is_whole),
        "a number": (
            ("rms_norm_eps", "initializer_range", "query_pre_attn_scalar", "attention_multiplier",
             "embedding_multiplier", "residual_multiplier", "logits_scaling"),
            is_real,
        ),
        "true or false": (flags, lambda x: isinstance(x, bool)),
        "a whole number or null": (("bos_token_id", "pad_token_id", "sliding_window"), or_null(is_whole)),
        "whole numbers or null": (("eos_token_id",), or_null(is_ids)),
        "an object or null": (("rope_scaling", "rope_parameters"), or_null(lambda x: isinstance(x, dict))),
        "a number or null": (
            ("rope_theta", "rope_local_base_freq", "attn_logit_softcapping", "final_logit_softcapping",
             "partial_rotary_factor"),
            or_null(is_real),
        ),
        "names or null": (("layer_types",), or_null(are(str))),
        "a list of 0 and 1, or null": (("no_rope_layers",), or_null(are((), (0, 1)))),
    }  # fmt: skip
    if isinstance(layers := given.get("num_hidden_layers"), int) and layers > MOST_LAYERS:
        raise UserError(f"{source}: num_hidden_layers is {layers}; expected at most {MOST_LAYERS}")
    for wanted, (names, fits) in expected.items():
        for name in names:
            if (name in given or name in SIZES) and not fits(given.get(name)):
                raise UserError(f"{source}: {name} is {given.get(name)!r:.100}; expected {wanted}")


def _token_id(value: int | None) -> int | None:
    # Llama 1 conversions write -1 where there is no padding token.
    return None if value is None or value < 0 else value


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """One id, several or none, as Hugging Face writes them, to a tuple."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Write the attributes of a config.json of its own family that old readers and new ones understand alike.

    Rotary settings stand twice, as `rope_parameters` and as `rope_theta` with `rope_scaling`.
    `config_from_hf(config_to_hf(c)) == c`; a config that its family has no words for is refused.
    """
    if config.family not in FAMILIES:
        raise UserError(f"model config: family {config.family!r} is not known; known: {', '.join(FAMILIES)}")
    family, eos = FAMILIES[config.family], config.eos_token_id
    same = (*SIZES, "rms_norm_eps", "tie_word_embeddings", "initializer_range")
    written = {
        "architectures": [family.architecture],
        "model_type": config.family,
        **{name: getattr(config, name) for name in same},
        **{name: getattr(config, fields[0]) for name, fields in FIELDS.items() if name in {**COMMON, **family.absent}},
        **_write_layers(config, family),
        **write_rope(config, family),
        **write_experts(config, family),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
    }
    if written.get("query_pre_attn_scalar", 0) is None:
        written["query_pre_attn_scalar"] = config.head_dim
    elif isinstance(x := written.get("query_pre_attn_scalar"), float) and x.is_integer():
        written["query_pre_attn_scalar"] = int(x)  # transformers wants a whole one
    if written.get("attention_multiplier", 0) is None:
        written["attention_multiplier"] = config.score_scale
    read = config_from_hf(written, source=f"model config ({config.family})")
    if differ := differences(config, read):
        named = ", ".join(f"{name}={getattr(config, name)!r}" for name in differ)
        raise UserError(f"model config: the family {config.family!r} has no {named}; choose another family")
    return written


def differences(config: ModelConfig, read: ModelConfig) -> list[str]:
    """Names of the fields in which two configs say different things; how they say it does not count."""
    said = _said(read)
    return [name for name, value in _said(config).items() if said[name] != value]


def _said(config: ModelConfig) -> dict[str, Any]:
    """What a config says, apart from how: the layers one by one, the factors of the scores and of YaRN."""
    said = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del said["layer_types"], said["rope_layers"]
    said["local_rope_theta"] = config.local_rope_theta if any(rope == "local" for _, rope in config.layers) else None
    if (s := config.rope_scaling) is not None and s.kind == "yarn":
        grown = round(yarn_attention_factor(s), 6)
        said["rope_scaling"] = dataclasses.replace(s, attention_factor=grown, mscale=None, mscale_all_dim=None)
    factor = dict.fromkeys(("query_pre_attn_scalar", "attention_multiplier"), config.score_scale)
    return {**said, "sliding_window": config.layers, **factor}


def _write_layers(config: ModelConfig, family: Family) -> dict[str, Any]:
    kinds = config.layers
    types = [FULL if window is None else SLIDING for window, _ in kinds]
    window = config.sliding_window if SLIDING in types else None
    if window is None and family.slides is not every:
        window = family.absent["sliding_window"]  # of no layer, but transformers wants a number
    values = {
        "sliding_window": window,
        "use_sliding_window": SLIDING in types,
        "max_window_layers": types.index(SLIDING) if SLIDING in types else len(types),
        "layer_types": types,
        "no_rope_layers": [int(rope != "none") for _, rope in kinds],
    }
    return {name: value for name, value in values.items() if name in family.absent}
