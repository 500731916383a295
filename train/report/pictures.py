"""The pictures of a report with the words around them; with nothing to show, a part is empty."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..runtime.jsonl import Row
from .frontier import estimate, frontier
from .html import part
from .plots import Line, dots, lines, share
from .rows import DOMAIN_NAMES, DOMAINS, pooled_rows
from .sections import format_points, last_rounds, methods, owners
from .style import looks

if TYPE_CHECKING:
    from .read import Run


def picture(run: Run) -> str:
    """Show accuracy in domain against out of domain, in a wide and a narrow drawing."""
    rows = pooled_rows(run.rows)
    wide = frontier(rows, width=1040, height=580, name="wide")
    if not wide:
        return ""
    narrow = frontier(rows, width=350, height=400, name="narrow")
    swept = any(row.get("coefficient") is not None or row["method"] == "line" for row in rows)
    based = any(row["method"] == "base" for row in rows)
    return part("frontier", wide=wide, narrow=narrow, based=based, swept=swept)


def families(run: Run) -> str:
    """Show each family by itself: a dot a method, after its last round."""
    single = [r for r in run.rows if r.get("family", "all") != "all" and r.get("accuracy") is not None]
    tested = {(r["domain"], r["family"]) for r in single if r.get("split", "test") == "test"}
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in single:
        key = (row["domain"], row["family"])
        if key not in tested or row.get("split", "test") == "test":
            panels.setdefault(key, []).append(row)
    drawn = []
    order = {d: i for i, d in enumerate(DOMAINS)}
    for domain, family in sorted(panels, key=lambda key: (order.get(key[0], 9), key[1])):
        last = last_rounds(panels[domain, family])
        rows = [cells[domain] for cells in last.values()]
        if rows:
            title = f"{family} · {DOMAIN_NAMES.get(domain, domain)}"
            drawn.append(draw_family(rows, title=title, name=f"family{len(drawn)}", methods=methods(run)))
    if not drawn:
        return ""
    rule = "; the dotted rule is the base" if any(r["method"] == "base" for r in single) else ""
    note = f"After each method's last round, with 95 % intervals{rule}. Numbers in percent."
    return part("panels", drawn=drawn, note=note)


def draw_family(rows: Sequence[Row], *, title: str, name: str, methods: Sequence[str]) -> str:
    """Draw one family: a dot and a 95 % interval for each method's last round; the base as a rule."""
    style = looks(methods)
    shown = []
    for row in rows:
        middle, *interval = estimate(row)
        label = row["method"] if row["method"] == "base" else f"{row['method']} · {row['round']}"
        shown.append((label, middle, tuple(interval)))
    n = rows[0].get("n")
    return dots(
        shown, name=name, title=title, form=lambda v: f"{100 * v:.1f}", tick=share, top=1.0,
        rule=next((row["accuracy"] for row in rows if row["method"] == "base"), None),
        looks=[(style[row["method"]].fill, style[row["method"]].marker) for row in rows],
        note=f"n = {n:,}" if n is not None and all(row.get("n") == n for row in rows) else "",
    )  # fmt: skip


def paired(run: Run) -> str:
    """Show the paired differences around zero, a panel a domain."""
    pairs = run.summary.get("paired") or []
    reach = max((max(abs(p["low"]), abs(p["high"]), 0.01) for p in pairs), default=0.0)
    groups: dict[str, list[Row]] = {}
    for p in pairs:
        split = "" if p.get("split", "test") == "test" else f" ({p['split']})"
        groups.setdefault(f"{DOMAIN_NAMES.get(p['domain'], p['domain'])}{split}", []).append(p)
    drawn = [
        dots(
            [(f"{p['a']} − {p['b']}", p["difference"], (p["low"], p["high"])) for p in group],
            name=f"paired{i}", title=title, form=format_points, tick=lambda v: format_points(v, digits=0),
            low=-reach, top=reach, rule=0.0,
            looks=[("ink" if p["low"] <= 0 <= p["high"] else 2 if p["low"] > 0 else 1, "o") for p in group],
        )
        for i, (title, group) in enumerate(groups.items())
    ]  # fmt: skip
    return part("panels", drawn=drawn) if drawn else ""


def panels(run: Run, grouped: Mapping[str, list[Line]], *, name: str, note: str = "", **options: Any) -> str:
    """Draw a panel a method, all on one scale, each in the method's colour."""
    points = [p for group in grouped.values() for line in group for p in line.points]
    values = [v for group in grouped.values() for line in group for v in line.loose.values()]
    if not points:
        return ""
    high = max(a for a, _ in points), 1.05 * max([*values, *(b for _, b in points)])
    style = looks([*methods(run), *(m for m in grouped if m not in methods(run))])
    drawn = [
        lines(
            group, title=method, name=f"{name}-{_id(method)}", one=style[method].fill, high=high, **options
        )
        for method, group in grouped.items()
    ]  # fmt: skip
    return part("panels", drawn=drawn, note=note)


def training(run: Run) -> str:
    """Show the loss of each fine-tuning, one panel a method, one line a round."""
    grouped: dict[str, list[Line]] = {}
    for p in run.of_kind("sft"):
        points = [(float(a), float(b)) for a, b in p.get("loss") or () if b is not None and math.isfinite(b)]
        if points:
            for method in owners(p):
                grouped.setdefault(method, []).append(Line(f"round {p.get('round', '?')}", points))
    return panels(run, grouped, name="loss", x_title="step →", y_title="loss")


def _id(text: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in text)


def layers(run: Run) -> str:
    """Show how far each layer has moved from the first model: after a merge whole, before it dotted."""
    merged = {(m, p.get("round")) for p in run.of_kind("merge") for m in owners(p) if p.get("change")}
    grouped: dict[str, list[Line]] = {}
    for p in run.phases:
        if p.get("kind") in ("sft", "merge") and p.get("change"):
            change = {k: float(v) for k, v in p["change"].items() if v is not None and math.isfinite(v)}
            for method in owners(p):
                before = p["kind"] == "sft" and (method, p.get("round")) in merged
                line = layer_line(change, "" if before else f"round {p.get('round', '?')}", faint=before)
                if line.points:
                    grouped.setdefault(method, []).append(line)
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
