"""What a run is configured by: frozen dataclasses, each default and each invariant in one place."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jaxmerge

from ..evaluate.settings import Evaluation
from ..generate.settings import Draw
from ..learn.improvers import Improver
from ..learn.settings import Sft
from ..log import UserError
from ..models.settings import Source
from ..resolve import at_least, build, check_known, to_dict
from ..runtime.settings import Distributed, Mesh
from ..search.settings import Search
from ..tasks.settings import Tasks

PROBE_READS = {
    "expo": ("alphas",),
    "exme": ("best", "search", "alphas", "weights"),
    "line": ("coefficients",),
    "best": (),
    "merge": ("rule", "parameters"),
}
"""Fields that each kind of probe reads besides of, kind and rounds."""
TREE = ("children", "depth", "gate", "retries", "diverse", "samples", "rollout")
SEARCH_READS = {
    "dart": ("dart",),
    "tot": (*TREE, "beam"),
    "mcts": (*TREE, "iterations", "leaves", "exploration", "bonus", "reflect"),
}
"""Keys of `sampling.search` that each source reads."""


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_alpha(alpha: Any) -> None:
    """Refuse what `merge.alpha` cannot be; what it says of paths and rounds is tried on the model."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float, list, Mapping)):
        raise UserError(f"merge.alpha is {alpha!r}; give a number, a list (one a round) or a map")
    if isinstance(alpha, float) and not math.isfinite(alpha):
        raise UserError(f"merge.alpha is {alpha}; give a finite number")
    if isinstance(alpha, Mapping) and "search" in alpha:
        candidates = alpha["search"]
        if not isinstance(candidates, list) or not candidates or set(alpha) != {"search"}:
            raise UserError(f"merge.alpha is {alpha!r}; a search is {{search: [α, …]}} with one α or more")
        if others := [c for c in candidates if not is_number(c)]:
            raise UserError(f"merge.alpha.search holds {others[0]!r}; its candidates are finite numbers")
    if isinstance(alpha, Mapping) and "importance" in alpha:
        span = alpha["importance"]
        if set(alpha) != {"importance"} or not isinstance(span, list | tuple) or len(span) != 2:
            raise UserError(f"merge.alpha is {alpha!r}; layer-adaptive is {{importance: [α, α]}}")
        if others := [a for a in span if not is_number(a)]:
            raise UserError(f"merge.alpha.importance holds {others[0]!r}; its two ends are finite numbers")


def check_probe(probe: Probe) -> None:
    """Refuse fields that differ from their defaults and that a probe of this kind does not read."""
    reads = PROBE_READS[probe.kind]
    if probe.kind == "exme" and probe.search is not None:
        reads = tuple(name for name in reads if name not in ("alphas", "weights"))
    for field in dataclasses.fields(probe):
        if field.name in ("of", "kind", "rounds", *reads):
            continue
        value, made = getattr(probe, field.name), field.default_factory
        if value != (field.default if made is dataclasses.MISSING else made()):
            searched = " with a search" if probe.kind == "exme" and probe.search is not None else ""
            raise UserError(
                f"probe.{field.name} is {value!r}, and a probe of kind {probe.kind}{searched} does not read it; "
                f"it reads {', '.join(reads) or 'none of these'}: leave it out, or choose another kind"
            )


def check_methods(config: Improve) -> None:
    """Refuse what a method sets and its run does not read, and what needs questions that are not there."""
    for name, method in config.methods.items():
        if method.probe is None:
            merge: Merge = config.block(name, "merge")
            check_merge(config, name, method, merge)
            check_sampling(name, method, config.block(name, "sampling"))
            if method.improver is not None:
                check_improver(name, method, config.block(name, "sampling"))
                config.block(name, "sft", method.improver.warm_up)


def check_merge(config: Improve, name: str, method: Method, merge: Merge) -> None:
    # The original model is kept in host memory whatever the rule.
    given = [key for key in method.merge if key != "offload"]
    if given and "rule" not in given and merge.rule == "none":
        raise UserError(
            f"methods.{name}.merge sets {', '.join(given)}, and its rule is none: nothing would be merged; "
            f"set methods.{name}.merge.rule (imm, say), or leave these out"
        )
    alphas = merge.alpha if isinstance(merge.alpha, list) else [merge.alpha]
    measured = [a for a in alphas if isinstance(a, Mapping) and ("search" in a or "importance" in a)]
    if measured and not any(f.validation for f in config.tasks.families):
        raise UserError(
            f"methods.{name}.merge.alpha: {next(iter(measured[0]))} needs validation questions; give families some"
        )


