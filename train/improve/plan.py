"""What an `improve` run does, phase by phase, decided before anything is computed.

`plan` reads like the papers: for each round and method, sample with the current model, select what is right,
fine-tune, merge with the anchor, evaluate. Two methods that ask for the same phase (the first round's samples,
say: both start from the base) share it, because a phase is known by what goes into it.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from ..log import UserError
from ..resolve import to_dict
from .settings import Improve, Probe

Kind = Literal["load", "sample", "select", "sft", "merge", "rank", "probe", "evaluate"]

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
        """Whether a model comes out; sft and merge keep it on disk, a probe's is made again when asked for."""
        return self.kind in ("sft", "merge", "probe")


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
    """The model a method ends a round with, and the phase that evaluated it."""

    method: str
    round: int
    model: str
    evaluate: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


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
            sft, merge = config.block(m, "sft"), config.block(m, "merge")
            selection = config.block(m, "selection")
            samples = todo.add("sample", round, m, {"model": current[m]}, config.block(m, "sampling"))
            # What the last round selected holds what those before it did.
            carried = selection.data == "accumulated" or selection.rewrite.remembers
            earlier = {"earlier-0": data[m]} if carried and m in data else {}
            measured = {"model": current[m]} if selection.pick.measures else {}
            data[m] = todo.add("select", round, m, {"samples": samples} | earlier | measured, selection)
            start = current[m] if sft.start == "merged" else BASE
            tuned[m] = todo.add("sft", round, m, {"model": start, "data": data[m]}, sft)
            if merge.rule == "none":
                current[m] = tuned[m]
            else:
                inputs = {"anchor": current[m] if merge.anchor == "previous" else BASE, "tuned": tuned[m]}
                if merge.anchor == "average":
                    inputs |= {f"anchor-{i}": model for i, model in enumerate(ended[m])}
                settings = {"merge": to_dict(merge), "round": round}
                current[m] = todo.add("merge", round, m, inputs, settings)
            ended[m].append(current[m])
            outcomes.append(Outcome(m, round, current[m], todo.add("evaluate", round, m, {"model": current[m]})))
        for name, method in config.methods.items():
            probe = method.probe
            if probe is not None and round in (probe.rounds or (config.rounds,)):
                outcomes += plan_probe(todo, config, name, probe, round, tuned[probe.of], current[probe.of])
    return todo, outcomes


def plan_probe(todo: Plan, config: Improve, name: str, probe: Probe, round: int, tuned: str, current: str):
    """Models made from this round's checkpoints, each evaluated."""

    def outcome(inputs, settings, label, **extra):
        model = todo.add("probe", round, name, inputs, settings, name=f"{label}merge")
        evaluate = todo.add("evaluate", round, name, {"model": model}, name=f"{label}evaluate")
        return Outcome(name, round, model, evaluate, extra)

    if probe.kind == "expo":
        return [outcome({"tuned": tuned}, {"kind": "expo", "alpha": probe.alphas[0]}, "")]
    if probe.kind == "line":
        return [
            outcome({"tuned": current}, {"kind": "line", "coefficient": c}, f"{spell(c)}-", coefficient=c)
            for c in probe.coefficients
        ]
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
