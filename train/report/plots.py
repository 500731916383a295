"""Four small pictures that the analysis is drawn with: lines, a scatter, a map of cells, dots with intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from .canvas import Canvas, Placer, Point, Scale, axes, bounds, spread, text_width, ticks

WIDTH = 330.0
"""Of a picture: two or three stand beside each other on a desk, one on a telephone."""
Value = float | None


@dataclasses.dataclass(frozen=True)
class Line:
    """A named line, with an interval about each point where there are any."""

    label: str
    points: Sequence[Point]
    intervals: Sequence[tuple[float, float]] = ()


def short(value: Value, digits: int = 3) -> str:
    """Write a number with few digits; a dash where there is none.

    Example:
      >>> short(0.012345), short(-1.5), short(1234567.0), short(None)
      ('0.0123', '−1.5', '1.23e+06', '–')
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}g}".replace("-", "−", 1)


def lines(
    drawn: Sequence[Line],
    *,
    name: str,
    title: str,
    x_title: str,
    y_title: str,
    zero: bool = True,
    rules: Sequence[tuple[float, str]] = (),
    x_marks: Sequence[tuple[float, str]] = (),
    form: Callable[[float], str] = short,
    standalone: bool = False,
) -> str:
    """Draw lines in one frame, each in its own colour and named at its end.

    Args:
      zero: the y axis begins at 0 (or below it, where values do).
      rules: x values to mark with a dotted rule, with their names.
      x_marks: x values with what is written under them, in place of round numbers.
    """
    xs = [x for line in drawn for x, _ in line.points] + [x for x, _ in rules]
    ys = [y for line in drawn for _, y in line.points if math.isfinite(y)]
    ys += [y for line in drawn for pair in line.intervals for y in pair]
    y_low, y_high = bounds([*ys, 0.0] if zero else ys, pad=0.08)
    if zero and min(ys, default=0.0) >= 0:
        y_low = 0.0
    side = max(text_width(line.label, size=12) for line in drawn) + 8
    canvas = Canvas(WIDTH, 240)
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, 50, WIDTH - side - 9)
    y = Scale(y_low, y_high, 196, 46)
    canvas.text((0, 14), title, "strong")
    whole = all(value == round(value) for value in xs)
    round_ones = [(v, f"{v:g}") for v in ticks(x.low, x.high, count=5) if not whole or v == round(v)]
    axes(canvas, x, y, x_ticks=x_marks or round_ones, y_count=4, y_format=form)
    canvas.text((0, 33), y_title, "soft small")
    canvas.text((x.end, 231), x_title, "soft small", anchor="end")
    for value, word in rules:
        canvas.line((x(value), y.start), (x(value), y.end), "rule", 'stroke-dasharray="2 3"')
        canvas.text((x(value) + 5, y.start - 5), word, "soft small")
    for i, line in enumerate(drawn):
        css = f"k{i % 7}"
        aside = 3.5 * (i - (len(drawn) - 1) / 2)  # intervals of several lines at one x stand beside each other
        for (at, _), (low, high) in zip(line.points, line.intervals, strict=False):
            canvas.line((x(at) + aside, y(low)), (x(at) + aside, y(high)), css, 'stroke-width="3" stroke-opacity="0.3"')
        canvas.path([(x(a), y(b)) for a, b in line.points], css, 'stroke-width="1.8" stroke-linejoin="round"')
        if len(line.points) <= 12:
            for a, b in line.points:
                canvas.circle((x(a), y(b)), 2.6, f"f{i % 7}")
    places = spread([y(line.points[-1][1]) for line in drawn], gap=14, low=y.end, high=y.start)
    for i, (line, place) in enumerate(zip(drawn, places, strict=True)):
        canvas.text((WIDTH - side, place + 4), line.label, f"f{i % 7} small")
    said = "; ".join(f"{s.label}: " + ", ".join(f"{a:g} → {short(b)}" for a, b in s.points[:40]) for s in drawn)
    return canvas.svg(name=name, title=f"{title}: {y_title}", description=said, standalone=standalone)


