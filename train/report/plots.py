"""The small pictures of reports and analyses: lines, dots with intervals, a scatter, a map of cells, a terrain.

Two or three of them stand beside each other on a desk, one on a telephone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxmerge.files.inspect.canvas import Canvas, Point, colour, drawing, shorten, text_width, ticks

from .kept import kept
from .labels import Placer, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, NAME = 330.0, 150.0
"""Of a picture, and the most that a name in it may take of that."""
Value = float | None
Hue = str | int
"""A colour by its name, or by its number in the series."""
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Line:
    """A named line, with an interval about each point where there are any."""

    label: str
    points: Sequence[Point]
    intervals: Sequence[Interval] = ()
    loose: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Values of things that have no place on the x axis, by name: each name gets a column of its own behind it."""
    faint: bool = False
    hues: Sequence[Hue] = ()
    """Its own colours: one, or the stripes of a line that is of several things at once."""


def short(value: Value, digits: int = 3) -> str:
    """Write a number with few digits; a dash where there is none.

    Example:
      >>> short(0.012345), short(-1.5), short(1234567.0), short(None)
      ('0.0123', '−1.5', '1.23e+06', '–')
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}g}".replace("-", "−", 1)


def share(value: float) -> str:
    """Write a tick of an axis of shares: `67.5 %`."""
    return f"{100 * value:g} %"


def bounds(values: Iterable[float], *, pad: float = 0.05, least: float = 0.0) -> tuple[float, float]:
    """Find the range of finite values, widened by `pad` of itself on both sides and to at least `least`."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    missing = max(least - (high - low), 0.0) / 2
    low, high = low - missing, high + missing
    widening = pad * (high - low) or 0.5
    return low - widening, high + widening


def headed(height: float, title: str, *, fill: Hue = "ink", note: str = "", width: float = WIDTH) -> Canvas:
    """Open a small picture with its title, and a note at the right where both have room."""
    canvas = Canvas(width, height)
    title = shorten(title, width, bold=True)
    canvas.text((0, 14), title, fill, bold=True)
    if note and text_width(title, bold=True) + text_width(note, 12) + 12 <= width:
        canvas.text((width, 14), note, "soft", size=12, anchor="right")
    return canvas


def stripe(axes: Axes, xs: Sequence[float], ys: Sequence[float], hues: Sequence[Hue], **options: Any) -> None:
    """Draw a line in one colour, or in stripes of several."""
    for i, hue in enumerate(reversed(hues)):
        shown = len(hues) - i
        # The last colour lies below, whole; each above it leaves the ends of its dashes to those below.
        dashes = {} if i == 0 else {"linestyle": (0, (6 * shown, 6 * i)), "dash_capstyle": "butt"}
        axes.plot(xs, ys, **{"color": colour(hue), **options, **dashes})


