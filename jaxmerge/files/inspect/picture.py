r"""A picture of what changed: a map of layers × kinds of matrix, darker where ‖Δ‖/‖W‖ is larger.

One map a model, all on one scale. The file stands alone: its colours follow the reader's light or dark setting,
one hue in twelve shades, so that it is read without colour too; every cell says its number to a pointer.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmerge import where

from ...where import KINDS, kind

LIGHT = {"ink": "#1b1f24", "soft": "#57606a", "line": "#d5dae0", "paper": "#ffffff", "hue": "#0b6bb0"}
DARK = {"ink": "#e6e9ed", "soft": "#9aa4af", "line": "#333b45", "paper": "#14181d", "hue": "#58b4f5"}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
CHARACTER = 0.6  # width of a character, in font sizes, rounded up
MARGIN, ROW, SHADES = 20.0, 22.0, 12
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def svg(result: Mapping[str, Any]) -> str:
    """Draw a result of `compare` as an SVG file of its own."""
    maps = [Map.of(result, i) for i in range(len(result["models"]))]
    values = [value for m in maps for value in m.values() if math.isfinite(value)]
    page = Page(_width(maps), max(values, default=0.0) or 1.0)
    page.text(MARGIN, 34, _short(f"Change from {result['base']}", page.width - 2 * MARGIN, 17), "title")
    page.text(MARGIN, 54, "relative change ‖Δ‖/‖W‖ by layer and kind of matrix", "soft")
    y = _legend(page, 70)
    for name, m in zip(result["models"], maps, strict=True):
        y = _panel(page, y + 30, name, m)
    said = "; ".join(f"{n}: {percent(m.overall)} in all" for n, m in zip(result["models"], maps, strict=True))
    return page.close(y + MARGIN, f"Change from {result['base']}", said)


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


class Page:
    """A picture under construction, and its scale of shades."""

    def __init__(self, width: float, top: float):
        self.width, self.top = width, top
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "start") -> None:
        """Write text; (x, y) is on its baseline."""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{_escape(text)}</text>')

    def cell(self, x: float, y: float, width: float, height: float, value: float, said: str = "") -> None:
        """Draw a value; shades go with its square root, so that small changes show."""
        shade = min(math.ceil(math.sqrt(min(value / self.top, 1.0)) * SHADES - 1e-9), SHADES)
        if value > 0:
            shade = max(shade, 1)  # no change at all looks different from any
        size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        title = f"<title>{_escape(said)}</title>" if said else ""
        self.parts.append(f'<rect {size} class="s{shade}">{title}</rect>')

    def close(self, height: float, title: str, said: str) -> str:
        """Return the file."""
        size = f'viewBox="0 0 {self.width:.0f} {height:.0f}" width="{self.width:.0f}" height="{height:.0f}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="t d">'
        words = f'<title id="t">{_escape(title)}</title><desc id="d">{_escape(said)}</desc>'
        dark = "@media (prefers-color-scheme:dark){\n" + _rules(DARK) + "\n}"
        style = f"<style>\n{_rules(LIGHT)}\n{dark}\n</style>"
        return "\n".join(
            [head, words, style, '<rect width="100%" height="100%" class="paper"/>', *self.parts, "</svg>\n"]
        )


def _rules(colours: Mapping[str, str]) -> str:
    rules = [
        f"text{{font-family:{FONT};font-size:13px;fill:{colours['ink']}}}",
        ".title{font-size:17px;font-weight:600}",
        ".name{font-size:14px;font-weight:600}",
        f".soft{{fill:{colours['soft']}}}",
        ".small{font-size:12px}",
        f".paper{{fill:{colours['paper']}}}",
        f".s0{{fill:{colours['paper']};stroke:{colours['line']}}}",
    ]
    rules += [
        f".s{i}{{fill:{colours['hue']};fill-opacity:{0.08 + 0.92 * i / SHADES:.3f}}}" for i in range(1, SHADES + 1)
    ]
    return "\n".join(rules)


def _escape(text: object) -> str:
    return html.escape(_FORBIDDEN.sub("\ufffd", str(text)))


def _length(text: str, size: float = 13) -> float:
    return CHARACTER * size * len(text)


def _short(text: str, room: float, size: float = 13) -> str:
    """Cut text to a width; the end of a path says more than its beginning."""
    count = max(int(room / (CHARACTER * size)), 8)
    return text if len(text) <= count else "…" + text[1 - count :]


def _label_width(maps: Sequence[Map]) -> float:
    labels = [k for m in maps for rows in m.rows.values() for k in rows]
    return max([_length(_short(label, 130)) for label in labels] + [_length("layer")]) + 12


def _cell_width(layers: int) -> float:
    return min(34.0, max(9.0, 640 / layers))


def _width(maps: Sequence[Map]) -> float:
    layers = max((m.layers(c) for m in maps for c in m.cells), default=0)
    return max(560.0, 2 * MARGIN + _label_width(maps) + layers * _cell_width(max(layers, 1)) + 64)


def _legend(page: Page, y: float) -> float:
    for i in range(SHADES + 1):
        page.cell(MARGIN + 18 * i, y, 17, 14, page.top * (i / SHADES) ** 2)
    right = MARGIN + 18 * SHADES + 17
    page.text(MARGIN, y + 29, "0", "soft small")
    page.text(MARGIN + 18 * SHADES / 2 + 8.5, y + 29, percent(page.top / 4), "soft small", "middle")
    page.text(right, y + 29, percent(page.top), "soft small", "end")
    return y + 32


def _panel(page: Page, y: float, name: str, m: Map) -> float:
    """Draw one model; return where it ends."""
    overall = f"{percent(m.overall)} in all"
    page.text(MARGIN, y, _short(name, page.width - 2 * MARGIN - _length(overall) - 24, 14), "name")
    page.text(page.width - MARGIN, y, overall, "", "end")
    y += 12
    left = MARGIN + _label_width([m])
    for container, cells in m.cells.items():
        if len(m.cells) > 1:
            page.text(MARGIN, y + 14, _short(container, page.width - 2 * MARGIN), "soft")
            y += 22
        y = _grid(page, y, left, m.layers(container), cells, m.rows[container])
    return _loose(page, y, m.outside) if m.outside else y


def _grid(
    page: Page, y: float, left: float, layers: int, cells: Mapping[tuple[str, int], float], rows: Mapping[str, float]
) -> float:
    width = _cell_width(layers)
    for i, (label, value) in enumerate(rows.items()):
        at = y + ROW * i
        page.text(left - 8, at + 15, _short(label, 130), "", "end")
        for layer in range(layers):
            if (label, layer) in cells:
                found = cells[label, layer]
                said = f"{label}, layer {layer}: {percent(found)}"
                page.cell(left + width * layer, at + 0.5, width - 1, ROW - 1, found, said)
        page.text(left + width * layers + 8, at + 15, percent(value), "soft small")
    y += ROW * len(rows)
    # Numbers every so many layers, as their width allows.
    room = _length(str(layers), 12) + 8
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 50, 100, layers) if s * width >= room)
    page.text(left - 8, y + 15, "layer", "soft small", "end")
    for layer in range(0, layers, step):
        page.text(left + width * (layer + 0.5), y + 15, str(layer), "soft small", "middle")
    return y + 24


def _loose(page: Page, y: float, outside: Mapping[str, float]) -> float:
    """Draw what is in no layer: a cell, a name and a number each, line after line."""
    x, y = MARGIN, y + 6
    for name, value in outside.items():
        label = f"{_short(name, 200)} {percent(value)}"
        size = 30 + _length(label) + 22
        if x > MARGIN and x + size > page.width - MARGIN:
            x, y = MARGIN, y + ROW + 4
        page.cell(x, y, 22, ROW - 4, value, label)
        page.text(x + 30, y + 14, label)
        x += size
    return y + ROW
