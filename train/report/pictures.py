"""The pictures of a report with the words around them; with nothing to show, a part is empty."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..runtime.jsonl import Row
from .frontier import estimate, frontier
from .html import part
from .plots import WIDTH, Hue, Line, bounds, dots, lines, share
from .read import owners
from .rows import DOMAIN_NAMES, DOMAINS, pooled_rows
from .sections import in_order, last_rounds
from .verdict import format_points, last_pairs

if TYPE_CHECKING:
    from .read import Run

WIDE = {1: 680.0, 2: 512.0}
"""The width of a panel where there are so few; three and more stand beside each other in the width of a telephone."""


def picture(run: Run) -> str:
    """Show accuracy in domain against out of domain, in a wide and a narrow drawing."""
    rows, options = pooled_rows(run.rows), {"style": run.looks, "shared": shared(run)}
    wide = frontier(rows, width=1040, height=580, name="wide", **options)
    if not wide:
        return ""
    narrow = frontier(rows, width=350, height=400, name="narrow", **options)
    swept = any(row.get("coefficient") is not None or row["method"] == "line" for row in rows)
    based = any(row["method"] == "base" for row in rows)
    striped = any(method != owner for (method, _), owner in options["shared"].items())
    return part("frontier", wide=wide, narrow=narrow, based=based, swept=swept, striped=striped)


def shared(run: Run) -> dict[tuple[str, int], str]:
    """Return (method, round) → the method under whose name its model was evaluated: one model may be of several."""
    return {(method, int(p.get("round") or 0)): owners(p)[0] for p in run.of_kind("evaluate") for method in owners(p)}


def side_by_side(draw: Callable[..., str], panels: Sequence[tuple[Sequence[Any], dict[str, Any]]], note: str) -> str:
    """Draw panels as wide as their number allows; wide ones a second time, for a telephone.

    Args:
      panels: the arguments of `draw`, `name` among those by keyword.
    """
    width = WIDE.get(len(panels), WIDTH)
    drawn = []
    for values, options in panels:
        narrow = options if width == WIDTH else options | {"name": f"{options['name']}-narrow"}
        found = draw(*values, **narrow)
        if width != WIDTH:
            found = part("twice", wide=draw(*values, **options, width=width), narrow=found)
        drawn.append(found)
    return part("panels", drawn=drawn, note=note, width=f"{width:g}px")


def families(run: Run) -> str:
    """Show each family by itself: a dot a method, after its last round."""
    single = [r for r in run.rows if r.get("family", "all") != "all" and r.get("accuracy") is not None]
    tested = {(r["domain"], r["family"]) for r in single if r.get("split", "test") == "test"}
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in single:
        key = (row["domain"], row["family"])
        if key not in tested or row.get("split", "test") == "test":
            grouped.setdefault(key, []).append(row)
    order = {d: i for i, d in enumerate(DOMAINS)}
    shown = []
    for domain, family in sorted(grouped, key=lambda key: (order.get(key[0], 9), key[1])):
        rows = [cells[domain] for cells in last_rounds(grouped[domain, family]).values()]
        if rows:
            shown.append((f"{family} · {DOMAIN_NAMES.get(domain, domain)}", rows))
    if not shown:
        return ""
    low, top = bounds([v for _, rows in shown for row in rows for v in estimate(row)], pad=0.04, least=0.1)
    # One scale for all, no wider than they need.
    ends = {"low": max(low, 0.0), "top": min(top, 1.0)}
    panels = [family_panel(run, title, rows, f"family{i}", ends) for i, (title, rows) in enumerate(shown)]
    rule = "; the dotted rule is the base" if any(r["method"] == "base" for r in single) else ""
    note = f"After each method's last round, with 95 % intervals{rule}. Numbers in percent, one scale for all."
    return side_by_side(dots, panels, note)


def family_panel(run: Run, title: str, rows: Sequence[Row], name: str, ends: Mapping[str, float]):
    """The panel of one family: a dot and a 95 % interval for each method's last round; the base as a rule."""
    dotted = []
    for row in rows:
        middle, *interval = estimate(row)
        label = row["method"] if row["method"] == "base" else f"{row['method']} · {row['round']}"
        dotted.append((label, middle, tuple(interval)))
    n = rows[0].get("n")
    return [dotted], {
        "name": name, "title": title, "form": format_share, "tick": share, **ends,
        "rule": next((row["accuracy"] for row in rows if row["method"] == "base"), None),
        "looks": [(run.looks[row["method"]].fill, run.looks[row["method"]].marker) for row in rows],
        "note": f"n = {n:,}" if n is not None and all(row.get("n") == n for row in rows) else "",
    }  # fmt: skip


def format_share(value: float) -> str:
    return f"{100 * value:.1f}"


def format_whole_points(value: float) -> str:
    return format_points(value, digits=0)


