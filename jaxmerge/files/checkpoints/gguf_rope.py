"""Rotary settings of GGUF files, as config.json has them."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

Given = Mapping[str, Any]
"""Metadata of the architecture without its name in front: `rope.freq_base`."""

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are no weights: what rotary frequencies are divided by."""
YARN_FACTOR = "rope.scaling.yarn_attn_factor"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every Llama 3 so far; a file holds the frequencies' factors alone, from which these do not follow."""


WINDOW = "attention.sliding_window"


@dataclasses.dataclass(frozen=True)
class Rotation:
    """What an architecture fixes of its rotation.

    theta: where the file does not say. scalings: the kinds that llama.cpp computes for it. local: layers with a window
    rotate without scaling, and config.json says so in rope_parameters. old: config.json has no rope_parameters.
    """

    theta: float = 10000.0
    scalings: tuple[str, ...] = ("linear", "yarn", "llama3")
    local: bool = False
    old: bool = False


def read_rope(
    given: Given, factors: Mapping[str, np.ndarray], arch: Rotation, prefix: str, source: pathlib.Path | str
) -> dict[str, Any]:
    """The rotary attributes of the config.json that a file stands for.

    Args:
      given: metadata of the architecture. factors: those tensors of FACTORS that the file has.
      prefix: of the metadata, and source: the file, for messages.
    """
    theta = shortest(given.get("rope.freq_base", arch.theta))
    scaling = _scaling(given, factors, theta, arch, prefix, source)
    old = {"rope_theta": theta, "rope_scaling": scaling}
    # Twice: old readers know the second form only. Of several kinds of rotation the second says all.
    new = {"rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})}}
    if arch.local and given.get(WINDOW):
        local = shortest(given.get("rope.freq_base_swa", theta))
        sliding = {"rope_theta": local, "rope_type": "default"}
        kinds = {"full_attention": new["rope_parameters"], "sliding_attention": sliding}
        return {"rope_parameters": kinds} | (old if local == theta else {})
    return old if arch.old else new | old


def _scaling(
    given: Given,
    factors: Mapping[str, np.ndarray],
    theta: float,
    arch: Rotation,
    prefix: str,
    source: pathlib.Path | str,
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
    if kind not in ("none", *arch.scalings):
        raise ValueError(f"{source}: rope scaling {kind!r} is not known of {prefix[:-1]}")
    if kind == "longrope":
        return _longrope(given, factors, original)
    if shortest(given.get("rope.scaling.attn_factor", 1.0)) != 1:
        raise ValueError(f"{source}: not understood: {prefix}rope.scaling.attn_factor of rope scaling {kind!r}")
    # What llama.cpp computes with YaRN whatever this key says; its converter writes what config.json has.
    usual = 0.1 * math.log(given["rope.scaling.factor"]) + 1 if kind == "yarn" else 1.0
    if not math.isclose(found := shortest(given.get(YARN_FACTOR, usual)), usual, rel_tol=1e-5):
        raise ValueError(f"{source}: {prefix}{YARN_FACTOR} is {found}; implemented: {usual:.6g}")
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
