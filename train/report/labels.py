"""Labels that keep out of each other's way: free places around points, and names spread along an edge."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxmerge.files.inspect.canvas import Point, text_width

Box = tuple[float, float, float, float]  # left, top, right, bottom


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


class Place(NamedTuple):
    """Where a label goes."""

    at: Point
    """The middle of its baseline."""
    far: bool
    """It needs a leader."""
    clear: bool
    """It touches no other label and no marker, and is inside the frame."""


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

    def place(self, at: Point, text: str, *, gap: float, size: float = 13.0, needed: bool = True) -> Place:
        """Choose a place near `at`, and keep it; one that is not clear is kept only where the label is `needed`."""
        width, height = text_width(text, size) + 2, size + 2
        best: tuple[float, Box, Place] | None = None
        for ring, far in enumerate((3.0, 9.0, 17.0, 28.0, 42.0, 60.0, 80.0, 105.0)):
            if best is not None and best[0] <= 0.6 * far:  # no place from here on costs less
                break
            for turn in range(16):
                angle = 2 * math.pi * turn / 16
                dx, dy = math.cos(angle), math.sin(angle)
                x = at[0] + dx * (gap + far) + width / 2 * max(-1.0, min(1.0, 1.6 * dx))
                y = at[1] + dy * (gap + far) + height / 2 * max(-1.0, min(1.0, 1.6 * dy))
                box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
                outside = width * height - _overlap(box, self.frame)
                covered = sum(_overlap(box, other) for other in self.boxes)
                cost = 4 * outside + 3 * covered
                cost += sum(weight * _length_inside(a, b, box) for a, b, weight in self.segments)
                cost += 0.6 * far + (0.5 if turn % 4 else 0.0)
                if best is None or cost < best[0]:
                    best = (cost, box, Place((x, y + 0.36 * size), ring > 2, outside + covered < 1e-6))
        assert best is not None
        if best[2].clear or needed:
            self.boxes.append(best[1])
        return best[2]


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
