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
    """Each method has a list of overrides to try (as under `methods:`), equally many for each: an equal budget."""
    axes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The candidates are tried at every point of these axes, written as in `sweep.axes`; a candidate's score is its
    mean over all points."""
    set: dict[str, Any] = dataclasses.field(default_factory=dict)
    """These overrides of the config hold in this stage: `{evaluation: {splits: [validation]}}`."""

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
    """Each axis has a name and its points: {label: overrides of the config}, or a list of values of the key of that
    name (`seed: [1, 2, 3]`)."""
    tune: Tune = dataclasses.field(default_factory=Tune)
    rows: str = ""
    """Finished cells are written to this file of JSON lines; by default it is docs/results/NAME.jsonl."""
    keep_runs: bool = False
    """The weights of finished cells are kept; their metrics and reports stay in any case."""
    analyse: Any = False
    """Importance and change of the layers of each trained cell are measured and kept with its row: true, or keys of
    `jaxmerge analyse`, `{texts: 8}`."""
    control: str = ""
    """The other methods are compared with this one, cell by cell."""
    judge: str = "frontier"
    """docs/results.md shows the experiment in this form: frontier, curve (over the first axis) or layers."""
    claim: str = ""
    """docs/results.md quotes this sentence as what the paper says."""
    seen: str = ""
    """docs/results.md quotes this as what the rows say; a person who read them wrote it."""
    title: str = ""
    """docs/results.md gives the experiment this heading."""

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
    """This trained method of the run is looked at; null takes the first that merges, else the first."""
    rounds: tuple[int, ...] = ()
    """These rounds are looked at; () takes all that are committed and on disk."""
    texts: int = 32
    """Losses are measured on the solutions of this many held-out questions of each domain."""
    samples: int = 0
    """This many samples of each held-out question are drawn for entropy and pass@k; 0 takes those that the run drew for
    training."""
    questions: int = 64
    """This many questions of each domain are sampled or looked at for faithfulness, and as many training questions for
    LiMem."""
    limem: bool = False
    """Memorisation is scored too, which asks for answers to training questions and to their twins."""
    faithfulness: bool = False
    """Whether answers follow from their chains of thought is measured too, which asks for answers after chains that are
    cut off, and after chains with a mistake."""
    grid: int = 9
    """The plane of losses has this many points along each axis."""
    out: str | None = None
    """The analysis is written to this folder; null writes to the run's own."""

    def __post_init__(self):
        for name, least in (("texts", 2), ("samples", 0), ("questions", 1), ("grid", 3)):
            if getattr(self, name) < least:
                raise UserError(f"analyse: {name}={getattr(self, name)}; it must be at least {least}")
