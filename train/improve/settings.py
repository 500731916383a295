"""What a run is configured by: frozen dataclasses, each default and each invariant in one place."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ..evaluate.settings import Evaluation
from ..generate.decodings import Alone, Decode
from ..generate.settings import Draw
from ..learn.improvers import Improver, check_taught
from ..learn.masks import Everything
from ..learn.picks import All, Picking
from ..learn.settings import Sft
from ..log import UserError
from ..models.settings import Source
from ..resolve import at_least, build, check_known, to_dict
from ..runtime.settings import Distributed, Mesh
from ..search.settings import Search
from ..tasks.settings import Tasks
from .branch import Branch
from .probing import Probe
from .rewrites import Right, Ways

BLOCKS = ("sampling", "selection", "sft", "branch", "merge")
"""Blocks of a run that a method may replace keys of."""
TREE = ("children", "depth", "gate", "retries", "diverse", "samples", "rollout")
SEARCH_READS = {
    "dart": ("dart",),
    "tot": (*TREE, "beam"),
    "mcts": (*TREE, "iterations", "leaves", "exploration", "bonus", "reflect"),
    "retro": ("samples", "retro"),
    "reflect": ("samples", "reflection"),
    "critique": ("samples",),
    "guidance": ("samples",),
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


def check_methods(config: Improve) -> None:
    """Refuse what a method sets and its run does not read, and what needs questions that are not there."""
    for name, method in config.methods.items():
        if method.probe is None:
            merge: Merge = config.block(name, "merge")
            check_merge(config, name, method, merge)
            check_sampling(name, method, config.block(name, "sampling"))
            if method.improver is not None:
                check_improver(config, name, method)
                config.block(name, "sft", method.improver.warm_up)
            check_taught(config.block(name, "sft"), method.improver, f"methods.{name}")
            check_pairs(name, config.block(name, "selection"), config.block(name, "sft"))
            check_rewrite(config, name)


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


def check_pairs(name: str, selection: Selection, sft: Sft) -> None:
    """Refuse an objective that compares answers without pairs of them, and pairs for one that does not."""
    compares = sft.objective.learns != "answers"
    if compares != bool(selection.pairs):
        raise UserError(
            f"methods.{name}: sft.objective {sft.objective.name} "
            + ("compares answers, and selection.pairs is 0; set it to 1 or more" if compares else
               f"learns from single answers, and selection.pairs is {selection.pairs}; set it to 0, or take dpo, say")
        )  # fmt: skip


def check_rewrite(config: Improve, name: str) -> None:
    selection, objective = config.block(name, "selection"), config.block(name, "sft").objective
    rewrite = selection.rewrite
    if selection.pairs and rewrite.name != "right":
        raise UserError(
            f"methods.{name}: selection.pairs are of right and wrong samples, and selection.rewrite is {rewrite.name}; "
            "leave one of them out"
        )
    if rewrite.objective and objective.name != rewrite.objective:
        raise UserError(
            f"methods.{name}: selection.rewrite is {rewrite.name}, whose examples sft.objective={objective.name} "
            f"cannot learn; set methods.{name}.sft.objective={{name: {rewrite.objective}}}"
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


def check_improver(config: Improve, name: str, method: Method) -> None:
    """Refuse what a method that learns from fresh samples does not read."""
    where = f"methods.{name}"
    assert method.improver is not None
    sampling, sft = config.block(name, "sampling"), config.block(name, "sft")
    others = {
        "sft.mask": not isinstance(sft.mask, Everything), "sft.beside": sft.beside.every > 0,
        "branch": config.block(name, "branch").count > 1, "sampling.decode": not isinstance(sampling.decode, Alone),
    }  # fmt: skip
    if unread := [key for key, is_set in others.items() if is_set]:
        raise UserError(f"{where}: a method with an improver does not read {unread[0]}; leave it at its default there")
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
    decode: Decode = dataclasses.field(default=Alone())
    source: Literal["plain", "dart", "tot", "mcts", "retro", "reflect", "critique", "guidance"] = "plain"
    """Solutions come from here. plain: `samples` a question are drawn. dart: solutions are drawn until enough are
    right, by difficulty. tot, mcts: a tree is searched, and its best solutions are taken. retro: right solutions are
    made shorter at their changes of thought. reflect: the model goes on from wrong solutions behind a doubt. critique:
    the model's critiques of solutions are taken that conclude what is true. guidance: guidance is taken that leads to
    the right answer."""
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
                "sampling.search is read with a sampling.source other than plain; set it, or leave search out"
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
    pairs: int = 0
    """At most this many pairs of a right and a wrong sample of a question are learnt, with an `sft.objective` that
    compares answers; 0 pairs nothing, and right samples are learnt."""
    rewrite: Ways = dataclasses.field(default=Right())
    pick: Picking = dataclasses.field(default=All())

    def __post_init__(self):
        at_least(self, "selection", pairs=0)
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
class Method:
    """One arm of the comparison: overrides of the run's blocks, or a probe."""

    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    """These keys of the run's `sampling` block are replaced for this method."""
    selection: dict[str, Any] = dataclasses.field(default_factory=dict)
    """These keys of the run's `selection` block are replaced for this method."""
    sft: dict[str, Any] = dataclasses.field(default_factory=dict)
    """These keys of the run's `sft` block are replaced for this method."""
    branch: dict[str, Any] = dataclasses.field(default_factory=dict)
    """These keys of the run's `branch` block are replaced for this method."""
    merge: dict[str, Any] = dataclasses.field(default_factory=dict)
    """These keys of the run's `merge` block are replaced for this method."""
    improver: Improver | None = None
    """A round samples, selects and fine-tunes (null), or learns from fresh samples at every step: grpo, distill."""
    probe: Probe | None = None


@dataclasses.dataclass(frozen=True)
class Learning:
    """What a phase depends on that learns from fresh samples."""

    improver: Improver
    sampling: Sampling
    sft: Sft

    @property
    def demonstrates(self) -> bool:
        """Whether a teacher is shown worked solutions."""
        shown = self.improver.demonstrate
        return self.sft.self_taught if shown is None else shown


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
    branch: Branch = dataclasses.field(default_factory=Branch)
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
            if method.probe and (method.improver or any(getattr(method, block) for block in BLOCKS)):
                raise UserError(f"methods.{name} is a probe: it trains nothing; set these on {method.probe.of}")
            if method.probe and any(not 1 <= r <= self.rounds for r in method.probe.rounds):
                raise UserError(f"methods.{name}.probe.rounds: the run has rounds 1 to {self.rounds}")
            if method.probe and (method.probe.of not in self.methods or self.methods[method.probe.of].probe):
                trained = [n for n, m in self.methods.items() if m.probe is None]
                raise UserError(
                    f"methods.{name}.probe.of is {method.probe.of!r}; it must be a trained method: {', '.join(trained)}"
                )
            for block in BLOCKS:
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
            # Another objective, optimizer or rewrite has other keys.
            renamed = nested and value.get("name", values[key].get("name")) != values[key].get("name")
            values[key] = {**values[key], **value} if nested and not renamed else value
        return build(type(ours), values, where)
