"""What a run is configured by: frozen dataclasses, each default and each invariant in one place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import jaxmerge

from .data.settings import Data
from .invariants import check_alpha, check_methods, check_probe
from .learn.settings import Sft
from .log import UserError
from .models.settings import Source
from .resolve import at_least, build, check_known, to_dict
from .runtime.settings import Distributed, Mesh
from .tasks.task import FamilySpec


def check_top_p(top_p: float, where: str) -> None:
    if not 0 < top_p <= 1:
        raise UserError(f"{where}.top_p is {top_p}; it must be above 0 and at most 1")


def check_decoding(config: Any, where: str) -> None:
    """What holds for every block that says how to draw sequences."""
    at_least(config, where, samples=1, max_new_tokens=1, slots=1, temperature=0, top_k=0)
    check_top_p(config.top_p, where)
    if config.samples > 1 and config.temperature == 0:
        raise UserError(
            f"{where}.samples is {config.samples} at temperature 0: they would all be the same; set temperature "
            "above 0 or samples=1"
        )
    if "" in config.stop:
        raise UserError(f"{where}.stop holds an empty string; leave it out")


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Which problems: the in-domain family trained on, the others only evaluated."""

    families: tuple[FamilySpec, ...] = ()
    style: Literal["instruct", "compact"] = "instruct"
    """instruct: questions in English for a pretrained model; compact: `prompt?work#answer` for the miniature."""
    seed: int = 0
    """Of the questions; apart from the run's seed so that runs can share their questions."""
    few_shot: int = 0
    """Worked examples put before each question (for base models that follow no instruction)."""

    def __post_init__(self):
        if not any(f.domain == "id" and f.train for f in self.families):
            raise UserError("tasks.families: at least one family with domain: id and train: N is needed")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How solutions are sampled from the model for its own training."""

    samples: int = 4
    """Solutions a question (IMM's S; the paper takes 3)."""
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    slots: int = 64
    """Sequences decoded side by side."""
    batch: int = 64
    """Questions committed to disk at once: what a kill can lose."""
    source: Literal["plain", "dart", "tot", "mcts"] = "plain"
    """plain: `samples` a question. dart: until enough are right, by difficulty. tot, mcts: a tree, then its best."""
    search: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the other sources: keys of `search` of `jaxmerge search` (docs/search.md)."""

    def __post_init__(self):
        check_decoding(self, "sampling")
        at_least(self, "sampling", batch=1)
        if self.source != "plain":
            from .search.settings import Search  # which reads this module

            build(Search, {**self.search, "kind": self.source}, "sampling.search")
        elif self.search:
            raise UserError(
                "sampling.search is read with sampling.source: dart, tot or mcts; set it, or leave search out"
            )


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which verified solutions become training examples."""

    per_question: int | None = None
    """At most this many solutions a question, by sample index, of all rounds learnt from; null keeps all."""
    data: Literal["round", "accumulated"] = "round"
    """Train on this round's examples or on those of all rounds so far."""
    real_ratio: float = 0.0
    """Share of the questions learnt from the generator's worked solution in place of the model's own, 0 to 1."""

    def __post_init__(self):
        if not 0 <= self.real_ratio <= 1:
            raise UserError(f"selection.real_ratio is {self.real_ratio}; it must lie in [0, 1]")
        if self.per_question is not None:
            at_least(self, "selection", per_question=1)


@dataclasses.dataclass(frozen=True)
class Merge:
    """What happens to the weights at the end of a round."""

    rule: Literal[
        "none", "imm", "slerp", "task_arithmetic", "ties", "dare", "dare_ties", "della", "della_linear", "breadcrumbs",
        "breadcrumbs_ties", "sce",
    ] = "none"  # fmt: skip
    alpha: Any = 0.5
    """Weight of the tuned model: a number; a list, one entry a round; `{schedule: linear | cosine, start, end}` over
    the rounds; `{pattern: α or [α, …]}` by path, a list being a gradient over depth (`{"**": [0.3, 0.7]}` is
    layer-adaptive); `{importance: [α, α]}` from the first, where a layer matters most and moved most, to the second
    where least; `{search: [α, …]}` takes the best on the validation questions, anew each round."""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of rules other than imm: density, epsilon, scale, … as `jaxmerge.RULES` takes them."""
    anchor: Literal["original", "previous", "average"] = "original"
    """Merge with the original model, with what the previous round ended with, or with the mean of the original and
    what all earlier rounds ended with."""
    reference: str = "anchor"
    """Where deltas are measured from: `anchor`, or the path of a pretrained base."""
    drop: float = 0.0
    """DARE: share of each delta's elements dropped, the rest rescaled by 1/(1 − drop). 0 switches it off."""
    where: tuple[str, ...] = ()
    """Merge only parameters whose path matches one of these; the others keep the tuned value. () merges all."""
    offload: bool = False
    """Keep the original model in host memory between merges (accelerators only)."""

    def __post_init__(self):
        if not 0 <= self.drop < 1:
            raise UserError(f"merge.drop is {self.drop}; it must lie in [0, 1)")
        check_alpha(self.alpha)
        if self.rule not in ("none", "imm") and (self.drop or self.reference != "anchor"):
            raise UserError(f"merge: drop and reference are imm's, and the rule is {self.rule}; use parameters")
        if self.rule == "imm" and self.parameters:
            raise UserError(f"merge.parameters={dict(self.parameters)}: imm has drop and reference instead")


@dataclasses.dataclass(frozen=True)
class Probe:
    """A model made from a round's checkpoints without training, evaluated and not fed back."""

    of: str
    """The method whose checkpoints are used."""
    kind: Literal["expo", "exme", "line", "best", "merge"] = "expo"
    """expo: θ_t + α(θ_t − θ_b). exme: the best snapshots on validation, each extrapolated, then merged.
    line: base + λ·change for each λ in `coefficients`. best: the best snapshot. merge: all snapshots by `rule`."""
    alphas: tuple[float, ...] = (0.3,)
    weights: tuple[float, ...] = (0.5, 0.5)
    search: Literal["staged", "grid", "coordinate", "golden", "cma_es"] | None = None
    """exme: choose alphas and weights on validation by this strategy; null takes those given."""
    best: int = 2
    """exme: snapshots taken, the best first."""
    rule: str = ""
    """merge: any of `jaxmerge.RULES` that needs no data: average, ties, model_stock, …; with `parameters`."""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    coefficients: tuple[float, ...] = ()
    rounds: tuple[int, ...] = ()
    """Rounds to probe; () is the last one."""

    def __post_init__(self):
        if self.kind == "expo" and len(self.alphas) != 1:
            raise UserError(f"an expo probe needs one alpha, found {list(self.alphas)}; add a method for each")
        if self.kind == "line" and not self.coefficients:
            raise UserError("a probe of kind line needs coefficients: [λ, …]")
        at_least(self, "probe", best=1)
        fixed = self.kind == "exme" and self.search is None
        if fixed and (len(self.alphas) != self.best or len(self.weights) != self.best):
            raise UserError(
                f"an exme probe of {self.best} snapshots needs as many alphas and weights, found {self.alphas}, "
                f"{self.weights}; or a search"
            )
        if (self.kind == "merge") != bool(self.rule) or (self.rule and self.rule not in jaxmerge.RULES):
            raise UserError(f"probe.rule is {self.rule!r}; kind: merge takes one of {', '.join(jaxmerge.RULES)}")
        check_probe(self)


@dataclasses.dataclass(frozen=True)
class Method:
    """One arm of the comparison: overrides of the run's blocks, or a probe."""

    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    selection: dict[str, Any] = dataclasses.field(default_factory=dict)
    sft: dict[str, Any] = dataclasses.field(default_factory=dict)
    merge: dict[str, Any] = dataclasses.field(default_factory=dict)
    probe: Probe | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Greedy decoding on held-out questions, the same for every method."""

    splits: tuple[Literal["validation", "test"], ...] = ("test",)
    max_new_tokens: int = 64
    slots: int = 64
    batch: int = 256
    """Questions committed to disk at once."""
    stop: tuple[str, ...] = ()
    base: bool = True
    """Whether the original model is evaluated too."""
    samples: int = 0
    """Samples a test question beside the greedy answer, for pass@k with k up to this; 0 draws none."""
    temperature: float = 0.8
    sampled: Literal["last", "all"] = "last"
    """Rounds whose models are sampled from, besides the base."""

    def __post_init__(self):
        at_least(self, "evaluation", max_new_tokens=1, slots=1, batch=1, samples=0)
        if self.samples and self.temperature <= 0:
            raise UserError(f"evaluation.temperature is {self.temperature}: samples would all be the same; above 0")
        if "" in self.stop:
            raise UserError("evaluation.stop holds an empty string; leave it out")


@dataclasses.dataclass(frozen=True)
class Improve:
    """`jaxmerge improve`: rounds of sample → verify → select → sft → merge → evaluate."""

    model: Source
    tasks: Tasks
    methods: dict[str, Method]
    rounds: int = 1
    seed: int = 0
    sampling: Sampling = Sampling()
    selection: Selection = Selection()
    sft: Sft = dataclasses.field(default_factory=Sft)
    merge: Merge = Merge()
    evaluation: Evaluation = Evaluation()
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    keep: int | None = None
    """Rounds whose weights stay on disk; null keeps all. Metrics and samples always stay."""

    def __post_init__(self):
        at_least(self, "config", rounds=1)
        if self.keep is not None:
            at_least(self, "config", keep=1)
        for name, method in self.methods.items():
            if name == "base" or not re.fullmatch("[a-z][a-z0-9_-]*", name):
                raise UserError(f"methods.{name}: a method's name is a-z, 0-9, - and _, and not `base`")
            twins = [other for other in self.methods if other.replace("-", "_") == name.replace("-", "_")]
            if len(twins) > 1:
                raise UserError(f"methods: {' and '.join(twins)} differ in - and _ alone; name one otherwise")
            if method.probe and any((method.sampling, method.selection, method.sft, method.merge)):
                raise UserError(f"methods.{name} is a probe: it trains nothing; set these on {method.probe.of}")
            if method.probe and any(not 1 <= r <= self.rounds for r in method.probe.rounds):
                raise UserError(f"methods.{name}.probe.rounds: the run has rounds 1 to {self.rounds}")
            if method.probe and (method.probe.of not in self.methods or self.methods[method.probe.of].probe):
                trained = [n for n, m in self.methods.items() if m.probe is None]
                raise UserError(
                    f"methods.{name}.probe.of is {method.probe.of!r}; it must be a trained method: {', '.join(trained)}"
                )
            for block in ("sampling", "selection", "sft", "merge"):
                self.block(name, block)
        check_methods(self)

    def block(self, method: str, name: str):
        """The run's block `name` with the overrides of `method`."""
        ours = getattr(self, name)
        override = getattr(self.methods[method], name)
        where = f"methods.{method}.{name}"
        values = to_dict(ours)
        for key, value in check_known(type(ours), override, where).items():
            nested = dataclasses.is_dataclass(getattr(ours, key)) and isinstance(value, Mapping)
            values[key] = {**values[key], **value} if nested else value
        return build(type(ours), values, where)


@dataclasses.dataclass(frozen=True)
class Finetune:
    """`jaxmerge sft`: one fine-tuning or pretraining run."""

    model: Source
    data: Data
    sft: Sft = dataclasses.field(default_factory=Sft)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Keys of `jaxmerge sample`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    samples: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0
    slots: int = 64
    chat: bool | None = None
    """Render prompts through the chat template; null: if the model has one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)

    def __post_init__(self):
        check_decoding(self, "sample")
