"""The runs of a sweep as plain configs: a cell is one method with its probes, at one point of the axes.

A cell is known by the fingerprint of what its config says, so a finished one is not run again after others are added,
and is again when anything it depends on is changed.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..log import UserError
from .settings import Sweep

Values = dict[str, Any]
BASE_ONLY = ("model", "tasks", "evaluation", "mesh")
"""Keys that the original model's scores depend on."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One `improve` run of an experiment.

    Attributes:
      stage: base (the original model alone), tune or judge.
      axes: axis → label of the point.
      method: the one that is trained; its probes are run with it.
      candidate: number among those of a tuned method.
      values: the whole config, as a YAML file would hold it.
    """

    stage: str
    axes: dict[str, str]
    method: str
    candidate: int | None
    values: Values

    @property
    def id(self) -> str:
        text = json.dumps(self.values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def __str__(self) -> str:
        where = " ".join(f"{axis}={label}" for axis, label in self.axes.items())
        number = "" if self.candidate is None else f" candidate {self.candidate}"
        return f"{self.stage} {self.method}{number} {where}".rstrip()


def laid_over(values: Values, *overrides: Mapping[str, Any]) -> Values:
    """`values` with overrides merged in, maps key by key."""
    result = copy.deepcopy(values)
    for override in overrides:
        for key, value in override.items():
            nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = laid_over(result[key], value) if nested else copy.deepcopy(value)
    return result


def points(axes: Mapping[str, Any]) -> list[tuple[dict[str, str], Values]]:
    """Every combination: (labels, overrides).

    Example:
      >>> [labels for labels, _ in points({"seed": [1, 2], "size": {"small": {"rounds": 1}}})]
      [{'seed': '1', 'size': 'small'}, {'seed': '2', 'size': 'small'}]
    """
    listed = []
    for name, values in axes.items():
        if isinstance(values, Mapping):
            listed.append([(name, str(label), dict(override)) for label, override in values.items()])
        else:
            listed.append([(name, str(value), {name: value}) for value in values])
    found = []
    for chosen in itertools.product(*listed):
        found.append(({name: label for name, label, _ in chosen}, laid_over({}, *(o for _, _, o in chosen))))
    return found


def with_first_candidates(values: Values, sweep: Sweep) -> Values:
    """The config that is checked before anything runs: tuned methods stand there with their first candidate."""
    methods = dict(values.get("methods") or {})
    for name, candidates in sweep.tune.candidates.items():
        if name in methods:
            raise UserError(f"methods.{name} is also in sweep.tune.candidates; give it one of the two")
        methods[name] = candidates[0]
    return {**values, "methods": methods}


def groups(methods: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each trained method with the probes made of it."""
    found = {name: {name: m} for name, m in methods.items() if not (m or {}).get("probe")}
    for name, method in methods.items():
        if (method or {}).get("probe"):
            of = method["probe"].get("of")
            if of not in found:
                raise UserError(f"methods.{name}.probe.of is {of!r}; it must be a trained method: {', '.join(found)}")
            found[of][name] = method
    return found


def tune_cells(values: Values, sweep: Sweep) -> list[Cell]:
    """Every candidate at every point of the tuning axes; probes are not tuned with it."""
    cells = []
    for labels, override in points(sweep.tune.axes):
        for method, candidates in sweep.tune.candidates.items():
            for number, candidate in enumerate(candidates):
                whole = laid_over(values, override, sweep.tune.set)
                whole["evaluation"] = {**whole.get("evaluation", {}), "base": False}
                cells.append(Cell("tune", labels, method, number, {**whole, "methods": {method: candidate}}))
    return cells


def judge_cells(values: Values, sweep: Sweep, chosen: Mapping[str, int]) -> list[Cell]:
    """The original model and every method at every point of the axes; tuned ones with their chosen candidate."""
    tuned = {name: sweep.tune.candidates[name][number] for name, number in chosen.items()}
    cells: list[Cell] = []
    for labels, override in points(sweep.axes):
        whole = laid_over(values, override)
        alone = {key: whole[key] for key in BASE_ONLY if key in whole} | {"methods": {}}
        cells.append(Cell("base", labels, "base", None, alone))
        whole["evaluation"] = {**whole.get("evaluation", {}), "base": False}
        for name, group in groups({**(values.get("methods") or {}), **tuned}).items():
            cells.append(Cell("judge", labels, name, chosen.get(name), {**whole, "methods": group}))
    return cells


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """The first of those that are the same run."""
    found: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(cell.id, cell)
    return list(found.values())


def score(rows: Sequence[Sequence[Any]], split: str) -> float:
    """Mean over the domains of the accuracy in the last round: what tuning maximises.

    Args:
      rows: [round, split, domain, family, right, n, …] of one method.
    """
    last = max(row[0] for row in rows)
    pooled = [row[4] / row[5] for row in rows if row[:2] == [last, split] and row[3] == "all"]
    if not pooled:
        raise UserError(f"a tuned method has no {split} scores: evaluation.splits must hold it in sweep.tune.set")
    return sum(pooled) / len(pooled)
