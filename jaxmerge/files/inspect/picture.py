r"""A picture of what changed: a map of layers × kinds of matrix, darker where ‖Δ‖/‖W‖ is larger.

One map a model, all on one scale. The file stands alone: its colours follow the reader's light or dark setting,
one hue in twelve shades, so that it is read without colour too; every cell says its number to a pointer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmerge import where

from ...where import KINDS, kind
from .canvas import Canvas, colour, drawing, shorten, text_width

MARGIN, ROW, SHADES = 20.0, 22.0, 12


@drawing()
def svg(result: Mapping[str, Any]) -> str:
    """Draw a result of `compare` as an SVG file of its own."""
    maps = [Map.of(result, i) for i in range(len(result["models"]))]
    values = [value for m in maps for value in m.values() if math.isfinite(value)]
    page = Page(_width(maps), max(values, default=0.0) or 1.0)
    title = shorten(f"Change from {result['base']}", page.width - 2 * MARGIN, 17, bold=True)
    page.text((MARGIN, 34), title, size=17, bold=True)
    page.text((MARGIN, 54), "relative change ‖Δ‖/‖W‖ by layer and kind of matrix", "soft")
    y = _legend(page, 70)
    for name, m in zip(result["models"], maps, strict=True):
        y = _panel(page, y + 30, name, m)
    page.end(y + MARGIN)
    said = "; ".join(f"{n}: {percent(m.overall)} in all" for n, m in zip(result["models"], maps, strict=True))
    return page.svg(name="change", title=f"Change from {result['base']}", description=said, standalone=True)


def percent(value: float | None) -> str:
    """Write a share in a hundred with three digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.3g} %" if value < 9.995 else f"× {value:.3g}"


Lengths = tuple[float, float]  # ‖Δ‖, ‖W‖


def _pooled(parts: Sequence[Lengths]) -> float:
    """‖Δ‖/‖W‖ of several tensors together; a change from nothing is infinite."""
    moved, own = (math.sqrt(math.fsum(x * x for x in column)) for column in zip(*parts, strict=True))
    return (moved / own if own else math.inf) if moved else 0.0


@dataclasses.dataclass(frozen=True)
class Map:
    """What one picture of one model shows: relative changes.

    cells: container of layers → (kind, layer) → value. rows: container → kind → value over all layers. outside: by
    name, what is in no layer.
    """

    cells: dict[str, dict[tuple[str, int], float]]
    rows: dict[str, dict[str, float]]
    outside: dict[str, float]
    overall: float | None

    @classmethod
    def of(cls, result: Mapping[str, Any], model: int) -> Map:
        """Pool the tensors of a result."""
        cells: dict[str, dict[tuple[str, int], list[Lengths]]] = {}
        outside: dict[str, list[Lengths]] = {}
        for name, entry in result["tensors"].items():
            path = name.replace(".", "/")
            layer, group = where.layer_index(path), where.layer_group(path)
            lengths = (entry["models"][model]["norm"], entry["norm"])
            if layer is None:
                outside.setdefault(group.rpartition("/")[2], []).append(lengths)
            else:
                cells.setdefault(group.rpartition("/")[0], {}).setdefault((kind(name), layer), []).append(lengths)
        rows: dict[str, dict[str, float]] = {}
        for container, parts in cells.items():
            found = list(dict.fromkeys(k for k, _ in parts))
            ordered = [k for k in KINDS if k in found] + [k for k in found if k not in KINDS]
            rows[container] = {k: _pooled([p for at, ps in parts.items() if at[0] == k for p in ps]) for k in ordered}
        return cls(
            {c: {at: _pooled(ps) for at, ps in parts.items()} for c, parts in cells.items()},
            rows,
            {name: _pooled(ps) for name, ps in outside.items()},
            result["overall"]["models"][model]["relative"],
        )

    def values(self) -> list[float]:
        return [*(v for cells in self.cells.values() for v in cells.values()), *self.outside.values()]

    def layers(self, container: str) -> int:
        return max(layer for _, layer in self.cells[container]) + 1


