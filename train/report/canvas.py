"""Scalable pictures drawn by hand: scales, axes, markers, labels that keep out of each other's way.

A picture is text. Colours are classes, so that a page restyles the same picture for light, dark and
paper; a picture that leaves the page (`standalone`) carries the light rules inside. Every picture has a
title and a description for those who cannot see it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from .html import escape

Point = tuple[float, float]

# Series colours after Okabe and Ito (2008), darkened for white and lightened for black until each has
# a contrast of at least 4.5 as text.
LIGHT = {
    "ink": "#1b1f24", "soft": "#57606a", "faint": "#d5dae0", "paper": "#ffffff", "tint": "#edf5ef",
    "series": ("#0b6bb0", "#c24a00", "#007a59", "#a8408a", "#8a6400", "#5b55c9", "#4b6b00"),
}  # fmt: skip
DARK = {
    "ink": "#e6e9ed", "soft": "#9aa4af", "faint": "#333b45", "paper": "#14181d", "tint": "#18241f",
    "series": ("#58b4f5", "#ff9255", "#3fcf9f", "#e79bd0", "#e3b341", "#a9a5ff", "#a9cf52"),
}  # fmt: skip
SHAPES = (
    "circle",
    "square",
    "diamond",
    "triangle",
    "hexagon",
)  # coprime with the colours: 35 different pairs
_POLYGONS = {  # corners, turn in steps between corners, radius that gives a circle's area
    "square": (4, 0.5, 1.25),
    "diamond": (4, 0.0, 1.3),
    "triangle": (3, 0.0, 1.65),
    "hexagon": (6, 0.0, 1.12),
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
CHARACTER = 0.57  # width of an average character, in font sizes


def stylesheet(colours: dict, *, prefix: str = "svg ") -> str:
    """Write the rules of every class that the pictures use, in one set of colours."""
    ink, soft, faint, paper = (colours[name] for name in ("ink", "soft", "faint", "paper"))
    rules = [
        f"text{{font-family:{FONT};font-size:13px;fill:{ink}}}",
        f".soft{{fill:{soft}}}",
        ".small{font-size:12px}",
        ".strong{font-weight:600}",
        f".grid{{stroke:{faint};stroke-width:1;fill:none}}",
        f".rule{{stroke:{soft};stroke-width:1;fill:none}}",
        f".sweep{{stroke:{soft};stroke-width:1.5;fill:none;stroke-dasharray:5 4}}",
        f".dot{{fill:{paper};stroke:{soft};stroke-width:1.5}}",
        f".tint{{fill:{colours['tint']}}}",
        f".halo{{stroke:{paper};stroke-width:1.5}}",
        f".on{{fill:{paper};font-size:10px;font-weight:700}}",
        f".fb{{fill:{ink}}}",
        f".kb{{stroke:{ink};fill:none}}",
        f".fx{{fill:{faint}}}",
    ]
    for i, colour in enumerate(colours["series"]):
        rules += [f".f{i}{{fill:{colour}}}", f".k{i}{{stroke:{colour};fill:none}}"]
    return "\n".join(prefix + rule for rule in rules)


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".") if "." in f"{value:.1f}" else f"{value:.1f}"


@dataclasses.dataclass
class Canvas:
    """A picture under construction: shapes are drawn in the order in which they are added."""

    width: float
    height: float
    parts: list[str] = dataclasses.field(default_factory=list)

    def line(self, a: Point, b: Point, css: str, extra: str = "") -> None:
        self.parts.append(
            f'<line x1="{_n(a[0])}" y1="{_n(a[1])}" x2="{_n(b[0])}" y2="{_n(b[1])}" class="{css}" {extra}/>'
        )

    def path(self, points: Sequence[Point], css: str, extra: str = "", *, closed: bool = False) -> None:
        if not points:
            return
        steps = "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
        self.parts.append(f'<path d="M{steps}{"Z" if closed else ""}" class="{css}" {extra}/>')

    def rect(self, x: float, y: float, width: float, height: float, css: str, extra: str = "") -> None:
        size = f'width="{_n(max(width, 0.0))}" height="{_n(max(height, 0.0))}"'
        self.parts.append(f'<rect x="{_n(x)}" y="{_n(y)}" {size} class="{css}" {extra}/>')

    def circle(self, at: Point, radius: float, css: str) -> None:
        self.parts.append(f'<circle cx="{_n(at[0])}" cy="{_n(at[1])}" r="{_n(radius)}" class="{css}"/>')

    def text(self, at: Point, text: str, css: str = "", *, anchor: str = "start", extra: str = "") -> None:
        place = f'x="{_n(at[0])}" y="{_n(at[1])}" text-anchor="{anchor}" {extra}'
        self.parts.append(f'<text {place} class="{css}">{escape(text)}</text>')

    def marker(self, at: Point, shape: str, css: str, *, radius: float = 8.0, text: str = "") -> None:
        """Draw a method's mark, with the number of the round inside."""
        x, y = at
        if shape == "circle":
            self.circle(at, radius, f"{css} halo")
        else:
            corners, turn, scale = _POLYGONS[shape]
            angles = [2 * math.pi * (i + turn) / corners - math.pi / 2 for i in range(corners)]
            ring = [(x + radius * scale * math.cos(angle), y + radius * scale * math.sin(angle)) for angle in angles]
            self.path(ring, f"{css} halo", closed=True)
        if text:
            drop = 4.4 if shape == "triangle" else 3.6
            self.text((x, y + drop), text, "on", anchor="middle")

    def svg(self, *, name: str, title: str, description: str, standalone: bool = False) -> str:
        """Close the picture.

        Args:
          name: prefix of the ids inside, unique on its page.
          title: what the picture is.
          description: what it shows, in words, for those who do not see it.
          standalone: a file of its own, with its colours inside, on white.
        """
        width, height = _n(self.width), _n(self.height)
        space = 'xmlns="http://www.w3.org/2000/svg" ' if standalone else ""  # HTML knows an <svg> without it
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        head = f'<svg {space}{size} role="img" aria-labelledby="{name}-t {name}-d">'
        words = f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>'
        if standalone:
            words += f"<style>{stylesheet(LIGHT, prefix='')}</style>"
            words += f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
        return "\n".join([head + words, *self.parts, "</svg>"])


