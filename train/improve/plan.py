"""What an `improve` run does, phase by phase, decided before anything is computed.

`plan` reads like the papers: for each round and method, sample with the current model, select what is right,
fine-tune, merge with the anchor, evaluate. Two methods that ask for the same phase (the first round's samples,
say: both start from the base) share it, because a phase is known by what goes into it.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from ..learn.settings import Sft
from ..log import UserError
from ..resolve import to_dict
from .probing import Probe
from .settings import Improve, Learning, Selection

Kind = Literal[
    "load", "sample", "select", "part", "sft", "gate", "policy", "join", "merge", "rank", "graft", "probe", "evaluate"
]
TUNES: tuple[Kind, ...] = ("sft", "policy")
"""Kinds of phases whose weights are trained."""
STORED: tuple[Kind, ...] = (*TUNES, "join", "merge", "graft")
"""Kinds of phases whose weights are kept on disk; a probe's are made again when asked for."""

BASE = "base"
"""The name of the original model among the inputs of phases."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """One unit of work, committed whole or not at all.

    Attributes:
      name: `round-1/imm/sft`; the folder it is committed to.
      inputs: role → name of the phase (or `base`) it reads.
      settings: the config block or values it depends on.
      shared_by: other methods that use what it makes.
    """

    name: str
    kind: Kind
    round: int
    method: str
    inputs: dict[str, str]
    settings: Any = None
    shared_by: list[str] = dataclasses.field(default_factory=list)

    @property
    def makes_weights(self) -> bool:
        """Whether a model comes out."""
        return self.keeps_weights or self.kind == "probe"

    @property
    def keeps_weights(self) -> bool:
        """Whether a model comes out and is kept on disk; a probe's is made again when asked for."""
        return self.kind in STORED

    @property
    def tunes(self) -> bool:
        """Whether weights are trained."""
        return self.kind in TUNES


def sft_of(phase: Phase) -> Sft:
    """How a phase that tunes computes an update."""
    return phase.settings.sft if isinstance(phase.settings, Learning) else phase.settings


class Plan:
    """Phases in the order in which they run."""

    def __init__(self):
        self.phases: list[Phase] = []
        self._known: dict[str, Phase] = {}

    def add(self, kind: Kind, round: int, method: str, inputs: dict[str, str], settings: Any = None, *, name="") -> str:
        """The name of the phase that does this: a new one, or one planned before that does the same."""
        identity = json.dumps([kind, round, inputs, to_dict(settings)], default=str)
        phase = self._known.get(identity)
        if phase is None:
            where = f"round-{round}/{method}" if round else BASE
            phase = Phase(f"{where}/{name or kind}", kind, round, method, inputs, settings)
            self._known[identity] = phase
            self.phases.append(phase)
        elif method != phase.method and method not in phase.shared_by:
            phase.shared_by.append(method)
        return phase.name

    def __getitem__(self, name: str) -> Phase:
        return next(p for p in self.phases if p.name == name)

    def last_use(self, name: str) -> int:
        """Index of the last phase that reads the weights called `name`."""
        return max((i for i, p in enumerate(self.phases) if name in p.inputs.values()), default=-1)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The model a method ends a round with, and the phase that evaluated it.

    Attributes:
      tuned: the phase whose model training ended with, before any merge with an anchor; empty if nothing was trained.
    """

    method: str
    round: int
    model: str
    evaluate: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    tuned: str = ""


def spell(number: float) -> str:
    """A number in a name: short where that is exact, so that no two numbers share one.

    Example:
      >>> spell(0.30), spell(1), spell(0.1234567)
      ('0.3', '1', '0.1234567')
    """
    return short if float(short := f"{number:g}") == number else repr(float(number))


def check_sampled(config: Improve) -> None:
    """Refuse `evaluation.samples` where a run has no test question to draw them for."""
    block = config.evaluation
    if block.samples and not ("test" in block.splits and any(f.test for f in config.tasks.families)):
        raise UserError(
            f"evaluation.samples is {block.samples}: they are of test questions, and evaluation.splits is "
            f"{list(block.splits)} of families with {sum(f.test for f in config.tasks.families)}; add test to both, or "
            "set evaluation.samples to 0"
        )


def plan(config: Improve) -> tuple[Plan, list[Outcome]]:
    """All phases of a run, and what each method ends each round with (round 0 is the base)."""
    todo = Plan()
    todo.add("load", 0, BASE, {})
    outcomes = []
    if config.evaluation.base:
        outcomes = [Outcome(BASE, 0, BASE, todo.add("evaluate", 0, BASE, {"model": BASE}))]
    trained = [name for name, method in config.methods.items() if method.probe is None]
    current = dict.fromkeys(trained, BASE)
    tuned: dict[str, str] = {}
    ended: dict[str, list[str]] = {name: [] for name in trained}
    data: dict[str, str] = {}
    for round in range(1, config.rounds + 1):
        for m in trained:
            merge = config.block(m, "merge")
            learn = plan_examples if config.methods[m].improver is None else plan_policy
            tuned[m] = learn(todo, config, m, round, current[m], data)
            if merge.rule == "none":
                current[m] = tuned[m]
            else:
                inputs = {"anchor": current[m] if merge.anchor == "previous" else BASE, "tuned": tuned[m]}
                if merge.anchor == "average":
                    inputs |= {f"anchor-{i}": model for i, model in enumerate(ended[m])}
                settings = {"merge": to_dict(merge), "round": round}
                current[m] = todo.add("merge", round, m, inputs, settings)
            ended[m].append(current[m])
            evaluate = todo.add("evaluate", round, m, {"model": current[m]})
            outcomes.append(Outcome(m, round, current[m], evaluate, tuned=tuned[m]))
        for name, method in config.methods.items():
            probe = method.probe
            if probe is not None and round in (probe.rounds or (config.rounds,)):
                outcomes += plan_probe(todo, config, name, probe, round, tuned[probe.of], current[probe.of])
    return todo, outcomes


def plan_examples(todo: Plan, config: Improve, m: str, round: int, current: str, data: dict[str, str]) -> str:
    """A model tuned on what is right of its own samples; `data` has what each method selected last."""
    sft, selection = config.block(m, "sft"), config.block(m, "selection")
    samples = todo.add("sample", round, m, {"model": current}, config.block(m, "sampling"))
    # What the last round selected holds what those before it did.
    carried = selection.data == "accumulated" or selection.rewrite.remembers
    earlier = {"earlier-0": data[m]} if carried and m in data else {}
    measured = {"model": current} if selection.pick.measures else {}
    data[m] = todo.add("select", round, m, {"samples": samples} | earlier | measured, selection)
    start = current if sft.start == "merged" else BASE
    return plan_training(todo, config, m, round, start, data[m])


def plan_policy(todo: Plan, config: Improve, m: str, round: int, current: str, data: dict[str, str]) -> str:
    """A model that learns from fresh samples at every step, in the first round after a warm-up if there is one."""
    del data
    improver, sft = config.methods[m].improver, config.block(m, "sft")
    assert improver is not None
    start = current if sft.start == "merged" else BASE
    if improver.warm_up is not None and round == 1:
        solutions = todo.add("select", round, m, {}, Selection(real_ratio=1.0), name="solutions")
        settings = dataclasses.replace(config.block(m, "sft", improver.warm_up), distill=None)
        start = todo.add("sft", round, m, {"model": start, "data": solutions}, settings, name="warm-up")
    inputs, settings = {"model": start}, Learning(improver, config.block(m, "sampling"), sft)
    if improver.gated and round == 1:
        check_gate(config, m)
        compared = {"demonstrates": settings.demonstrates, "distill": sft.distill}
        inputs = {**inputs, "gate": todo.add("gate", round, m, inputs, compared)}
    return todo.add("policy", round, m, inputs, settings)


def check_gate(config: Improve, m: str) -> None:
    if not any(f.domain == "id" and f.validation for f in config.tasks.families):
        raise UserError(
            f"methods.{m}.improver.gate asks teacher and student validation questions; give a family with domain: id "
            "validation: N, or set gate: off"
        )


def plan_training(todo: Plan, config: Improve, method: str, round: int, start: str, data: str) -> str:
    """Name the phase that a round's training ends with: one fine-tuning, or the merge of several branches of it."""
    sft, branch = config.block(method, "sft"), config.block(method, "branch")
    if branch.count == 1:
        return todo.add("sft", round, method, {"model": start, "data": data}, sft)
    ends = {}
    for number in range(1, branch.count + 1):
        settings, name = {"part": number, "of": branch.count}, f"branch-{number}"
        part = todo.add("part", round, method, {"data": data}, settings, name=f"{name}-part")
        ends[name] = todo.add("sft", round, method, {"model": start, "data": part}, sft, name=f"{name}-sft")
    rule = {"rule": branch.rule, "parameters": dict(branch.parameters)}
    return todo.add("join", round, method, {"model": start} | ends, rule)