@kept
@drawing()
def lines(
    drawn: Sequence[Line],
    *,
    name: str,
    title: str,
    x_title: str,
    y_title: str,
    zero: bool = True,
    high: Point | None = None,
    first: float = 0.0,
    rules: Sequence[tuple[float, str]] = (),
    x_marks: Sequence[tuple[float, str]] = (),
    form: Callable[[float], str] = short,
    one: Hue | None = None,
    width: float = WIDTH,
    standalone: bool = False,
) -> str:
    """Draw lines in one frame, each named at its end.

    Args:
      zero: the y axis begins at 0 (or below it, where values do).
      high: ends of both axes, for several pictures on one scale; the values' own by default.
      first: where the x axis begins if `high` says where it ends.
      rules: x values to mark with a dotted rule, with their names.
      x_marks: x values with what is written under them, in place of round numbers.
      one: a colour for all lines and the title, the older lines thinner; each line has its own by default.
    """
    drawn = [dataclasses.replace(line, label=shorten(line.label, NAME, 12)) for line in drawn]
    columns = list(dict.fromkeys(key for line in drawn for key in line.loose))
    xs = [x for line in drawn for x, _ in line.points] + [x for x, _ in rules]
    x_low, x_high = (first, high[0]) if high else (min(xs), max(xs))
    x_high = x_high if x_high > x_low else x_low + 1
    y_low, y_high = (0.0, high[1] or 1.0) if high else _heights(drawn, zero=zero)
    y_ticks = [(v, form(v)) for v in ticks(y_low, y_high, count=4)]
    left = max(44.0, max(text_width(label, 12) for _, label in y_ticks) + 8)
    side = max((text_width(line.label, 12) for line in drawn if line.label), default=0.0) + 10
    # Intervals beside the last point keep off the names.
    right = width - side - 34 * len(columns) - (5 if any(line.intervals for line in drawn) else 0)
    canvas = headed(240, title, fill="ink" if one is None else one, width=width)
    axes = canvas.axes((left, 46, right, 196), (x_low, x_high), (y_low, y_high))
    whole = all(x == round(x) for x in xs)
    round_ones = [
        (v, f"{v:g}") for v in ticks(x_low, x_high, count=5 if width < 500 else 10) if not whole or v == round(v)
    ]
    canvas.grid(axes, x_ticks=x_marks or round_ones, y_ticks=y_ticks)
    canvas.text((0, 33), y_title, "soft", size=12)
    canvas.text((right, 233), x_title, "soft", size=12, anchor="right")
    for value, word in rules:
        axes.axvline(value, color=colour("soft"), linewidth=1, linestyle=(0, (2, 3)))
        at = canvas.pixel(axes, (value, y_low))
        # On the side that has room: a name at the end of a line stands on the other.
        late = at[0] + 5 + text_width(word, 12) > right
        canvas.text((at[0] + (-5 if late else 5), 191), word, "soft", size=12, anchor="right" if late else "left")
    places = {key: right + 34 * (i + 0.75) for i, key in enumerate(columns)}
    for key, place in places.items():
        canvas.line([(place, 46), (place, 196)], "faint", zorder=-1)
        canvas.text((place, 213), key, "soft", size=12, anchor="center")
    strong = [line for line in drawn if not line.faint]
    for i, line in enumerate(drawn):
        age = 1.0 if one is None else (strong.index(line) + 1) / len(strong) if line in strong else 0.0
        # Intervals of several lines at one x stand beside each other.
        aside = 3.5 * (i - (len(drawn) - 1) / 2) * (x_high - x_low) / (right - left)
        _draw_line(axes, line, line.hues or [i if one is None else one], age, aside, places)
    # A line of several colours is named in none of them.
    hues = [line.hues if line.hues else [i if one is None else one] for i, line in enumerate(drawn)]
    named = [(line, own[0] if len(own) == 1 else "ink") for line, own in zip(drawn, hues, strict=True) if line.label]
    ends = [canvas.pixel(axes, line.points[-1])[1] for line, _ in named]
    for (line, hue), place in zip(named, spread(ends, gap=14, low=46, high=196), strict=True):
        canvas.text((width - side + 8, place + 4), line.label, hue, size=12)
    return canvas.svg(name=name, title=f"{title}: {y_title}", description=_told(drawn), standalone=standalone)


def _draw_line(
    axes: Axes, line: Line, hues: Sequence[Hue], age: float, aside: float, places: Mapping[str, float]
) -> None:
    """Draw one line, thinner the older it is (`age` 0 … 1), with its intervals and what has no place on the axis."""
    fill = colour(hues[0])
    # Stripes cover each other: they cannot be seen through.
    options: dict[str, Any] = {"alpha": 0.45 + 0.55 * age if len(hues) == 1 else 1.0, "clip_on": False}
    for (at, _), pair in zip(line.points, line.intervals, strict=False):
        axes.plot([at + aside] * 2, pair, color=fill, alpha=0.3, linewidth=3, clip_on=False)
    track = [(a, min(b, axes.get_ylim()[1])) for a, b in line.points if math.isfinite(b)]
    # Many points are a curve; a few are shown one by one.
    if len(track) == 1 or (len(track) <= 12 and not line.loose and not line.faint):
        options |= {"marker": "o", "markersize": 5.2}
    options |= {"linestyle": (0, (3, 3)) if line.faint else "-", "linewidth": 1.2 + 0.6 * age}
    stripe(axes, [x for x, _ in track], [y for _, y in track], hues, **options)
    options |= {"marker": "o", "markersize": 4 + 2 * age, "markerfacecolor": "none" if line.faint else fill}
    del options["linestyle"], options["linewidth"]
    for key, value in line.loose.items():
        at = [axes.transData.inverted().transform((places[key], 0))[0]]
        axes.plot(at, [value], color=fill, **options)


