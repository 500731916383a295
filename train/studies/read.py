"""Rows of finished cells as numbers: accuracies by method, point of the axes, round and domain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..report.rows import DOMAIN_NAMES
from ..runtime.jsonl import Row
from .cells import Cell


@dataclasses.dataclass(frozen=True)
class Score:
    """One accuracy of one model."""

    round: int
    domain: str
    family: str
    accuracy: float
    n: int
    pass_at: Mapping[str, float]
    coefficient: float | None


def scores(rows: Sequence[Sequence[Any]], split: str = "test") -> list[Score]:
    """The scores of a method in one cell, on one split."""
    found = []
    for number, where, domain, family, right, n, *extra in rows:
        if where == split:
            pass_at, coefficient = (*extra, None, None)[:2]
            found.append(Score(number, domain, family, right / n, n, pass_at or {}, coefficient))
    return found


@dataclasses.dataclass(frozen=True)
class Finished:
    """One method at one point of the axes, or a probe of it with one coefficient."""

    method: str
    axes: Mapping[str, str]
    scores: list[Score]
    base: list[Score]
    row: Row

    @property
    def seed(self) -> str:
        """Its label on the axis of seeds; where there is none each point is one."""
        return self.axes.get("seed", str(self.axes))

    @property
    def last(self) -> int:
        return max(s.round for s in self.scores)

    def accuracy(self, domain: str, *, round: int | None = None, family: str = "all", k: int | None = None) -> float:
        """Greedy accuracy, or pass@k; NaN where it was not measured."""
        number = self.last if round is None else round
        for s in self.scores:
            if (s.round, s.domain, s.family) == (number, domain, family):
                return s.accuracy if k is None else s.pass_at.get(str(k), float("nan"))
        return float("nan")

    def before(self, domain: str, family: str = "all", k: int | None = None) -> float:
        """The same of the original model."""
        for s in self.base:
            if (s.domain, s.family) == (domain, family):
                return s.accuracy if k is None else s.pass_at.get(str(k), float("nan"))
        return float("nan")

    @property
    def rounds(self) -> list[int]:
        return sorted({s.round for s in self.scores})

    @property
    def domains(self) -> list[str]:
        return [d for d in DOMAIN_NAMES if any(s.domain == d for s in self.scores)]


def originals(found: Sequence[Finished]) -> list[Finished]:
    """One run for each original model: many start from the same, and it counts once."""
    return list({str(sorted((s.domain, s.family, s.accuracy) for s in run.base)): run for run in found}.values())


def before(found: Sequence[Finished], domain: str, family: str = "all", k: int | None = None) -> float:
    """The mean of the original models, each counted once; they are two or three, too few for an interval."""
    values = [run.before(domain, family, k) for run in originals(found)]
    return sum(values) / len(values)


def by_seed(found: Iterable[Finished], measure: Callable[[Finished], float]) -> list[float]:
    """A measure at each seed, the mean over the other axes: what intervals and tests count as one.

    Points of one seed share the draws of their first round; counted each, they would make intervals too short.
    """
    values: dict[str, list[float]] = {}
    for run in found:
        values.setdefault(run.seed, []).append(measure(run))
    return [sum(same) / len(same) for same in values.values()]


def runs(cells: Iterable[Cell], done: Mapping[str, Row]) -> list[Finished]:
    """The finished judged cells, each with the original model of its point; a line's coefficients are runs apart."""
    cells = list(cells)
    base: dict[str, list[Score]] = {}
    for cell in cells:
        if cell.stage == "base" and cell.id in done:
            base[str(cell.axes)] = scores(done[cell.id]["results"]["base"])
    found = []
    for cell in cells:
        if cell.stage == "base" or cell.id not in done or str(cell.axes) not in base:
            continue
        row = done[cell.id]
        for method, rows in row["results"].items():
            all_scores = scores(rows)
            for coefficient in sorted({s.coefficient for s in all_scores}, key=lambda c: (c is not None, c or 0)):
                name = method if coefficient is None else f"{method} {coefficient:g}"
                chosen = [s for s in all_scores if s.coefficient == coefficient]
                found.append(Finished(name, cell.axes, chosen, base[str(cell.axes)], row))
    return found