def check_sampling(name: str, method: Method, sampling: Sampling) -> None:
    """Check a method's own keys alone: the run's block may hold keys for other methods, or from before an override."""
    source = sampling.source
    if source == "plain":
        return
    if "samples" in method.sampling:
        raise UserError(
            f"methods.{name}.sampling.samples is {sampling.samples}, and source: {source} does not read it; leave it "
            "out: how many solutions there are is said in sampling.search"
        )
    for key, value in method.sampling.get("search", {}).items():
        if key not in SEARCH_READS[source] and (key, value) != ("kind", source):
            raise UserError(
                f"methods.{name}.sampling.search.{key}: source: {source} does not read it; "
                f"it reads {', '.join(SEARCH_READS[source])}"
            )


def check_improver(name: str, method: Method, sampling: Sampling) -> None:
    """Refuse what a method that learns from fresh samples does not read."""
    where = f"methods.{name}"
    assert method.improver is not None
    method.improver.check(sampling, method.sft, where)
    if method.selection:
        raise UserError(f"{where}.selection: a method with an improver selects no examples; leave it out")
    if sampling.source != "plain" or "batch" in method.sampling:
        raise UserError(f"{where}.sampling: a method with an improver reads neither source nor batch; leave them out")


@dataclasses.dataclass(frozen=True)
class Sampling(Draw):
    """How solutions are sampled from the model for its own training."""

    samples: int = 4
    """The model draws this many solutions of each question (S of IMM; the paper takes 3)."""
    temperature: float = 0.8
    """Logits are divided by it; samples for training need it above 0 to differ."""
    batch: int = 64
    """The samples of this many questions are committed to disk together; a kill loses at most one such batch."""
    source: Literal["plain", "dart", "tot", "mcts"] = "plain"
    """Solutions come from here. plain: `samples` a question are drawn. dart: solutions are drawn until enough are
    right, by difficulty. tot, mcts: a tree is searched, and its best solutions are taken."""
    search: dict[str, Any] = dataclasses.field(default_factory=dict)
    """These are keys of the `search` block of `jaxmerge search` (docs/search.md); sources other than plain read
    them."""

    BLOCK: ClassVar[str] = "sampling"

    def __post_init__(self):
        super().__post_init__()
        at_least(self, "sampling", batch=1)
        if self.source != "plain":
            build(Search, {**self.search, "kind": self.source}, "sampling.search")
        elif self.search:
            raise UserError(
                "sampling.search is read with sampling.source: dart, tot or mcts; set it, or leave search out"
            )


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which verified solutions become training examples."""

    per_question: int | None = None
    """At most this many solutions of a question are learnt, the first by sample index, from all rounds learnt from;
    null keeps all."""
    data: Literal["round", "accumulated"] = "round"
    """A round trains on its own examples (round) or on those of all rounds so far (accumulated)."""
    real_ratio: float = 0.0
    """This share of the questions, 0 to 1, is learnt from the generator's worked solution in place of the model's
    own."""

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
    """This rule merges the tuned model with the anchor at the end of a round; none merges nothing."""
    alpha: Any = 0.5
    """The tuned model has this weight α in the merge. A number is the same in all rounds, and a list has one entry for
    each. `{schedule: linear | cosine, start: α, end: α}` changes it over the rounds. `{PATTERN: α}` gives it by path;
    in place of α, `[α, …]` is a gradient over depth. `{importance: [α, α]}` goes from the first α, for the layer that
    matters and moved most, to the second, for the one that did least. `{search: [α, …]}` takes the best on the
    validation questions of every round."""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """These are the coefficients of rules other than imm: density, epsilon, scale, … as `jaxmerge.RULES` takes them."""
    anchor: Literal["original", "previous", "average"] = "original"
    """The tuned model is merged with the original model, with the model that the previous round ended with, or with the
    mean of the original and of what all earlier rounds ended with (average)."""
    reference: str = "anchor"
    """Deltas are measured from here: the word `anchor`, or the path of a pretrained base."""
    drop: float = 0.0
    """DARE drops this share of each delta's elements and rescales the rest by 1/(1 − drop); 0 switches it off."""
    where: tuple[str, ...] = ()
    """Only parameters whose path matches one of these patterns are merged; the others keep the tuned value. () merges
    all."""
    offload: bool = False
    """The original model is kept in host memory between merges (accelerators only)."""

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
    """The probe is made from the checkpoints of this method."""
    kind: Literal["expo", "exme", "line", "best", "merge"] = "expo"
    """The probe is made in this way. expo: θ_t + α(θ_t − θ_b). exme: the best snapshots on validation are each
    extrapolated, then merged. line: base + λ·change for each λ in `coefficients`. best: the best snapshot is taken.
    merge: all snapshots are merged by `rule`."""
    alphas: tuple[float, ...] = (0.3,)
    """The models are extrapolated this far: one α for expo, one for each snapshot for exme."""
    weights: tuple[float, ...] = (0.5, 0.5)
    """exme: the extrapolated snapshots are merged with these weights, one for each."""
    search: Literal["staged", "grid", "coordinate", "golden", "cma_es"] | None = None
    """exme: this strategy chooses alphas and weights on validation questions; null takes those given."""
    best: int = 2
    """exme: this many snapshots are taken, the best on validation first."""
    rule: str = ""
    """merge: the snapshots are merged by this rule, any of `jaxmerge.RULES` that needs no data: average, ties
    or model_stock."""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """merge: the rule takes these coefficients."""
    coefficients: tuple[float, ...] = ()
    """line: a model is made for each of these λ."""
    rounds: tuple[int, ...] = ()
    """These rounds are probed; () is the last one."""

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
    """These keys of the run's `sampling` block are replaced for this method."""
    selection: dict[str, Any] = dataclasses.field(default_factory=dict)
    """These keys of the run's `selection` block are replaced for this method."""
    sft: dict[str, Any] = dataclasses.field(default_factory=dict)
    """These keys of the run's `sft` block are replaced for this method."""
    merge: dict[str, Any] = dataclasses.field(default_factory=dict)
    """These keys of the run's `merge` block are replaced for this method."""
    improver: Improver | None = None
    """A round samples, selects and fine-tunes (null), or learns from fresh samples at every step: grpo."""
    probe: Probe | None = None