def scatter(
    points: Sequence[tuple[float, float, str]],
    *,
    name: str,
    title: str,
    x_title: str,
    y_title: str,
    note: str = "",
    standalone: bool = False,
) -> str:
    """Draw named points, such as layers by importance (x) and change (y).

    Where there are more than a dozen, each is named by its last word alone: `layer 17` by `17`.
    """
    canvas = Canvas(WIDTH, 260)
    y = Scale(*bounds([p[1] for p in points], pad=0.12), 212, 50)
    left = max(text_width(short(v), size=12) for v in ticks(y.low, y.high, count=4)) + 7
    x = Scale(*bounds([p[0] for p in points], pad=0.1), max(54, left), WIDTH - 8)
    many = len(points) > 12
    canvas.text((0, 14), title, "strong")
    canvas.text((WIDTH, 33), note, "small", anchor="end")
    canvas.text((0, 33), y_title, "soft small")
    canvas.text((x.end, 250), x_title, "soft small", anchor="end")
    axes(canvas, x, y, x_ticks=[(v, short(v)) for v in ticks(x.low, x.high, count=3)], y_count=4, y_format=short)
    placer = Placer((x.start, y.end, x.end, y.start))
    for a, b, _ in points:
        placer.avoid((x(a), y(b)), 4)
    for a, b, label in points:
        canvas.circle((x(a), y(b)), 4, "f0")
        named = label.rsplit(" ", 1)[-1] if many else label
        place, _ = placer.place((x(a), y(b)), named, gap=4, size=12)
        canvas.text(place, named, "soft small", anchor="middle")
    said = "; ".join(f"{label}: {short(a)}, {short(b)}" for a, b, label in points)
    return canvas.svg(name=name, title=f"{title}: {y_title} by {x_title}", description=said, standalone=standalone)


def cells(
    values: Sequence[Sequence[Value]],
    *,
    name: str,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    top: float,
    form: Callable[[Value], str] = short,
    standalone: bool = False,
) -> str:
    """Draw a map of cells, darker where the value's size is nearer `top`; numbers inside where there is room."""
    left = max(text_width(row, size=12) for row in rows) + 8
    step = (WIDTH - left) / len(columns)
    height = min(30.0, max(18.0, step))
    canvas = Canvas(WIDTH, 46 + height * len(rows) + 6)
    canvas.text((0, 14), title, "strong")
    every = max(1, math.ceil(1.4 * max(text_width(c, size=12) for c in columns) / step))
    for j, column in enumerate(columns):
        if j % every == 0:
            canvas.text((left + step * (j + 0.5), 38), column, "soft small", anchor="middle")
    roomy = max(text_width(form(v), size=12) for row in values for v in row) < step
    for i, row in enumerate(rows):
        middle = 46 + height * (i + 0.5)
        canvas.text((left - 8, middle + 4), row, "soft small", anchor="end")
        for j, value in enumerate(values[i]):
            strength = 0.0 if value is None or not top else min(abs(value) / top, 1.0)
            css = "f0" if value is None or value >= 0 else "f1"
            fill = f'fill-opacity="{0.04 + (0.41 if roomy else 0.8) * strength:.3f}"'
            canvas.rect(left + step * j + 0.5, middle - height / 2 + 0.5, step - 1, height - 1, css, fill)
            if roomy:
                canvas.text((left + step * (j + 0.5), middle + 4), form(value), "small", anchor="middle")
    said = "; ".join(f"{row}: {', '.join(form(v) for v in line)}" for row, line in zip(rows, values, strict=True))
    return canvas.svg(name=name, title=title, description=said, standalone=standalone)