def plan_probe(todo: Plan, config: Improve, name: str, probe: Probe, round: int, tuned: str, current: str):
    """Models made from this round's checkpoints, each evaluated."""

    def outcome(inputs, settings, label, **extra):
        model = todo.add("probe", round, name, inputs, settings, name=f"{label}merge")
        evaluate = todo.add("evaluate", round, name, {"model": model}, name=f"{label}evaluate")
        return Outcome(name, round, model, evaluate, extra)

    if probe.kind == "graft":
        model = todo.add("graft", round, name, {"tuned": tuned}, probe.graft, name="merge")
        return [Outcome(name, round, model, todo.add("evaluate", round, name, {"model": model}))]
    if probe.kind == "expo":
        return [outcome({"tuned": tuned}, {"kind": "expo", "alpha": probe.alphas[0]}, "")]
    if probe.kind == "line":
        return [
            outcome({"tuned": current}, {"kind": "line", "coefficient": c}, f"{spell(c)}-", coefficient=c)
            for c in probe.coefficients
        ]
    if config.block(probe.of, "branch").count > 1:
        raise UserError(
            f"methods.{name}: {probe.kind} takes checkpoints of one fine-tuning, and {probe.of} branches into "
            f"{config.block(probe.of, 'branch').count}; set methods.{probe.of}.branch.count to 1, or probe another"
        )
    wanted = probe.best if probe.kind == "exme" else 2
    if config.block(probe.of, "sft").snapshots < wanted:
        kept = config.block(probe.of, "sft").snapshots
        raise UserError(
            f"methods.{name}: {probe.kind} takes {wanted} checkpoints of {probe.of} or more, which keeps {kept} a "
            f"round; set methods.{probe.of}.sft.snapshots to {wanted} or more"
        )
    if probe.kind == "merge":
        settings = {"kind": "merge", "rule": probe.rule, "parameters": dict(probe.parameters)}
        return [outcome({"tuned": tuned}, settings, "")]
    if not any(f.validation for f in config.tasks.families):
        raise UserError(
            f"methods.{name}: {probe.kind} ranks checkpoints on validation questions; give families validation: N"
        )
    rank = todo.add("rank", round, name, {"snapshots": tuned})
    chosen: dict[str, Any] = {"kind": probe.kind}
    if probe.kind == "exme":
        fixed = {"alphas": list(probe.alphas), "weights": list(probe.weights)} if probe.search is None else {}
        chosen |= {"search": probe.search, "best": probe.best, **fixed}
    return [outcome({"tuned": tuned, "rank": rank}, chosen, "")]