@dataclasses.dataclass(frozen=True)
class Learning:
    """What a phase depends on that learns from fresh samples."""

    improver: Improver
    sampling: Sampling
    sft: Sft


@dataclasses.dataclass(frozen=True)
class Improve:
    """`jaxmerge improve`: rounds of sample → verify → select → sft → merge → evaluate."""

    model: Source
    tasks: Tasks
    methods: dict[str, Method]
    rounds: int = 1
    """Each method goes through this many rounds."""
    seed: int = 0
    """Every random draw of the run comes from this seed."""
    sampling: Sampling = Sampling()
    selection: Selection = Selection()
    sft: Sft = dataclasses.field(default_factory=Sft)
    merge: Merge = Merge()
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    keep: int | None = None
    """The weights of this many rounds stay on disk, the latest; null keeps all. Metrics and samples always stay."""

    def __post_init__(self):
        at_least(self, "config", rounds=1)
        if not any(f.domain == "id" and f.train for f in self.tasks.families):
            raise UserError("tasks.families: at least one family with domain: id and train: N is needed")
        if self.keep is not None:
            at_least(self, "config", keep=1)
        for name, method in self.methods.items():
            if name == "base" or not re.fullmatch("[a-z][a-z0-9_-]*", name):
                raise UserError(f"methods.{name}: a method's name is a-z, 0-9, - and _, and not `base`")
            twins = [other for other in self.methods if other.replace("-", "_") == name.replace("-", "_")]
            if len(twins) > 1:
                raise UserError(f"methods: {' and '.join(twins)} differ in - and _ alone; name one otherwise")
            if method.probe and any((method.sampling, method.selection, method.sft, method.merge, method.improver)):
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

    def block(self, method: str, name: str, further: Mapping[str, Any] | None = None):
        """The run's block `name` with the overrides of `method`, and with `further` ones over those."""
        ours = getattr(self, name)
        override = {**getattr(self.methods[method], name), **(further or {})}
        where = f"methods.{method}.{name}"
        values = to_dict(ours)
        for key, value in check_known(type(ours), override, where).items():
            nested = dataclasses.is_dataclass(getattr(ours, key)) and isinstance(value, Mapping)
            values[key] = {**values[key], **value} if nested else value
        return build(type(ours), values, where)
