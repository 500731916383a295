"""Tables of docs/results.md: a row a method, its mean and interval over seeds."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .read import Finished, before, by_seed, originals
from .stats import gain, mean_interval

Pair = tuple[Finished, Finished]


def percent(
    values: Sequence[float], *, scale: float = 100.0, digits: int = 1, most: float = math.inf, sign: bool = False
) -> str:
    """`51.2 [49.0, 53.4]` of several values, the mean alone of one; the interval cut at ± `most`, `sign` writes +."""
    kept = [v for v in values if not math.isnan(v)]
    if not kept:
        return "–"
    mean, low, high = (scale * x for x in mean_interval(kept))
    form = f"{'+' if sign else ''}.{digits}f"
    if math.isnan(low):
        return f"{mean:{form}}"
    return f"{mean:{form}} [{max(low, -most):{form}}, {min(high, most):{form}}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def folded(title: str, lines: Sequence[str]) -> list[str]:
    """A part of the page that opens at a click; its lines end in an empty one."""
    return [f"<details><summary>{title}</summary>", "", *lines, "</details>", ""]


def accuracy(*which: Any, **more: Any) -> Callable[[Finished], float]:
    """`Finished.accuracy` with these arguments, as a measure."""
    return operator.methodcaller("accuracy", *which, **more)


def over_seeds(found: Iterable[Finished], measure: Callable[[Finished], float], *, scale: float = 100.0) -> str:
    return percent(by_seed(found, measure), scale=scale)


def balance(run: Finished) -> float:
    """Mean of the accuracies in and out of domain."""
    return (run.accuracy("id") + run.accuracy("ood")) / 2


def frontier_gain(run: Finished) -> float:
    """Area in (in domain, out of domain) that the rounds of a method add to that of the base."""
    points = [(run.accuracy("id", round=r), run.accuracy("ood", round=r)) for r in run.rounds]
    return gain(points, (run.before("id"), run.before("ood")))


def base_row(found: list[Finished], domains: list[str], k: int) -> list[str]:
    """The original models' means."""
    row = ["base", str(len(originals(found))), *(percent([before(found, d)]) for d in domains)]
    row += [percent([before(found, d, k=k)]) for d in domains if k and d in ("id", "ood")]
    return [*row, percent([(before(found, "id") + before(found, "ood")) / 2]), "", "0", ""]


def p_text(p: float | None) -> str:
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def families(found: list[Finished], of: dict[str, list[Finished]], methods: list[str]) -> list[str]:
    """Forgetting by kind of task, apart."""
    kinds = list(
        dict.fromkeys(s.family for run in found for s in run.scores if s.domain == "ood" and s.family != "all")
    )
    if len(kinds) < 2:
        return []
    rows = [["base", *(percent([before(found, "ood", f)]) for f in kinds)]]
    for name in methods:
        rows.append([name, *(over_seeds(of[name], accuracy("ood", family=f)) for f in kinds)])
    return folded("Out of domain, by kind of question (%)", table(["method", *kinds], rows))


def by_axis(axis: str, found: list[Finished], methods: list[str]) -> list[str]:
    """In and out of domain at each point of an axis, over the others."""
    labels = list(dict.fromkeys(run.axes[axis] for run in found))
    if len(labels) < 2:
        return []
    rows = []
    for name in methods:
        row = [name]
        for label in labels:
            here = [run for run in found if run.method == name and run.axes[axis] == label]
            row += [over_seeds(here, accuracy(d)) for d in ("id", "ood")]
        rows.append(row)
    head = ["method", *(f"{axis} {label}: {word}" for label in labels for word in ("in", "out"))]
    return folded(f"By {axis} (%)", table(head, rows))


def by_round(of: dict[str, list[Finished]]) -> list[str]:
    """In and out of domain after each round."""
    last = max(run.last for own in of.values() for run in own)
    rows = []
    for name, own in of.items():
        if len(own[0].rounds) > 1:
            cells = [over_seeds(own, accuracy(d, round=r)) for r in range(1, last + 1) for d in ("id", "ood")]
            rows.append([name, *cells])
    if not rows:
        return []
    head = ["method", *(f"round {r}: {word}" for r in range(1, last + 1) for word in ("in", "out"))]
    return folded("By round (%)", table(head, rows))


