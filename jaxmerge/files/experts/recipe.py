r"""Recipes of mergekit-moe, typed and refused where not understood.

    base_model: path/of/base               # attention, norms, embeddings and head are this model's
    gate_mode: hidden                      # a name of GATES
    dtype: bfloat16                        # of the result; by default as most of the base is stored
    experts_per_token: 2
    architecture: mixtral                  # or qwen, qwen3; by default what the base's family becomes
    experts:
      - source_model: path/of/one          # the MLPs of this model are expert 0
        positive_prompts: [texts that this expert should see]
        negative_prompts: [texts that it should not see]
        noise_scale: 0.01                  # normal noise of this size is added to the MLPs
        residual_scale: 0.1                # the down projections are multiplied by it, after the noise
    shared_experts: []                     # of the same form: an expert that sees every token
    seed: 0                                # ours: of random gates and of noise

A recipe is told from a merge by its key `experts`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from jaxmerge.files.experts.gates import GATES
from jaxmerge.files.grammar import OPTIONS, floating_dtype, idle, model_name, read_seed
from jaxmerge.files.methods import COPY, Method, known

KEYS = (
    "base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts", "architecture", "name",
    "seed",
)  # fmt: skip
EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")


@dataclasses.dataclass(frozen=True)
class Expert:
    """One model whose MLPs are an expert in every layer."""

    model: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    noise: float
    residual: float


@dataclasses.dataclass(frozen=True)
class Experts:
    """A checked recipe of experts. `merge_method` and `method` are what a record of a merge says of it."""

    base: str
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...]
    gate_mode: str
    per_token: int
    architecture: str | None
    dtype: np.dtype | None
    seed: int
    name: str | None
    text: str
    notes: tuple[str, ...]
    merge_method: ClassVar[str] = "experts"
    method: ClassVar[Method] = COPY
    tokenizer: ClassVar[None] = None
    adapter: ClassVar[None] = None
    statistics: ClassVar[tuple[str, ...]] = ()

    @property
    def about(self) -> str:
        """What the model card says of the method."""
        names = ", ".join(f"`{expert.model}`" for expert in self.experts)
        shared = f", and the expert that sees every token from `{self.shared[0].model}`" if self.shared else ""
        return (
            f"A mixture of experts after mergekit-moe. Attention, norms and embeddings are `{self.base}`'s; the MLPs "
            f"of each layer are experts, in this order from {names}{shared}. {self.per_token} of them see each token; "
            f"the gates are made by `gate_mode: {self.gate_mode}`."
        )

    @property
    def all_experts(self) -> tuple[Expert, ...]:
        """The experts, then those that see every token: the order of the gates."""
        return (*self.experts, *self.shared)

    @property
    def sources(self) -> list[str]:
        """Every model to open, once."""
        return list(dict.fromkeys([self.base, *(expert.model for expert in self.all_experts)]))

    @property
    def donor(self) -> str:
        """The model whose config and tokenizer the result takes."""
        return self.base


def parse(document: Mapping[str, Any], text: str = "", *, compat: str | None = None) -> Experts:
    """Check a recipe of experts given as plain data.

    Raises:
      ValueError: one line that names the key, what was found and what was wanted.
    """
    notes: list[str] = []
    document = _known(document, KEYS, "key of a recipe of experts", notes, compat)
    if document.get("base_model") is None:
        raise ValueError("a recipe of experts has no 'base_model'; name the model whose attention and norms are kept")
    mode = document.get("gate_mode", "hidden")
    known(mode, GATES, "gate_mode")
    experts = _experts(document.get("experts"), "experts", notes, compat)
    shared = _experts(document.get("shared_experts") or [], "shared_experts", notes, compat, least=0)
    per_token = document.get("experts_per_token", 2)
    if type(per_token) is not int or not 1 <= per_token <= len(experts):
        raise ValueError(
            f"experts_per_token is {per_token!r}, wanted a whole number from 1 to {len(experts)}, the number of experts"
        )
    for key in ("architecture", "name"):
        if document.get(key) is not None and not isinstance(document[key], str):
            raise ValueError(f"{key} is {document[key]!r}, wanted text")
    if GATES[mode].prompts:
        _check_prompts(experts, shared, mode)
    if len(experts) & (len(experts) - 1):
        notes.append(f"{len(experts)} experts are not a power of two, which some programs want")
    if len(experts) > 1 and len({(e.model, e.noise, e.residual) for e in experts}) == 1 and not experts[0].noise:
        notes.append(
            f"all experts are {experts[0].model}: until it is trained the result computes what one expert does"
        )
    return Experts(
        model_name(document["base_model"], "base_model"), experts, shared, mode, per_token,
        document.get("architecture"), floating_dtype(document.get("dtype"), "dtype"), read_seed(document),
        document.get("name"), text, tuple(notes),
    )  # fmt: skip


def _known(
    given: Mapping[str, Any], keys: tuple[str, ...], what: str, notes: list[str], compat: str | None
) -> dict[str, Any]:
    """Return what stands under keys that count; what has no effect is noted, what is no word is refused."""
    kept = {}
    for key, value in given.items():
        try:
            known(key, keys, what)
            kept[key] = value
        except ValueError as error:
            note = idle(key, what) if key in OPTIONS or str(key).startswith("x-") else None
            if note is None and compat != "mergekit":
                raise
            notes.append(note or f"{error}; ignored, as mergekit does")
    return kept


def _experts(given: Any, key: str, notes: list[str], compat: str | None, least: int = 1) -> tuple[Expert, ...]:
    if not isinstance(given, list) or len(given) < least or not all(isinstance(one, Mapping) for one in given):
        raise ValueError(f"{key} is {given!r:.100}, wanted a list of {{source_model: …, positive_prompts: […]}}")
    return tuple(_expert(one, f"{key}[{i}]", notes, compat) for i, one in enumerate(given))


def _expert(given: Mapping[str, Any], where: str, notes: list[str], compat: str | None) -> Expert:
    given = _known(given, EXPERT_KEYS, f"key of {where}", notes, compat)
    return Expert(
        model_name(given.get("source_model"), f"source_model of {where}"),
        _prompts(given.get("positive_prompts"), f"positive_prompts of {where}"),
        _prompts(given.get("negative_prompts"), f"negative_prompts of {where}"),
        _number(given.get("noise_scale"), f"noise_scale of {where}", 0.0),
        _number(given.get("residual_scale"), f"residual_scale of {where}", 1.0),
    )


def _prompts(given: Any, what: str) -> tuple[str, ...]:
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise ValueError(f"{what} is {given!r:.100}, wanted a list of texts")
    return tuple(given)


def _number(given: Any, what: str, default: float) -> float:
    if given is None:
        return default
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise ValueError(f"{what} is {given!r:.100}, wanted a number")
    return float(given)


def _check_prompts(experts: tuple[Expert, ...], shared: tuple[Expert, ...], mode: str) -> None:
    for key, listed in (("experts", experts), ("shared_experts", shared)):
        for i, expert in enumerate(listed):
            if not expert.positive:
                raise ValueError(
                    f"{key}[{i}] ({expert.model}) has no positive_prompts, which gate_mode: {mode} makes its gate of; "
                    "give some, or write gate_mode: random"
                )
    if len(experts) > 1 and len({(expert.positive, expert.negative) for expert in experts}) == 1:
        raise ValueError(
            "all experts have the same positive_prompts and negative_prompts, so their gates would be one; give each "
            "expert prompts of its own"
        )
