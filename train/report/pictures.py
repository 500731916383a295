"""The pictures of a report with the words around them; with nothing to show, a part is empty."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .charts import Series, curves, family_dots, layer_series, looks
from .frontier import frontier
from .rows import DOMAIN_NAMES, DOMAINS, pooled_rows
from .sections import last_rounds, methods, owners

if TYPE_CHECKING:
    from .read import Run

Row = Mapping[str, Any]


def picture(run: Run) -> str:
    """Show accuracy in domain against out of domain, in a wide and a narrow drawing."""
    rows = pooled_rows(run.rows)
    wide = frontier(rows, width=1040, height=580, name="wide")
    if not wide:
        return ""
    narrow = frontier(rows, width=350, height=400, name="narrow")
    swept = any(row.get("coefficient") is not None or row["method"] == "line" for row in rows)
    curve = (
        " The dashed curve is base + λ · (tuned − base): one fine-tuned model, scaled between the base (λ = 0),"
        " itself (λ = 1) and beyond. A method above the curve does better than moving less far."
        if swept
        else ""
    )
    based = any(row["method"] == "base" for row in rows)
    start, tint = (
        ("starts at the base and ", " The tinted quarter is better than the base in both.") if based else ("", "")
    )
    caption = (
        f"Each method {start}takes one numbered step a round; to the right it has learnt what it was trained on,"
        f" downwards it has forgotten other things.{tint} Thin crosses are 95 % intervals of each accuracy by"
        f" itself.{curve} The same picture for a paper:"
        ' <a href="figures/frontier.svg">figures/frontier.svg</a>.'
    )
    drawn = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


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
            drawn.append(family_dots(rows, title=title, name=f"family{len(drawn)}", methods=methods(run)))
    if not drawn:
        return ""
    rule = "; the dotted rule is the base" if any(r["method"] == "base" for r in single) else ""
    note = f"After each method's last round, with 95 % intervals{rule}. Numbers in percent."
    return f'<p class="quiet">{note}</p><div class="panels">{"".join(drawn)}</div>'


def _panels(run: Run, grouped: Mapping[str, list[Series]], draw: Callable[[str, list[Series], str], str]) -> str:
    style = looks([*methods(run), *(m for m in grouped if m not in methods(run))])
    drawn = [draw(method, series, style[method].stroke) for method, series in grouped.items() if series]
    return f'<div class="panels">{"".join(drawn)}</div>' if drawn else ""


def training(run: Run) -> str:
    """Show the loss of each fine-tuning, one panel a method, one line a round."""
    grouped: dict[str, list[Series]] = {}
    for p in run.of_kind("sft"):
        points = [(float(a), float(b)) for a, b in p.get("loss") or () if b is not None and math.isfinite(b)]
        if points:
            for method in owners(p):
                grouped.setdefault(method, []).append(Series(f"round {p.get('round', '?')}", points))
    everything = [point for series in grouped.values() for s in series for point in s.points]
    if not everything:
        return ""
    x_high, y_high = max(a for a, _ in everything), 1.05 * max(b for _, b in everything)
    return _panels(
        run, grouped,
        lambda method, series, css: curves(
            series, title=method, name=f"loss-{_id(method)}", css=css, x_title="step →", y_title="loss",
            x_high=x_high, y_high=y_high,
        ),
    )  # fmt: skip


def _id(text: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in text)


def layers(run: Run) -> str:
    """Show how far each layer has moved from the first model: after a merge whole, before it dotted."""
    merged = {(m, p.get("round")) for p in run.of_kind("merge") for m in owners(p) if p.get("change")}
    grouped: dict[str, list[Series]] = {}
    for p in run.phases:
        if p.get("kind") in ("sft", "merge") and p.get("change"):
            change = {k: float(v) for k, v in p["change"].items() if v is not None and math.isfinite(v)}
            for method in owners(p):
                before = p["kind"] == "sft" and (method, p.get("round")) in merged
                label = "" if before else f"round {p.get('round', '?')}"
                series = layer_series(change, label, faint=before)
                if series.points:
                    grouped.setdefault(method, []).append(series)
    everything = [s for series in grouped.values() for s in series]
    if not everything:
        return ""
    x_high = max(a for s in everything for a, _ in s.points)
    y_high = 1.05 * max(v for s in everything for v in (*(b for _, b in s.points), *s.loose.values()))
    note = (
        "‖θ − θ₀‖ / ‖θ₀‖ of each decoder layer after each round, θ₀ the weights the run began with; embedding, final"
        " norm and head apart. Dotted: before the merge of that round."
    )
    return f'<p class="quiet">{note}</p>' + _panels(
        run, grouped,
        lambda method, series, css: curves(
            series, title=method, name=f"layers-{_id(method)}", css=css, x_title="layer →",
            y_title="relative change",
            x_high=x_high, y_high=y_high, percent=True,
        ),
    )  # fmt: skip
