"""Pictures of docs/results.md: means over cells, drawn with the report's own charts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..report.frontier import frontier as frontier_of_rows
from ..report.plots import Line, lines, scatter
from .read import Finished, before, by_seed
from .stats import mean_interval
from .tables import accuracy

COEFFICIENT = re.compile(r"^(.*) ([-0-9.e]+)$")
BEST = 7
"""Methods drawn by name in a frontier: more cannot be told apart."""


def row(method: str, number: int, domain: str, values: Sequence[float]) -> dict[str, Any]:
    mean, low, high = mean_interval(values)
    if low != low:  # one value has no interval
        low = high = mean
    return {"method": method, "round": number, "domain": domain, "accuracy": mean, "low": low, "high": high}


def frontier(of: Mapping[str, Sequence[Finished]], found: Sequence[Finished], shown: Collection[str]) -> str:
    """In domain against out of domain: the base, and the rounds of the methods `shown`."""
    rows = [row("base", 0, d, [before(found, d)]) for d in ("id", "ood")]
    # Plain last: with it or without, the others keep their colours.
    for name in sorted(of, key="plain".__eq__):
        if name in shown:
            for number in of[name][0].rounds:
                for domain in ("id", "ood"):
                    rows.append(row(name, number, domain, by_seed(of[name], accuracy(domain, round=number))))
    return frontier_of_rows(rows, width=720, height=520, name="frontier", standalone=True)


def lines_of_coefficients(found: Sequence[Finished]) -> str:
    """Accuracy in domain over the coefficient of each line from the base; 0 is the base, 1 the tuned model."""
    drawn = []
    for method in dict.fromkeys(m[1] for run in found if (m := COEFFICIENT.match(run.method))):
        own = [run for run in found if (m := COEFFICIENT.match(run.method)) and m[1] == method]
        points = {0.0: mean_interval([before(own, "id")])}
        for run in own:
            coefficient = float(run.method.rsplit(" ", 1)[1])
            same = by_seed([other for other in own if other.method == run.method], accuracy("id"))
            points[coefficient] = mean_interval(same)
        track = sorted(points.items())
        drawn.append(
            Line(
                method,
                [(c, m) for c, (m, _, _) in track],
                [(lo, hi) if lo == lo else (m, m) for _, (m, lo, hi) in track],
            )
        )
    return lines(
        drawn, name="lines", title="Along the line", x_title="λ of base + λ · change", y_title="accuracy in domain",
        zero=False, rules=[(1.0, "tuned")], form=lambda v: f"{100 * v:.0f} %", standalone=True,
    )  # fmt: skip


def curve(axis: str, found: Sequence[Finished]) -> str:
    """Accuracy in and out of domain over the values of an axis, a line a method and domain."""
    labels = list(dict.fromkeys(run.axes[axis] for run in found))
    places = {label: number(label, i) for i, label in enumerate(labels)}
    drawn = []
    for method in dict.fromkeys(run.method for run in found):
        for domain, word in (("id", "in"), ("ood", "out")):
            points, intervals = [], []
            for label in labels:
                here = [run for run in found if run.method == method and run.axes[axis] == label]
                values = by_seed(here, accuracy(domain))
                if values:
                    mean, low, high = mean_interval(values)
                    points.append((places[label], mean))
                    intervals.append((low, high) if low == low else (mean, mean))
            if points:
                drawn.append(Line(f"{method}, {word}", points, intervals))
    return lines(
        drawn, name="curve", title=f"Accuracy by {axis}", x_title=axis, y_title="accuracy on test questions",
        zero=False, form=lambda v: f"{100 * v:.0f} %", standalone=True,
    )  # fmt: skip


def number(label: str, otherwise: float) -> float:
    try:
        return float(label)
    except ValueError:
        return otherwise


def layers(looked: Sequence[Finished], count: int) -> str:
    """Each layer's mean change against its mean importance, of the first method."""
    own = [run for run in looked if run.method == looked[0].method]
    points = []
    for i in range(count):
        importance = [run.row["analysis"]["importance"]["taylor"][i] for run in own]
        change = [last_change(run).get(f"model/layers/{i}", 0.0) for run in own]
        points.append((sum(importance) / len(own), sum(change) / len(own), f"layer {i}"))
    return scatter(
        points, name="layers", title=f"Layers of {looked[0].method}", x_title="importance (Taylor) →",
        y_title="↑ relative change", standalone=True,
    )  # fmt: skip


def last_change(run: Finished) -> dict[str, float]:
    """Relative change of the tuned model of the last round, by layer group."""
    tuned = [r for r in run.row["analysis"]["change"] if r["model"] == "tuned"]
    return tuned[-1]["layers"] if tuned else {}
