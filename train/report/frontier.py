"""The picture of old skill against new: one point a method and round."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxmerge.files.inspect.canvas import Canvas, Point, colour, drawing, shorten, text_width, ticks

from ..log import format_percent
from ..runtime.jsonl import Row
from .kept import kept
from .labels import Placer
from .plots import bounds, share, stripe
from .style import Look, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class Spot:
    """One model in the plane: accuracy in domain (x) and out of domain (y), each with its interval."""

    methods: tuple[str, ...]
    """More than one where methods have had the same model up to here."""
    round: int
    coefficient: float | None
    x: tuple[float, float, float]  # accuracy, low, high
    y: tuple[float, float, float]

    @property
    def method(self) -> str:
        return self.methods[0]

    @property
    def name(self) -> str:
        return ", ".join(self.methods)

    @property
    def at(self) -> Point:
        return self.x[0], self.y[0]

    @property
    def swept(self) -> bool:
        """It is a point of the curve base + λ·change."""
        return self.coefficient is not None or self.method == "line"


def estimate(row: Row) -> tuple[float, float, float]:
    """Accuracy, low, high of a row; without an interval, thrice the accuracy."""
    middle = row["accuracy"]
    low, high = row.get("low"), row.get("high")
    return middle, middle if low is None else low, middle if high is None else high


Shared = Mapping[tuple[str, int], str]
"""(method, round) → the method under whose name its model was evaluated."""


def spots(pooled: Sequence[Row], shared: Shared) -> list[Spot]:
    """Pair the in-domain and out-of-domain rows of each model; a model that lacks one is left out."""
    cells: dict[tuple[str, int, float | None], dict[str, Row]] = {}
    methods: dict[tuple[str, int, float | None], list[str]] = {}
    for row in pooled:
        owner = shared.get((row["method"], row["round"]), row["method"])
        key = (owner, row["round"], row.get("coefficient"))
        if row.get("accuracy") is not None:
            cells.setdefault(key, {})[row["domain"]] = row
            if row["method"] not in methods.setdefault(key, []):
                methods[key].append(row["method"])
    return [
        Spot(tuple(methods[key]), key[1], key[2], estimate(domains["id"]), estimate(domains["ood"]))
        for key, domains in cells.items()
        if "id" in domains and "ood" in domains
    ]


_PARTS = {0.25: "¼", 0.5: "½", 0.75: "¾", 1.25: "1¼", 1.5: "1½", 1.75: "1¾"}


@dataclasses.dataclass
class Plane:
    """The picture under construction."""

    canvas: Canvas
    axes: Axes
    placer: Placer
    base: Spot | None
    style: Mapping[str, Look]
    radius: float

    def pixel(self, spot: Spot) -> Point:
        return self.canvas.pixel(self.axes, spot.at)

    def from_base(self, spots: Sequence[Spot]) -> list[Spot]:
        return [*([self.base] if self.base else []), *spots]

    def name(self, spot: Spot, text: str, fill: str | int, *, radius: float, size: float = 13, needed: bool) -> None:
        """Write a label near a spot, with a leader where it is far; one that is not `needed` gives way."""
        at, text = self.pixel(spot), shorten(text, self.canvas.width / 2, size, bold=size > 12)
        place = self.placer.place(at, text, gap=radius, size=size, needed=needed)
        if not needed and not place.clear:
            return
        if place.far:
            self.canvas.line([at, (place.at[0], place.at[1] - 4)], "soft", alpha=0.6)
        self.canvas.text(place.at, text, fill, size=size, bold=size > 12, anchor="center")


@kept
@drawing()
def frontier(
    pooled: Sequence[Row], *, width: float, height: float, name: str, style: Mapping[str, Look] | None = None,
    shared: Shared | None = None, standalone: bool = False,
) -> str:  # fmt: skip
    """Draw accuracy in domain (x) against out of domain (y).

    Each method is a line from the base through its rounds, numbered; crosses are 95 % intervals; rows with
    a coefficient λ, or of a method named `line`, form the dashed curve base + λ·change. The tinted quarter is
    better than the base in both. Returns "" where no model has both accuracies.

    Args:
      style: how each method is drawn; by default as their order here says.
      shared: which models several methods have in common: they are drawn once.
    """
    points = spots(pooled, shared or {})
    if not points:
        return ""
    sweeps: dict[tuple[str, int], list[Spot]] = {}
    tracks: dict[str, list[Spot]] = {}
    for p in points:
        if p.swept:
            sweeps.setdefault((p.method, p.round), []).append(p)
        elif p.method != "base":
            for method in p.methods:
                tracks.setdefault(method, []).append(p)
    for sweep in sweeps.values():
        sweep.sort(key=lambda p: p.coefficient or 0.0)
    for track in tracks.values():
        track.sort(key=lambda p: p.round)
    plane = open_plane(points, width, height, style or looks(list(dict.fromkeys(m for p in points for m in p.methods))))
    draw_crosses(plane, [p for p in points if not p.swept])
    draw_sweeps(plane, list(sweeps.values()))
    draw_tracks(plane, tracks)
    write_names(plane, tracks, list(sweeps.values()))
    said = "; ".join(
        f"{p.name}{'' if p.coefficient is None else f' λ {p.coefficient:g}'} round {p.round}:"
        f" {format_percent(p.x[0])} in domain, {format_percent(p.y[0])} out of domain"
        for p in points
    )
    title = "Accuracy in domain against accuracy out of domain"
    return plane.canvas.svg(name=name, title=title, description=said, standalone=standalone)


def open_plane(points: Sequence[Spot], width: float, height: float, style: Mapping[str, Look]) -> Plane:
    """Open axes that hold every point with its interval, and tint what is better than the base."""
    narrow = width < 500
    x_low, x_high = bounds([v for p in points for v in p.x], pad=0.04, least=0.08)
    y_low, y_high = bounds([v for p in points for v in p.y], pad=0.04, least=0.08)
    x_low, x_high, y_low, y_high = max(x_low, -0.02), min(x_high, 1.02), max(y_low, -0.02), min(y_high, 1.02)
    y_ticks = [(v, share(v)) for v in ticks(y_low, y_high, count=6)]
    left = max(46.0, max(text_width(label, 12) for _, label in y_ticks) + 8)
    box = (left, 34.0, width - 10, height - 46)
    canvas = Canvas(width, height)
    axes = canvas.axes(box, (x_low, x_high), (y_low, y_high))
    x_ticks = [(v, share(v)) for v in ticks(x_low, x_high, count=4 if narrow else 8)]
    canvas.grid(axes, x_ticks=x_ticks, y_ticks=y_ticks)
    canvas.text((2, 20), "↑ out of domain" if narrow else "↑ accuracy out of domain", "soft")
    x_title = "in domain →" if narrow else "accuracy in domain →"
    canvas.text((width - 10, height - 9), x_title, "soft", anchor="right")
    base = next((p for p in points if p.method == "base"), None)
    if base:
        axes.fill_between([base.x[0], x_high], base.y[0], y_high, color=colour("tint"), linewidth=0, zorder=0)
    placer = Placer((box[0] + 2, box[1] + 2, box[2], box[3] - 3))
    return Plane(canvas, axes, placer, base, style, 6.5 if narrow else 8.0)


def draw_crosses(plane: Plane, points: Sequence[Spot]) -> None:
    """Draw the intervals of each accuracy by itself."""
    for p in points:
        for ends in ([(p.x[1], p.y[0]), (p.x[2], p.y[0])], [(p.x[0], p.y[1]), (p.x[0], p.y[2])]):
            fill = colour(plane.style[p.method].fill)
            plane.axes.plot(*zip(*ends, strict=True), color=fill, linewidth=1.2, alpha=0.38)
            plane.placer.avoid_line([plane.canvas.pixel(plane.axes, end) for end in ends], weight=0.5)


def draw_sweeps(plane: Plane, sweeps: Sequence[Sequence[Spot]]) -> None:
    """Draw the dashed curves of one change, scaled."""
    for sweep in sweeps:
        curve = list(sweep) if any(p.coefficient == 0 for p in sweep) else plane.from_base(sweep)
        xs, ys = zip(*(p.at for p in curve), strict=True)
        plane.axes.plot(xs, ys, color=colour("soft"), linewidth=1.5, linestyle=(0, (3.3, 2.7)))
        plane.placer.avoid_line([plane.pixel(p) for p in curve])
        for p in sweep:
            options = {"markerfacecolor": colour("paper"), "markeredgecolor": colour("soft"), "markeredgewidth": 1.5}
            plane.axes.plot(*([v] for v in p.at), "o", markersize=6.4, **options)
            plane.placer.avoid(plane.pixel(p), 3.2)


def draw_tracks(plane: Plane, tracks: Mapping[str, Sequence[Spot]]) -> None:
    """Draw each method's way from the base, its rounds numbered; later rounds lie above earlier ones.

    A step or a model that methods have in common is drawn once, in the colours of all of them.
    """
    steps: dict[tuple[Spot, Spot], list[str]] = {}
    for method, rounds in tracks.items():
        track = plane.from_base(rounds)
        for step in itertools.pairwise(track):
            steps.setdefault(step, []).append(method)
        plane.placer.avoid_line([plane.pixel(p) for p in track], weight=1.5)
    for methods, group in itertools.groupby(steps, key=steps.__getitem__):
        way = list(group)
        xs, ys = zip(*(p.at for p in [way[0][0], *(end for _, end in way)]), strict=True)
        stripe(plane.axes, xs, ys, [plane.style[method].fill for method in methods], linewidth=2)
    marks = [(p, str(p.round)) for p in dict.fromkeys(p for rounds in tracks.values() for p in rounds)]
    marks += [(plane.base, "")] if plane.base else []
    for p, label in sorted(marks, key=lambda mark: mark[0].round or 10**9):
        for ring in reversed(range(1, len(p.methods))):
            look = plane.style[p.methods[ring]]
            plane.canvas.mark(plane.axes, p.at, plane.style[p.method].marker, look.fill, plane.radius + 2.5 * ring)
        look = plane.style[p.method]
        plane.canvas.mark(plane.axes, p.at, look.marker, look.fill, plane.radius, label)
        plane.placer.avoid(plane.pixel(p), plane.radius + 1 + 2.5 * (len(p.methods) - 1))


def write_names(plane: Plane, tracks: Mapping[str, Sequence[Spot]], sweeps: Sequence[Sequence[Spot]]) -> None:
    """Name the base, each method at its last round, and the coefficients of the curves as far as there is room."""
    if plane.base:
        plane.name(plane.base, "base", "ink", radius=plane.radius, needed=True)
    ends: dict[Spot, list[str]] = {}
    for method, rounds in tracks.items():
        ends.setdefault(rounds[-1], []).append(method)
    for spot, methods in ends.items():
        fill = plane.style[methods[0]].fill if len(methods) == 1 else "ink"
        plane.name(spot, ", ".join(methods), fill, radius=plane.radius, needed=True)
    for sweep in sweeps:
        for i, p in enumerate(sweep):
            if p.coefficient is not None and p.coefficient != 0:
                # The first says what the numbers are.
                text = ("λ = " if i == 0 else "") + _PARTS.get(p.coefficient, f"{p.coefficient:g}")
                plane.name(p, text, "soft", radius=3.2, size=12, needed=False)
            elif p.coefficient is None and p is sweep[-1]:
                plane.name(p, p.method, "soft", radius=3.2, size=12, needed=False)