def paired(run: Run) -> str:
    """Show the last round's paired differences around zero, a panel a domain, each in its method's colour."""
    pairs = last_pairs(run.summary.get("paired") or [])
    order = in_order({p["domain"] for p in pairs})
    pairs.sort(key=lambda p: order.index(p["domain"]))
    if not pairs:
        return ""
    low, top = bounds([0.0, *(v for p in pairs for v in (p["low"], p["high"]))], pad=0.04, least=0.02)
    groups: dict[str, list[Row]] = {}
    for p in pairs:
        split = "" if p.get("split", "test") == "test" else f" ({p['split']})"
        groups.setdefault(f"{DOMAIN_NAMES.get(p['domain'], p['domain'])}{split}", []).append(p)
    panels = []
    for i, (title, group) in enumerate(groups.items()):
        options = {
            "name": f"paired{i}", "title": title, "form": format_points, "tick": format_whole_points, "rule": 0.0,
            "low": low, "top": top,
            "looks": [(run.looks[p["a"]].fill, run.looks[p["a"]].marker) for p in group],
        }  # fmt: skip
        panels.append(([[(f"{p['a']} − {p['b']}", p["difference"], (p["low"], p["high"])) for p in group]], options))
    note = "After the last round, in percentage points. An interval that crosses the dotted zero may be chance."
    return side_by_side(dots, panels, note)


def panels(run: Run, grouped: Mapping[tuple[str, ...], list[Line]], *, name: str, note: str, **options: Any) -> str:
    """Draw a panel a method, or a panel for the methods that have curves in common, all on one scale."""
    every = [line for group in grouped.values() for line in group]
    points = [p for line in every for p in line.points]
    if not points:
        return ""
    values = [b for _, b in points] + [v for line in every for v in line.loose.values()]
    options |= {"first": min(a for a, _ in points), "high": (max(a for a, _ in points), 1.05 * max(values))}
    drawn = []
    # What methods have in common stands before what is a method's own.
    order = sorted(grouped, key=lambda methods: (run.methods.index(methods[0]), -len(methods)))
    for i, (methods, group) in enumerate((methods, grouped[methods]) for methods in order):
        hues: list[Hue] = [run.looks[method].fill for method in methods]
        one = hues[0] if len(hues) == 1 else None
        own = [line if one is not None else dataclasses.replace(line, hues=hues) for line in group]
        about = {"title": ", ".join(methods), "name": f"{name}{i}", "one": one}
        drawn.append(([own], about | options))
    if any(len(methods) > 1 for methods in grouped):
        note += " What several methods have in common is drawn once, striped in their colours."
    return side_by_side(lines, drawn, note.strip())


def training(run: Run) -> str:
    """Show the loss of each fine-tuning once, one panel a method or methods, one line a round."""
    grouped: dict[tuple[str, ...], list[Line]] = {}
    for p in run.of_kind("sft"):
        points = [(float(a), float(b)) for a, b in p.get("loss") or () if b is not None and math.isfinite(b)]
        if points:
            branch = re.search(r"branch-(\d+)", str(p.get("phase", "")))
            label = f"round {p.get('round', '?')}" + (f", branch {branch[1]}" if branch else "")
            grouped.setdefault(tuple(owners(p)), []).append(Line(label, points))
    return panels(run, grouped, name="loss", note="", x_title="step →", y_title="loss")


def layers(run: Run) -> str:
    """Show how far each layer has moved from the first model: after a merge whole, before it dotted."""
    merged, joined = (
        {(m, p.get("round")) for p in run.of_kind(kind) for m in owners(p) if p.get("change")}
        for kind in ("merge", "join")
    )
    later = {"sft": merged | joined, "policy": merged | joined, "join": merged, "merge": set()}
    grouped: dict[tuple[str, ...], list[Line]] = {}
    for p in run.phases:
        if p.get("kind") in later and p.get("change"):
            change = {k: float(v) for k, v in p["change"].items() if v is not None and math.isfinite(v)}
            own = tuple(owners(p))
            before = bool(later[p["kind"]]) and all((method, p.get("round")) in later[p["kind"]] for method in own)
            line = layer_line(change, "" if before else f"round {p.get('round', '?')}", faint=before)
            if line.points:
                grouped.setdefault(own, []).append(line)
    note = (
        "‖θ − θ₀‖ / ‖θ₀‖ of each decoder layer after each round, θ₀ the weights the run began with; embedding, final"
        " norm and head apart. Dotted: before the merge of that round."
    )
    titles = {"x_title": "layer →", "y_title": "relative change"}
    return panels(run, grouped, name="layers", note=note, form=share, **titles)


_LAYER = re.compile(r"(?:^|/)layers/(\d+)$")
_LOOSE = {"embed_tokens": "emb", "norm": "norm", "lm_head": "head"}


def layer_line(change: Mapping[str, float], label: str, *, faint: bool) -> Line:
    """Split ‖Δθ‖/‖θ‖ by name into the numbered layers, in order, and what lies outside them."""
    numbered: list[tuple[float, float]] = []
    loose: dict[str, float] = {}
    for path, value in change.items():
        found = _LAYER.search(path)
        last = path.rsplit("/", 1)[-1]
        if found:
            numbered.append((float(found.group(1)), value))
        else:
            loose[_LOOSE.get(last, last[:6])] = value
    order = list(_LOOSE.values())
    loose = dict(sorted(loose.items(), key=lambda kv: order.index(kv[0]) if kv[0] in order else len(order)))
    return Line(label, sorted(numbered), loose=loose, faint=faint)