def _heights(drawn: Sequence[Line], *, zero: bool) -> Point:
    ys = [y for line in drawn for _, y in line.points if math.isfinite(y)]
    ys += [y for line in drawn for pair in line.intervals for y in pair]
    low, high = bounds([*ys, 0.0] if zero else ys, pad=0.08)
    return (0.0 if zero and min(ys, default=0.0) >= 0 else low), high


def _told(drawn: Sequence[Line]) -> str:
    """Say the points; of a long line the ends and the top."""
    said = []
    for line in drawn:
        text = ", ".join(f"{a:g} → {short(b)}" for a, b in line.points)
        if len(line.points) > 12:
            first, last = line.points[0], line.points[-1]
            text = f"from {short(first[1])} to {short(last[1])}, largest {short(max(b for _, b in line.points))}"
        said.append(f"{line.label or 'line'}: {text}" + "".join(f", {k} {short(v)}" for k, v in line.loose.items()))
    return "; ".join(said)


@kept
@drawing()
def dots(
    rows: Sequence[tuple[str, float, Interval | None]],
    *,
    name: str,
    title: str,
    form: Callable[[float], str] = short,
    tick: Callable[[float], str] | None = None,
    low: float = 0.0,
    top: float | None = None,
    rule: float | None = None,
    looks: Sequence[tuple[Hue, str]] = (),
    note: str = "",
    width: float = WIDTH,
    standalone: bool = False,
) -> str:
    """Draw a value a row from `low` on, with its interval where it has one.

    Args:
      form, tick: how a value is written at the right, and under the axis (as at the right by default).
      rule: a value to mark with a dotted rule.
      looks: colour and marker of each row.
    """
    rows = [(shorten(label, NAME), value, pair) for label, value, pair in rows]
    tick = tick or form
    left = max(text_width(label) for label, _, _ in rows) + 14
    right = width - max(text_width(form(value)) for _, value, _ in rows) - 12
    high = top or max(max(v, *(pair or (0.0,))) for _, v, pair in rows) or 1.0
    bottom = 28 + 22 * len(rows)
    canvas = headed(bottom + 24, title, note=note, width=width)
    axes = canvas.axes((left, 28, right, bottom), (low, high), (len(rows) - 0.5, -0.5))
    canvas.grid(axes, x_ticks=[(v, tick(v)) for v in ticks(low, high, count=max(2, round((right - left) / 40)))])
    axes.grid(axis="x", color=colour("faint"), linewidth=1)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0, pad=6)
    if rule is not None:
        axes.axvline(rule, color=colour("soft"), linewidth=1, linestyle=(0, (2, 3)))
    for i, (label, value, pair) in enumerate(rows):
        fill, marker = looks[i] if looks else (0, "o")
        if pair is not None:
            axes.plot(pair, [i, i], color=colour(fill), linewidth=2, alpha=0.5, clip_on=False)
        canvas.mark(axes, (value, i), marker, fill, 4.8)
        canvas.text((0, 28 + 22 * i + 15), label, fill if looks else "ink")
        canvas.text((width, 28 + 22 * i + 15), form(value), fill, anchor="right")
    said = "; ".join(f"{label}: {form(value)}" for label, value, _ in rows)
    return canvas.svg(name=name, title=title, description=said, standalone=standalone)


@drawing()
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
    points = [(a, b, shorten(label, NAME, 12)) for a, b, label in points]
    y_low, y_high = bounds([p[1] for p in points], pad=0.12)
    y_ticks = [(v, short(v)) for v in ticks(y_low, y_high, count=4)]
    left = max(54.0, max(text_width(label, 12) for _, label in y_ticks) + 8)
    canvas = headed(260, title)
    axes = canvas.axes((left, 50, WIDTH - 8, 212), bounds([p[0] for p in points], pad=0.1), (y_low, y_high))
    x_ticks = [(v, short(v)) for v in ticks(*axes.get_xlim(), count=4)]
    canvas.grid(axes, x_ticks=x_ticks, y_ticks=y_ticks)
    canvas.text((0, 33), y_title, "soft", size=12)
    canvas.text((WIDTH, 33), note, size=12, anchor="right")
    canvas.text((WIDTH - 8, 250), x_title, "soft", size=12, anchor="right")
    placer = Placer((left, 50, WIDTH - 8, 212))
    for a, b, _ in points:
        placer.avoid(canvas.pixel(axes, (a, b)), 4)
        axes.plot([a], [b], "o", color=colour(0), markersize=7)
    for a, b, label in points:
        named = label.rsplit(" ", 1)[-1] if len(points) > 12 else label
        place = placer.place(canvas.pixel(axes, (a, b)), named, gap=4, size=12)
        if place.far:
            canvas.line([canvas.pixel(axes, (a, b)), (place.at[0], place.at[1] - 4)], "faint", zorder=-1)
        canvas.text(place.at, named, "soft", size=12, anchor="center")
    said = "; ".join(f"{label}: {short(a)}, {short(b)}" for a, b, label in points)
    return canvas.svg(name=name, title=f"{title}: {y_title} by {x_title}", description=said, standalone=standalone)


