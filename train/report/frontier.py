"""The picture of old skill against new: one point a method and round."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..log import format_percent
from .canvas import Canvas, Placer, Point, Scale, axes, bounds, text_width, ticks
from .charts import Row, _estimate, looks, share


@dataclasses.dataclass(frozen=True)
class Spot:
    """One model in the plane: accuracy in domain (x) and out of domain (y), each with its interval."""

    method: str
    round: int
    coefficient: float | None
    x: tuple[float, float, float]  # accuracy, low, high
    y: tuple[float, float, float]


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