def against(of: Mapping[str, Sequence[Finished]], control: str) -> dict[str, list[Pair]]:
    """Each method's runs beside the control's at the same point."""
    there = {str(run.axes): run for run in of.get(control, ())}
    pairs = {name: [(run, there[str(run.axes)]) for run in own if str(run.axes) in there] for name, own in of.items()}
    return {name: found for name, found in pairs.items() if found and name != control}


def against_first(found: Sequence[Finished], axis: str) -> dict[str, list[Pair]]:
    """Each method's runs at a point of an axis beside its own at the first point, the other axes alike."""
    first = found[0].axes[axis]
    there = {(run.method, str({**run.axes, axis: first})): run for run in found if run.axes[axis] == first}
    pairs: dict[str, list[Pair]] = {}
    for run in found:
        other = there.get((run.method, str({**run.axes, axis: first})))
        if other is not None and other is not run:
            pairs.setdefault(f"{run.method} {run.axes[axis]}", []).append((run, other))
    return pairs


def differences(pairs: Mapping[str, Sequence[Pair]], title: str, k: int = 0) -> list[str]:
    """One run less another, in the mean over seeds."""
    measures: dict[str, Callable[[Finished], float]] = {
        "in domain": accuracy("id"), "out of domain": accuracy("ood"), "mean of in and out": balance,
    }  # fmt: skip
    if k:
        measures |= {f"in domain pass@{k}": accuracy("id", k=k), f"out of domain pass@{k}": accuracy("ood", k=k)}
    rows = []
    for name, own in pairs.items():
        found = [less(own, measure) for measure in measures.values()]
        rows.append([name, str(len(found[0])), *(percent(values, sign=True) for values in found)])
    if not rows:
        return []
    said = "Differences in percentage points. The intervals are not corrected for the number of rows."
    return folded(title, [said, "", *table(["method", "seeds", *measures], rows)])


def less(pairs: Sequence[Pair], measure: Callable[[Finished], float]) -> list[float]:
    """What a measure of the first of each pair is above the second's, a number a seed."""
    first, second = (by_seed([pair[i] for pair in pairs], measure) for i in (0, 1))
    return [a - b for a, b in zip(first, second, strict=True)]


def data(of: dict[str, list[Finished]]) -> list[str]:
    """What each method learnt from: tokens generated for it, solutions, right ones, those kept; of all rounds."""
    rows = []
    for name, runs_of in of.items():
        # Rows of before tokens were counted have four numbers a round.
        rounds = [[r for r in run.row["rounds"] if len(r) == 5] for run in runs_of]
        if " " not in name and any(rounds):
            columns = [[sum(r[i] for r in each) for each in rounds if each] for i in (4, 1, 2, 3)]
            rows.append([name, *(f"{sum(values) / len(values):,.0f}" for values in columns)])
    if not rows:
        return []
    head = ["method", "tokens generated", "solutions", "right", "learnt from"]
    return folded("What was learnt from, mean of the runs", table(head, rows))


def searches(found: list[Finished]) -> list[str]:
    """What searched probes chose, and what the search cost."""
    lines = []
    for run in found:
        for phase, cost in run.row["search"].items():
            if phase.split("/")[1] == run.method:
                chosen = run.row["coefficients"][phase].get("found", {})
                values = ", ".join(f"{name} {value:.3g}" for name, value in chosen.items())
                spent = f"{cost['trials']} evaluations, {cost['search_seconds']:.0f} s"
                lines.append(
                    [run.method, " ".join(run.axes.values()), values, spent, f"{100 * cost['validation']:.1f}"]
                )
    if not lines:
        return []
    head = ["method", "cell", "chosen on validation", "cost", "validation %"]
    return folded("Searches", table(head, lines))