@drawing()
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
    rows = [shorten(row, NAME, 12) for row in rows]
    left = max(text_width(row, 12) for row in rows) + 8
    step = (WIDTH - left) / len(columns)
    height = min(30.0, max(18.0, step))
    canvas = headed(46 + height * len(rows) + 6, title)
    every = max(1, math.ceil(1.2 * max(text_width(c, 12) for c in columns) / step))
    for j in range(0, len(columns), every):
        canvas.text((left + step * (j + 0.5), 38), columns[j], "soft", size=12, anchor="center")
    roomy = max(text_width(form(v), 12) for row in values for v in row) < step
    for i, row in enumerate(rows):
        middle = 46 + height * (i + 0.5)
        canvas.text((left - 8, middle + 4), row, "soft", size=12, anchor="right")
        for j, value in enumerate(values[i]):
            strength = 0.0 if value is None or not top else min(abs(value) / top, 1.0)
            fill = 0 if value is None or value >= 0 else 1
            alpha = round(0.04 + (0.41 if roomy else 0.8) * strength, 3)
            place = (left + step * j + 0.5, middle - height / 2 + 0.5, step - 1, height - 1)
            canvas.rect(*place, fill, "" if roomy else f"{row}, {columns[j]}: {form(value)}", alpha=alpha)
            if roomy:
                canvas.text((left + step * (j + 0.5), middle + 4), form(value), size=12, anchor="center")
    said = "; ".join(f"{row}: {', '.join(form(v) for v in line)}" for row, line in zip(rows, values, strict=True))
    return canvas.svg(name=name, title=title, description=said, standalone=standalone)


@drawing()
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
    import numpy as np

    canvas = headed(320, title)
    axes = canvas.axes((40, 30, WIDTH - 6, 276), (u[0], u[-1]), (v[0], v[-1]))
    canvas.grid(
        axes,
        x_ticks=[(x, f"{x:g}") for x in ticks(u[0], u[-1], count=5)],
        y_ticks=[(y, f"{y:g}") for y in ticks(v[0], v[-1], count=5)],
    )
    axes.grid(visible=False)
    heights = np.asarray(losses, float)
    finite = heights[np.isfinite(heights)]
    # Equal counts: one cliff at the edge must not flatten all the rest.
    levels = np.unique(np.quantile(finite, np.linspace(0, 1, 11)))
    if len(levels) > 1:
        shades = [(colour(0), round(float(a), 2)) for a in np.linspace(0.03, 0.43, len(levels) - 1)]
        axes.contourf(u, v, np.where(np.isfinite(heights), heights, finite.max()), levels=levels, colors=shades)
    canvas.text((WIDTH - 6, 312), "along base → tuned (1 = tuned)", "soft", size=12, anchor="right")
    placer = Placer((42, 32, WIDTH - 8, 274))
    for _, a, b in places:
        placer.avoid(canvas.pixel(axes, (a, b)), 6)
    # From the right: where room is short, the last model along the line has the first choice.
    named = [(shorten(label, NAME, 12, bold=True), a, b) for label, a, b in places]
    for label, a, b in sorted(named, key=lambda place: -place[1]):
        canvas.mark(axes, (a, b), "o", "ink" if label == "base" else 1, 5)
        place = placer.place(canvas.pixel(axes, (a, b)), label, gap=6, size=12)
        if place.far:
            canvas.line([canvas.pixel(axes, (a, b)), (place.at[0], place.at[1] - 4)], "soft")
        canvas.text(place.at, label, size=12, bold=True, anchor="center")
    ends = f"from {short(float(finite.min()))} to {short(float(finite.max()))}; "
    said = ends + "; ".join(f"{w}: {a:.2f}, {b:.2f}" for w, a, b in places)
    return canvas.svg(name=name, title=title, description=said, standalone=standalone)
