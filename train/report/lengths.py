"""Accuracy against the length of answers: what shorter chains of thought cost, along a line of weights above all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..log import format_percent
from .html import Table, part
from .pictures import side_by_side
from .plots import Line, lines, share
from .rows import DOMAIN_NAMES, format_interval, method_label, pooled_rows
from .sections import in_order

if TYPE_CHECKING:
    from .read import Run

NOTE = (
    "Greedy answers of the models along a line base + λ·change, in the order of λ. Where the change was learnt from "
    "short solutions, this is CoT-Valve: λ = 0 answers at length, λ = 1 shortly."
)


def lengths(run: Run) -> str:
    """Show mean tokens of an answer beside the accuracy, in a table; drawn where a line of models was evaluated."""
    rows = [row for row in pooled_rows(run.rows) if row.get("tokens") is not None and row.get("accuracy") is not None]
    if not rows:
        return ""
    body = [
        [
            method_label(row), str(row["round"]), DOMAIN_NAMES.get(row["domain"], row["domain"]),
            f"{row['tokens']:.1f}", format_percent(row["accuracy"]), format_interval(row),
        ]
        for row in rows
    ]  # fmt: skip
    head = ["method", "round", "domain", "tokens", "accuracy", "95 % interval"]
    table = Table(head, body, "Mean tokens of a greedy answer, what ends it included.", left=(0, 2))
    return valves(run) + part("folded", summary="Tokens of answers", t=table)


def valves(run: Run) -> str:
    """Draw accuracy over length, a panel a domain, for methods whose models lie on a line."""
    swept = [row for row in pooled_rows(run.rows) if row.get("coefficient") is not None and row.get("tokens")]
    panels = []
    for domain in in_order({row["domain"] for row in swept}):
        drawn = []
        for method in dict.fromkeys(row["method"] for row in swept):
            mine = [row for row in swept if (row["method"], row["domain"]) == (method, domain)]
            last = max((row["round"] for row in mine), default=0)
            at = [(row["tokens"], row["accuracy"]) for row in mine if row["round"] == last]
            if at:
                drawn.append(Line(method, at, [(row["low"], row["high"]) for row in mine if row["round"] == last]))
        title = DOMAIN_NAMES.get(domain, domain)
        titles = {"title": title, "x_title": "tokens of an answer →", "y_title": "↑ accuracy"}
        panels.append(([drawn], {"name": f"length-{domain}", "form": share, **titles}))
    return side_by_side(lines, panels, NOTE) if panels else ""