@dataclasses.dataclass(frozen=True)
class Scale:
    """A straight map from values `low … high` to pixels `start … end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, *, count: int = 6) -> list[float]:
    """Choose about `count` round numbers in `low … high`: steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    rough = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def bounds(values: Iterable[float], *, pad: float = 0.05, least: float = 0.0) -> tuple[float, float]:
    """Find the range of finite values, widened by `pad` of itself on both sides and to at least `least`."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    missing = max(least - (high - low), 0.0) / 2
    low, high = low - missing, high + missing
    widening = pad * (high - low) or 0.5
    return low - widening, high + widening


def axes(
    canvas: Canvas,
    x: Scale,
    y: Scale,
    *,
    x_title: str = "",
    y_title: str = "",
    x_ticks: Sequence[tuple[float, str]] = (),
    y_format: Callable[[float], str] = "{:g}".format,
    y_count: int = 6,
) -> None:
    """Draw a grid of hairlines, numbers outside; the name of the y axis stands above it, upright."""
    for value in ticks(y.low, y.high, count=y_count):
        canvas.line((x.start, y(value)), (x.end, y(value)), "grid")
        canvas.text((x.start - 7, y(value) + 4), y_format(value), "soft small", anchor="end")
    for value, label in x_ticks:
        canvas.line((x(value), y.start), (x(value), y.start + 4), "rule")
        canvas.text((x(value), y.start + 17), label, "soft small", anchor="middle")
    canvas.line((x.start, y.start), (x.end, y.start), "rule")
    if y_title:
        canvas.text((2, y.end - 12), y_title, "soft")
    if x_title:
        canvas.text((x.end, y.start + 35), x_title, "soft", anchor="end")


# --- labels ------------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]  # left, top, right, bottom


def text_width(text: str, *, size: float = 13.0) -> float:
    """Estimate the width of a text, in pixels."""
    return CHARACTER * size * len(text) + 2


def _overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _length_inside(a: Point, b: Point, box: Box) -> float:
    """Measure how much of the segment `a b` lies in `box` (Liang and Barsky 1984)."""
    dx, dy, first, last = b[0] - a[0], b[1] - a[1], 0.0, 1.0
    for step, room in ((-dx, a[0] - box[0]), (dx, box[2] - a[0]), (-dy, a[1] - box[1]), (dy, box[3] - a[1])):
        if step == 0:
            if room < 0:
                return 0.0
        elif step < 0:
            first = max(first, room / step)
        else:
            last = min(last, room / step)
    return max(last - first, 0.0) * math.hypot(dx, dy)


@dataclasses.dataclass
class Placer:
    """Finds free places for labels: call `place` for the most important first."""

    frame: Box
    boxes: list[Box] = dataclasses.field(default_factory=list)
    segments: list[tuple[Point, Point, float]] = dataclasses.field(default_factory=list)  # a, b, weight

    def avoid(self, at: Point, radius: float) -> None:
        """Keep labels off a marker."""
        self.boxes.append((at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius))

    def avoid_line(self, points: Sequence[Point], *, weight: float = 1.0) -> None:
        """Keep labels off a line, as far as possible."""
        self.segments += [(a, b, weight) for a, b in itertools.pairwise(points)]

    def place(self, at: Point, text: str, *, gap: float, size: float = 13.0) -> tuple[Point, bool]:
        """Choose where the middle of a label's baseline goes, near `at`; whether it needs a leader."""
        width, height = text_width(text, size=size), size + 2
        best: tuple[float, Point, Box, bool] | None = None
        for ring, far in enumerate((3.0, 9.0, 17.0, 28.0, 42.0, 60.0)):
            for turn in range(16):
                angle = 2 * math.pi * turn / 16
                dx, dy = math.cos(angle), math.sin(angle)
                x = at[0] + dx * (gap + far) + width / 2 * max(-1.0, min(1.0, 1.6 * dx))
                y = at[1] + dy * (gap + far) + height / 2 * max(-1.0, min(1.0, 1.6 * dy))
                box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
                outside = width * height - _overlap(box, self.frame)
                cost = 4 * outside + 3 * sum(_overlap(box, other) for other in self.boxes)
                cost += sum(weight * _length_inside(a, b, box) for a, b, weight in self.segments)
                cost += 0.6 * far + (0.5 if turn % 4 else 0.0)
                if best is None or cost < best[0]:
                    best = (cost, (x, y + 0.36 * size), box, ring > 2)
        assert best is not None
        self.boxes.append(best[2])
        return best[1], best[3]


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Move positions apart to at least `gap`, each as near to what it wanted as the others allow."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [min(max(wanted[i], low), high) for i in order]
    for _ in range(50):  # relaxation; a handful of labels settles in a few sweeps
        for i in range(1, len(placed)):
            push = gap - (placed[i] - placed[i - 1])
            if push > 0:
                placed[i] += push / 2
                placed[i - 1] -= push / 2
        shift = max(low - placed[0], 0.0) if placed else 0.0
        placed = [min(p + shift, high) if i == len(placed) - 1 else p + shift for i, p in enumerate(placed)]
    result = [0.0] * len(wanted)
    for place, i in zip(placed, order, strict=True):
        result[i] = place
    return result
