"""The `sweep:` block of an `improve` config: which runs make an experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..log import UserError


@dataclasses.dataclass(frozen=True)
class Tune:
    """The first stage: the candidates of each method, judged on validation questions with seeds of their own."""

    candidates: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Method → a list of overrides (as under `methods:`), equally many for each: an equal budget."""
    axes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """As `Sweep.axes`; a candidate's score is its mean over all of them."""
    set: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Overrides of the config in this stage: `{evaluation: {splits: [validation]}}`."""

    def __post_init__(self):
        counts = {}
        for method, candidates in self.candidates.items():
            if (
                not isinstance(candidates, list)
                or not all(isinstance(c, Mapping) for c in candidates)
                or not candidates
            ):
                raise UserError(f"sweep.tune.candidates.{method} is {candidates!r}; a list of overrides is wanted")
            counts[method] = len(candidates)
        if len({*counts.values()}) > 1:
            raise UserError(f"sweep.tune.candidates: methods are tuned with as many trials each, found {counts}")
        check_axes(self.axes, "sweep.tune.axes")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """`sweep:`: every method of the config, and the best candidate of each tuned one, at every point of the axes."""

    axes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Name → {label: overrides of the config}, or a list of values of the key of that name (`seed: [1, 2, 3]`)."""
    tune: Tune = dataclasses.field(default_factory=Tune)
    rows: str = ""
    """JSON lines of finished cells; docs/results/NAME.jsonl by default."""
    keep_runs: bool = False
    """Keep the weights of finished cells; their metrics and reports stay in any case."""
    analyse: Any = False
    """Measure importance and change of the layers of each trained cell, and keep them with its row: true, or keys of
    `jaxmerge analyse`, `{texts: 8}`."""
    control: str = ""
    """The method that the others are compared with, cell by cell."""
    judge: str = "frontier"
    """How docs/results.md shows it: frontier, curve (over the first axis) or layers."""
    claim: str = ""
    """What the paper says, in a sentence, for docs/results.md."""
    seen: str = ""
    """What the rows say, written by a person who read them."""
    title: str = ""

    def __post_init__(self):
        check_axes(self.axes, "sweep.axes")
        if not isinstance(self.analyse, (bool, Mapping)):
            raise UserError(f"sweep.analyse is {self.analyse!r}; true, false or keys of jaxmerge analyse are wanted")
        known = ("frontier", "curve", "layers")
        if self.judge not in known:
            raise UserError(f"sweep.judge is {self.judge!r}; known: {', '.join(known)}")


def check_axes(axes: Mapping[str, Any], where: str) -> None:
    for name, points in axes.items():
        labelled = isinstance(points, Mapping) and all(isinstance(p, Mapping) for p in points.values())
        if not points or not (labelled or isinstance(points, list)):
            raise UserError(f"{where}.{name} is {points!r}; a list of values or {{label: overrides}} is wanted")


@dataclasses.dataclass(frozen=True)
class AnalyseOptions:
    """Keys of `jaxmerge analyse`."""

    method: str | None = None
    """A trained method of the run; null: the first that merges, else the first."""
    rounds: tuple[int, ...] = ()
    """Rounds to look at; () is all that are committed and on disk."""
    texts: int = 32
    """Held-out questions of each domain whose solutions losses are measured on."""
    samples: int = 0
    """Samples of each held-out question for entropy and pass@k; 0 takes those that the run drew for training."""
    questions: int = 64
    """Questions of each domain that are sampled, and training questions for LiMem."""
    limem: bool = False
    """Whether to score memorisation, which asks for answers to training questions and to their twins."""
    grid: int = 9
    """Points along each axis of the plane of losses."""
    out: str | None = None
    """Folder to write to; null is the run's own."""

    def __post_init__(self):
        for name, least in (("texts", 2), ("samples", 0), ("questions", 1), ("grid", 3)):
            if getattr(self, name) < least:
                raise UserError(f"analyse: {name}={getattr(self, name)}; it must be at least {least}")
