"""The pictures of a report: what was gained against what was forgotten, by family, by layer, over steps."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..log import format_percent
from .canvas import SHAPES, Canvas, Point, Scale, axes, spread, text_width, ticks

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Look:
    """How one method is drawn, everywhere in a report."""

    fill: str
    stroke: str
    shape: str


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """Give each method a colour and a shape; the base is drawn in ink, sweeps in grey dashes."""
    drawn = [name for name in methods if name not in ("base", "line")]
    result = {name: Look(f"f{i % 7}", f"k{i % 7}", SHAPES[i % len(SHAPES)]) for i, name in enumerate(drawn)}
    return {"base": Look("fb", "kb", "circle"), "line": Look("soft", "rule", "circle"), **result}


def _estimate(row: Row) -> tuple[float, float, float]:
    middle = row["accuracy"]
    low, high = row.get("low"), row.get("high")
    return middle, middle if low is None else low, middle if high is None else high


def share(value: float) -> str:
    """Write a tick of an axis of shares: `67.5 %`."""
    return f"{100 * value:g} %"


def family_dots(rows: Sequence[Row], *, title: str, name: str, methods: Sequence[str], width: float = 330) -> str:
    """Draw one family: a dot and a 95 % interval for each method's last round; the base as a rule."""
    style = looks(methods)
    labels = [r["method"] if r["method"] == "base" else f"{r['method']} · {r['round']}" for r in rows]
    left = max(text_width(label) for label in labels) + 8
    step, top = 22, 30
    canvas = Canvas(width, top + step * len(rows) + 26)
    x = Scale(0.0, 1.0, left, width - 48)
    bottom = top + step * len(rows)
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        canvas.line((x(value), top - 4), (x(value), bottom), "grid")
        if value in (0.0, 0.5, 1.0):
            canvas.text((x(value), bottom + 16), share(value), "soft small", anchor="middle")
    canvas.text((0, 15), title, "strong")
    n = rows[0].get("n")
    if n is not None and all(r.get("n") == n for r in rows):
        canvas.text((width, 15), f"n = {n:,}", "soft small", anchor="end")
    for row in rows:
        if row["method"] == "base":
            canvas.line((x(row["accuracy"]), top - 4), (x(row["accuracy"]), bottom), "rule", 'stroke-dasharray="2 3"')
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        middle, low, high = _estimate(row)
        look, y = style[row["method"]], top + step * i + step / 2
        canvas.text((0, y + 4), label, look.fill)
        canvas.line((x(low), y), (x(high), y), look.stroke, 'stroke-width="2" stroke-opacity="0.5"')
        canvas.marker((x(middle), y), look.shape, look.fill, radius=5)
        canvas.text((width, y + 4), f"{100 * middle:.1f}", f"{look.fill}", anchor="end")
    said = "; ".join(f"{label}: {format_percent(r['accuracy'])}" for label, r in zip(labels, rows, strict=True))
    return canvas.svg(name=name, title=f"Accuracy on {title}", description=said)


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a small picture, named at its end."""

    label: str
    points: Sequence[Point]
    loose: Mapping[str, float] = dataclasses.field(default_factory=dict)  # values beside the axis, by name
    faint: bool = False


def curves(
    series: Sequence[Series], *, title: str, name: str, css: str, x_title: str, y_title: str, y_high: float,
    x_high: float, percent: bool = False, width: float = 330, height: float = 230,
) -> str:  # fmt: skip
    """Draw lines that share a colour, older ones thinner, each named at its end.

    `loose` values of the series (embedding, final norm, head) stand as dots in columns of their own behind
    the last x value.
    """
    columns = list(dict.fromkeys(key for s in series for key in s.loose))
    side = max((text_width(s.label, size=12) for s in series), default=0) + 10
    canvas = Canvas(width, height)
    right = width - side - 34 * len(columns)
    x = Scale(0.0, x_high or 1.0, 44, right)
    y = Scale(0.0, y_high or 1.0, height - 42, 52)
    marks = [(v, f"{v:g}") for v in ticks(0.0, x_high or 1.0, count=4) if v == round(v)]
    canvas.text((0, 15), title, f"strong {css.replace('k', 'f')}")
    axes(
        canvas, x, y, x_ticks=marks, y_count=4,
        y_format=share if percent else "{:g}".format,
    )  # fmt: skip
    canvas.text((2, y.end - 14), y_title, "soft small")
    canvas.text((x.end, y.start + 35), x_title, "soft small", anchor="end")
    places = {key: right + 34 * (i + 0.75) for i, key in enumerate(columns)}
    for key, place in places.items():
        canvas.line((place, y.start), (place, y.end), "grid")
        canvas.text((place, y.start + 17), key, "soft small", anchor="middle")
    strong = [s for s in series if not s.faint]
    for s in series:
        track = [(x(a), y(min(b, y.low + (y.high - y.low) * 1.02))) for a, b in s.points if math.isfinite(b)]
        age = (strong.index(s) + 1) / len(strong) if s in strong else 0.0
        weight = f'stroke-width="{1.2 + age:.1f}" stroke-opacity="{0.45 + 0.55 * age:.2f}" stroke-linejoin="round"'
        canvas.path(track, css, weight + (' stroke-dasharray="3 3"' if s.faint else ""))
        if len(track) == 1:
            canvas.circle(track[0], 3, css.replace("k", "f"))
        for key, value in s.loose.items():
            canvas.circle((places[key], y(value)), 2.2 + age, css.replace("k", "f") if not s.faint else f"{css}")
    named = [s for s in series if s.label]
    ends = [y(s.points[-1][1]) for s in named]
    for s, place in zip(named, spread(ends, gap=14, low=y.end, high=y.start), strict=True):
        canvas.text((width - side + 8, place + 4), s.label, f"{css.replace('k', 'f')} small")
    said = "; ".join(
        f"{s.label or 'line'}: from {s.points[0][1]:.4g} to {s.points[-1][1]:.4g},"
        f" largest {max(b for _, b in s.points):.4g}" + "".join(f", {k} {v:.4g}" for k, v in s.loose.items())
        for s in series if s.points
    )  # fmt: skip
    return canvas.svg(name=name, title=f"{title}: {y_title}", description=said)


_LAYER = re.compile(r"(?:^|/)layers/(\d+)$")
_LOOSE = {"embed_tokens": "emb", "norm": "norm", "lm_head": "head"}


def layer_series(change: Mapping[str, float], label: str, *, faint: bool = False) -> Series:
    """Split ‖Δθ‖/‖θ‖ by name into the numbered layers, in order, and what lies outside them."""
    layers: list[Point] = []
    loose: dict[str, float] = {}
    for path, value in change.items():
        found = _LAYER.search(path)
        last = path.rsplit("/", 1)[-1]
        if found:
            layers.append((float(found.group(1)), value))
        else:
            loose[_LOOSE.get(last, last[:6])] = value
    order = list(_LOOSE.values())
    loose = dict(sorted(loose.items(), key=lambda kv: order.index(kv[0]) if kv[0] in order else len(order)))
    return Series(label, sorted(layers), loose, faint)


def interval_bar(low: float, middle: float, high: float, *, reach: float, name: str, said: str) -> str:
    """Draw one difference with its interval around zero, small enough for a table cell."""
    canvas = Canvas(150, 18)
    x = Scale(-reach, reach, 3, 147)
    canvas.line((x(0), 1), (x(0), 17), "rule")
    css = "b" if low <= 0 <= high else "2" if low > 0 else "1"
    canvas.line((x(low), 9), (x(high), 9), f"k{css}", 'stroke-width="2.5" stroke-opacity="0.6"')
    canvas.circle((x(middle), 9), 4, f"f{css}")
    return canvas.svg(name=name, title="Difference", description=said)


def stacked_bar(parts: Sequence[tuple[str, float]], *, total: float, name: str, said: str) -> str:
    """Draw shares of a whole as one bar: (class, amount) from the left."""
    canvas = Canvas(180, 14)
    start = 0.0
    for css, amount in parts:
        size = 180 * amount / total if total else 0.0
        canvas.rect(start, 0, size, 14, css)
        start += size
    return canvas.svg(name=name, title="Shares", description=said)
