"""The pictures of a report: what was gained against what was forgotten, by family, by layer, over steps."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .figures import SHAPES, Canvas, Placer, Point, Scale, axes, bounds, spread, text_width, ticks
from .log import format_percent

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


@dataclasses.dataclass(frozen=True)
class Spot:
    """One model in the plane: accuracy in domain (x) and out of domain (y), each with its interval."""

    method: str
    round: int
    coefficient: float | None
    x: tuple[float, float, float]  # accuracy, low, high
    y: tuple[float, float, float]


def _estimate(row: Row) -> tuple[float, float, float]:
    middle = row["accuracy"]
    low, high = row.get("low"), row.get("high")
    return middle, middle if low is None else low, middle if high is None else high


def spots(pooled: Sequence[Row]) -> list[Spot]:
    """Pair the in-domain and out-of-domain rows of each model; a model that lacks one is left out."""
    cells: dict[tuple[str, int, float | None], dict[str, Row]] = {}
    for row in pooled:
        key = (row["method"], row["round"], row.get("coefficient"))
        if row.get("accuracy") is not None:
            cells.setdefault(key, {})[row["domain"]] = row
    return [
        Spot(key[0], key[1], key[2], _estimate(domains["id"]), _estimate(domains["ood"]))
        for key, domains in cells.items()
        if "id" in domains and "ood" in domains
    ]


_PARTS = {0.25: "¼", 0.5: "½", 0.75: "¾", 1.25: "1¼", 1.5: "1½", 1.75: "1¾"}


def share(value: float) -> str:
    """Write a tick of an axis of shares: `67.5 %`."""
    return f"{100 * value:g} %"


def frontier(pooled: Sequence[Row], *, width: float, height: float, name: str, standalone: bool = False) -> str:
    """Draw accuracy in domain (x) against out of domain (y).

    Each method is a line from the base through its rounds, numbered; crosses are 95 % intervals; rows with
    a coefficient λ, or of a method named `line`, form the dashed curve base + λ·change. The tinted quarter is
    better than the base in both. Returns "" where no model has both accuracies.
    """
    points = spots(pooled)
    if not points:
        return ""
    style = looks(list(dict.fromkeys(p.method for p in points)))
    base = next((p for p in points if p.method == "base"), None)
    narrow = width < 500
    canvas = Canvas(width, height)
    x_low, x_high = bounds([v for p in points for v in p.x], pad=0.04, least=0.08)
    y_low, y_high = bounds([v for p in points for v in p.y], pad=0.04, least=0.08)
    y = Scale(max(y_low, -0.02), min(y_high, 1.02), height - 46, 34)
    left = max(text_width(share(v)) for v in ticks(y.low, y.high, count=6))
    x = Scale(max(x_low, -0.02), min(x_high, 1.02), max(46, left + 6), width - 10)
    if base:
        canvas.rect(x(base.x[0]), y.end, x.end - x(base.x[0]), y(base.y[0]) - y.end, "tint")
    axes(
        canvas, x, y, x_title="in domain →" if narrow else "accuracy in domain →",
        y_title="↑ out of domain" if narrow else "↑ accuracy out of domain",
        x_ticks=[(v, share(v)) for v in ticks(x.low, x.high, count=4 if narrow else 8)],
        y_format=share, y_count=6,
    )  # fmt: skip
    placer = Placer((x.start + 2, y.end + 2, x.end, y.start - 3))

    def at(p: Spot) -> Point:
        return x(p.x[0]), y(p.y[0])

    sweeps: dict[tuple[str, int], list[Spot]] = {}
    lines: dict[str, list[Spot]] = {}
    for p in points:
        if p.coefficient is not None or p.method == "line":
            sweeps.setdefault((p.method, p.round), []).append(p)
        elif p.method != "base":
            lines.setdefault(p.method, []).append(p)
    radius = 6.5 if narrow else 8.0

    for p in points:
        if p.coefficient is None and p.method != "line":
            stroke = f"{style[p.method].stroke}"
            for a, b in (
                ((x(p.x[1]), y(p.y[0])), (x(p.x[2]), y(p.y[0]))),
                ((x(p.x[0]), y(p.y[1])), (x(p.x[0]), y(p.y[2]))),
            ):
                canvas.line(a, b, stroke, 'stroke-width="1.2" stroke-opacity="0.38"')
                placer.avoid_line([a, b], weight=0.5)
    for sweep in sweeps.values():
        sweep.sort(key=lambda p: p.coefficient or 0.0)
        has_zero = any(p.coefficient == 0 for p in sweep)
        curve = ([at(base)] if base and not has_zero else []) + [at(p) for p in sweep]
        canvas.path(curve, "sweep")
        placer.avoid_line(curve)
        for p in sweep:
            canvas.circle(at(p), 3.2, "dot")
            placer.avoid(at(p), 3.2)
    for method, rounds in lines.items():
        rounds.sort(key=lambda p: p.round)
        track = ([at(base)] if base else []) + [at(p) for p in rounds]
        canvas.path(track, style[method].stroke, 'stroke-width="2" stroke-linejoin="round"')
        placer.avoid_line(track, weight=1.5)
    marks = [(p, str(p.round)) for rounds in lines.values() for p in rounds]
    for p, label in sorted(marks, key=lambda mark: mark[0].round):
        canvas.marker(at(p), style[p.method].shape, style[p.method].fill, radius=radius, text=label)
        placer.avoid(at(p), radius + 1)
    if base:
        canvas.marker(at(base), "circle", "fb", radius=radius)
        placer.avoid(at(base), radius + 1)

    wanted: list[tuple[Point, str, str, float, float]] = [(at(base), "base", "fb strong", radius, 13)] if base else []
    wanted += [(at(r[-1]), method, f"{style[method].fill} strong", radius, 13) for method, r in lines.items()]
    for (method, _), sweep in sweeps.items():
        for i, p in enumerate(sweep):
            if p.coefficient is not None and p.coefficient != 0:
                text = _PARTS.get(p.coefficient, f"{p.coefficient:g}")
                # The first says what the numbers are.
                text = f"λ = {text}" if i == 0 else text
                wanted.append((at(p), text, "soft small", 3.2, 12))
            elif p.coefficient is None and p is sweep[-1]:
                wanted.append((at(p), method, "soft small", 3.2, 12))
    for point, text, css, gap, size in wanted:
        place, far = placer.place(point, text, gap=gap, size=size)
        if far:
            canvas.line(point, (place[0], place[1] - 4), "rule", 'stroke-opacity="0.6"')
            # The leader ends under the text: paper behind the letters keeps them legible.
        canvas.text(place, text, css, anchor="middle", extra='paint-order="stroke"')
    said = "; ".join(
        f"{p.method}{'' if p.coefficient is None else f' λ {p.coefficient:g}'} round {p.round}:"
        f" {format_percent(p.x[0])} in domain, {format_percent(p.y[0])} out of domain"
        for p in points
    )
    title = "Accuracy in domain against accuracy out of domain"
    return canvas.svg(name=name, title=title, description=said, standalone=standalone)


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