def dots(
    rows: Sequence[tuple[str, float, tuple[float, float] | None]],
    *,
    name: str,
    title: str,
    form: Callable[[float], str] = short,
    top: float | None = None,
    standalone: bool = False,
) -> str:
    """Draw a value a row from 0 on, with its interval where it has one."""
    left = max(text_width(label) for label, _, _ in rows) + 14
    right = max(text_width(form(value)) for _, value, _ in rows) + 8
    high = top or max(max(v, *(pair or (0.0,))) for _, v, pair in rows) or 1.0
    canvas = Canvas(WIDTH, 26 + 22 * len(rows) + 24)
    x, bottom = Scale(0.0, high, left, WIDTH - right), 26 + 22 * len(rows)
    canvas.text((0, 14), title, "strong")
    for value in ticks(0.0, high, count=3):
        canvas.line((x(value), 24), (x(value), bottom), "grid")
        canvas.text((x(value), bottom + 16), form(value), "soft small", anchor="middle")
    for i, (label, value, pair) in enumerate(rows):
        y = 26 + 22 * i + 11
        canvas.text((0, y + 4), label)
        if pair is not None:
            canvas.line((x(pair[0]), y), (x(pair[1]), y), "k0", 'stroke-width="2" stroke-opacity="0.5"')
        canvas.circle((x(value), y), 4.5, "f0")
        canvas.text((WIDTH, y + 4), form(value), "f0", anchor="end")
    said = "; ".join(f"{label}: {form(value)}" for label, value, _ in rows)
    return canvas.svg(name=name, title=title, description=said, standalone=standalone)


def terrain(
    u: Sequence[float],
    v: Sequence[float],
    losses: Sequence[Sequence[float]],
    places: Sequence[tuple[str, float, float]],
    *,
    name: str,
    title: str,
    standalone: bool = False,
) -> str:
    """Draw the loss over a plane: darker is higher, in ten steps of equal count, with the models in place.

    Args:
      u, v: values of the grid; losses[i][j] is at (u[j], v[i]).
    """
    canvas = Canvas(WIDTH, 320)
    x = Scale(u[0], u[-1], 40, WIDTH - 6)
    y = Scale(v[0], v[-1], 276, 30)
    canvas.text((0, 14), title, "strong")
    flat = sorted(value for row in losses for value in row if math.isfinite(value))
    wide, high = (x.end - x.start) / (len(u) - 1), (y.start - y.end) / (len(v) - 1)
    for i, row in enumerate(losses):
        for j, value in enumerate(row):
            # Equal counts: one cliff at the edge must not flatten all the rest.
            share = sum(f < value for f in flat) / max(len(flat) - 1, 1) if math.isfinite(value) else 1.0
            left, right = max(x(u[j]) - wide / 2, x.start), min(x(u[j]) + wide / 2, x.end)
            up, down = max(y(v[i]) - high / 2, y.end), min(y(v[i]) + high / 2, y.start)
            canvas.rect(left, up, right - left, down - up, "f0", f'fill-opacity="{0.03 + 0.4 * round(share, 1):.2f}"')
    for value in ticks(x.low, x.high, count=5):
        canvas.text((x(value), y.start + 16), f"{value:g}", "soft small", anchor="middle")
    for value in ticks(y.low, y.high, count=5):
        canvas.text((x.start - 6, y(value) + 4), f"{value:g}", "soft small", anchor="end")
    canvas.text((x.end, y.start + 34), "along base → tuned (1 = tuned)", "soft small", anchor="end")
    placer = Placer((x.start + 2, y.end + 2, x.end - 2, y.start - 2))
    for _, a, b in places:
        placer.avoid((x(a), y(b)), 6)
    # From the right: where room is short, the last model along the line has the first choice.
    for label, a, b in sorted(places, key=lambda place: -place[1]):
        canvas.marker((x(a), y(b)), "circle", "fb" if label == "base" else "f1", radius=5)
        place, far = placer.place((x(a), y(b)), label, gap=6, size=12)
        if far:
            canvas.line((x(a), y(b)), (place[0], place[1] - 4), "rule")
        canvas.text(place, label, "small strong", anchor="middle")
    said = f"from {short(flat[0])} to {short(flat[-1])}; " + "; ".join(f"{w}: {a:.2f}, {b:.2f}" for w, a, b in places)
    return canvas.svg(name=name, title=title, description=said, standalone=standalone)