class Page(Canvas):
    """A picture under construction, and its scale of shades."""

    def __init__(self, width: float, top: float):
        super().__init__(width, height=1.0)
        self.top = top

    def cell(self, x: float, y: float, width: float, height: float, value: float, said: str = "") -> None:
        """Draw a value; shades go with its square root, so that small changes show."""
        shade = min(math.ceil(math.sqrt(min(value / self.top, 1.0)) * SHADES - 1e-9), SHADES)
        if value > 0:  # no change at all looks different from any
            self.rect(x, y, width, height, 0, said, alpha=round(0.08 + 0.92 * max(shade, 1) / SHADES, 3))
        else:
            self.rect(x, y, width, height, "paper", said, linewidth=1, edgecolor=colour("faint"))


def _label_width(maps: Sequence[Map]) -> float:
    labels = [k for m in maps for rows in m.rows.values() for k in rows]
    return max([text_width(shorten(label, 130)) for label in labels] + [text_width("layer")]) + 12


def _cell_width(layers: int) -> float:
    return min(34.0, max(9.0, 640 / layers))


def _width(maps: Sequence[Map]) -> float:
    layers = max((m.layers(c) for m in maps for c in m.cells), default=0)
    return max(560.0, 2 * MARGIN + _label_width(maps) + layers * _cell_width(max(layers, 1)) + 64)


def _legend(page: Page, y: float) -> float:
    for i in range(SHADES + 1):
        page.cell(MARGIN + 18 * i, y, 17, 14, page.top * (i / SHADES) ** 2)
    right = MARGIN + 18 * SHADES + 17
    page.text((MARGIN, y + 29), "0", "soft", size=12)
    page.text((MARGIN + 18 * SHADES / 2 + 8.5, y + 29), percent(page.top / 4), "soft", size=12, anchor="center")
    page.text((right, y + 29), percent(page.top), "soft", size=12, anchor="right")
    return y + 32


def _panel(page: Page, y: float, name: str, m: Map) -> float:
    """Draw one model; return where it ends."""
    overall = f"{percent(m.overall)} in all"
    room = page.width - 2 * MARGIN - text_width(overall) - 24
    page.text((MARGIN, y), shorten(name, room, 14, bold=True), size=14, bold=True)
    page.text((page.width - MARGIN, y), overall, anchor="right")
    y += 12
    left = MARGIN + _label_width([m])
    for container, cells in m.cells.items():
        if len(m.cells) > 1:
            page.text((MARGIN, y + 14), shorten(container, page.width - 2 * MARGIN), "soft")
            y += 22
        y = _grid(page, y, left, m.layers(container), cells, m.rows[container])
    return _loose(page, y, m.outside) if m.outside else y


def _grid(
    page: Page, y: float, left: float, layers: int, cells: Mapping[tuple[str, int], float], rows: Mapping[str, float]
) -> float:
    width = _cell_width(layers)
    for i, (label, value) in enumerate(rows.items()):
        at = y + ROW * i
        page.text((left - 8, at + 15), shorten(label, 130), anchor="right")
        for layer in range(layers):
            if (label, layer) in cells:
                found = cells[label, layer]
                said = f"{label}, layer {layer}: {percent(found)}"
                page.cell(left + width * layer, at + 0.5, width - 1, ROW - 1, found, said)
        page.text((left + width * layers + 8, at + 15), percent(value), "soft", size=12)
    y += ROW * len(rows)
    # Numbers every so many layers, as their width allows.
    room = text_width(str(layers), 12) + 8
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 50, 100, layers) if s * width >= room)
    page.text((left - 8, y + 15), "layer", "soft", size=12, anchor="right")
    for layer in range(0, layers, step):
        page.text((left + width * (layer + 0.5), y + 15), str(layer), "soft", size=12, anchor="center")
    return y + 24


def _loose(page: Page, y: float, outside: Mapping[str, float]) -> float:
    """Draw what is in no layer: a cell, a name and a number each, line after line."""
    x, y = MARGIN, y + 6
    for name, value in outside.items():
        label = f"{shorten(name, 200)} {percent(value)}"
        size = 30 + text_width(label) + 22
        if x > MARGIN and x + size > page.width - MARGIN:
            x, y = MARGIN, y + ROW + 4
        page.cell(x, y, 22, ROW - 4, value, label)
        page.text((x + 30, y + 14), label)
        x += size
    return y + ROW
