"""A figure of matplotlib, measured in pixels from its top left corner, and written as a small SVG.

matplotlib writes the light colours. The stylesheet (`rules`) turns each of them into a CSS variable, so that one file
is light, dark or whatever its page says, and a program that reads no stylesheets, such as Inkscape, sees the light
one. Text stays text. The same picture has the same bytes on every run.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
SERIES = len(LIGHT["series"])
SVG = "{http://www.w3.org/2000/svg}"
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxmerge",
    "text.parse_math": False,
    "font.size": 12.0,
    "text.color": LIGHT["ink"],
    "axes.axisbelow": True,
}
_MISSING = "Glyph .* missing from"
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_PAIR = re.compile(r"(-?[\d.]+(?:e-?\d+)?) (-?[\d.]+(?:e-?\d+)?)")


def clean(text: object) -> str:
    """Replace what neither XML nor HTML may contain by U+FFFD."""
    return _FORBIDDEN.sub("\ufffd", str(text))


def colour(name: str | int) -> str:
    """The light colour of a name (`ink`), or of a series by its number, which begins again after the last."""
    return LIGHT["series"][name % SERIES] if isinstance(name, int) else LIGHT[name]


def variables(colours: Mapping[str, Any]) -> str:
    """Write a palette as CSS variables: --ink … and --s0 …"""
    named = {name: value for name, value in colours.items() if name != "series"}
    named |= {f"s{i}": value for i, value in enumerate(colours["series"])}
    return ":root{" + ";".join(f"--{name}:{value}" for name, value in named.items()) + "}"


def rules() -> str:
    """Write the rules that give the light colours of every picture to the variables of `variables`."""
    names = {value: name for name, value in LIGHT.items() if name != "series"}
    names |= {value: f"s{i}" for i, value in enumerate(LIGHT["series"])}
    return "\n".join(
        f'svg [{part}="{value}"]{{{part}:var(--{name})}}'
        for value, name in names.items()
        for part in ("fill", "stroke")
    )


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Hold matplotlib to the same settings, whatever the reader's matplotlibrc says; a decorator too.

    matplotlib is imported here, not before a picture is drawn.
    """
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A sign that the measuring font lacks is still text, and drawn by the reader's own fonts.
        warnings.filterwarnings("ignore", message=_MISSING)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


@functools.lru_cache(maxsize=4096)
def text_width(text: str, size: float = 13.0, *, bold: bool = False) -> float:
    """Measure text in pixels, in matplotlib's own font: wider than what most readers have."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    # All is said, so that no matplotlibrc is asked.
    font = FontProperties(
        family="DejaVu Sans", style="normal", variant="normal", stretch="normal", weight="bold" if bold else "normal",
        size=size,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_MISSING)
        return text_to_path.get_text_width_height_descent(_one_line(text), font, False)[0]


def shorten(text: str, room: float, size: float = 13.0, *, bold: bool = False) -> str:
    """Cut text to a width; the end of a path says more than its beginning."""
    text = _one_line(text)
    if text_width(text, size, bold=bold) <= room:
        return text
    lengths = range(6, len(text))
    fitting = bisect.bisect_right(lengths, room, key=lambda n: text_width("…" + text[-n:], size, bold=bold))
    return "…" + text[-(5 + fitting) :]


def ticks(low: float, high: float, *, count: int = 6) -> list[float]:
    """Choose at most about `count` round numbers in `low … high`."""
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(nbins=max(count, 1), steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    edge = 1e-9 * (high - low)
    return [round(float(value), 12) for value in found if low - edge <= value <= high + edge]


def _one_line(text: str) -> str:
    return " ".join(clean(text).split())


class Canvas:
    """A picture under construction. Make and use it inside `drawing()`."""

    def __init__(self, width: float, height: float):
        from matplotlib.figure import Figure
        from matplotlib.transforms import Affine2D

        # The SVG backend has 72 dots an inch: a point of matplotlib is a pixel of the picture.
        self.figure = Figure(dpi=72, facecolor="none")
        self.pixels = Affine2D()
        self.titles: dict[str, str] = {}
        self.width = width
        self.end(height)

    def end(self, height: float) -> None:
        """Set where the picture ends, as soon as that is known; before there are axes."""
        self.height = height
        self.figure.set_size_inches(self.width / 72, height / 72)
        self.pixels.clear().scale(1, -1).translate(0, height)

    def text(
        self, at: Point, text: object, fill: str | int = "ink", *, size: float = 13, bold: bool = False,
        anchor: str = "left",
    ) -> None:  # fmt: skip
        """Write text; `at` is on its baseline, at its left end, its middle ("center") or its right end."""
        self.figure.text(
            *at, _one_line(str(text)), color=colour(fill), fontsize=size, transform=self.pixels,
            fontweight="bold" if bold else "normal", ha=anchor, va="baseline",
        )  # fmt: skip

    def line(self, points: Sequence[Point], stroke: str | int, width: float = 1.0, **options: Any) -> None:
        """Draw a line in pixels, over the axes."""
        from matplotlib.lines import Line2D

        made = Line2D(*zip(*points, strict=True), color=colour(stroke), linewidth=width, **options)
        made.set_transform(self.pixels)
        self.figure.add_artist(made)

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str | int, said: str = "", **options: Any
    ) -> None:
        """Draw a rectangle in pixels; `said` is told to a pointer over it."""
        from matplotlib.patches import Rectangle

        made = Rectangle((x, y), width, height, facecolor=colour(fill), **{"linewidth": 0, **options})
        made.set_transform(self.pixels)
        if said:
            made.set_gid(f"said{len(self.titles)}")
            self.titles[f"said{len(self.titles)}"] = said
        self.figure.add_artist(made)

    def axes(self, box: tuple[float, float, float, float], x: Point, y: Point) -> Axes:
        """Open axes in a box (left, top, right, bottom) with the limits of both directions, no frame yet."""
        left, top, right, bottom = box
        place = (left / self.width, 1 - bottom / self.height, (right - left) / self.width, (bottom - top) / self.height)
        made = self.figure.add_axes(place, xlim=x, ylim=y, facecolor="none")
        made.spines[:].set_visible(False)
        made.tick_params(length=0, labelcolor=LIGHT["soft"], color=LIGHT["soft"], labelsize=12)
        made.set_xticks([])
        made.set_yticks([])
        return made

    def mark(
        self, axes: Axes, at: Point, marker: str, fill: str | int, radius: float, text: str = "", *, order: float = 3.0
    ) -> None:  # fmt: skip
        """Draw a marker with the area of a circle of `radius`, and a word inside it."""
        size = radius * {"o": 2.0, "s": 1.77, "D": 1.8, "^": 2.5, "h": 2.2}[marker]
        axes.plot(
            *([v] for v in at), marker=marker, color=colour(fill), markersize=size, markeredgecolor=LIGHT["paper"],
            markeredgewidth=1.2, clip_on=False, zorder=order,
        )  # fmt: skip
        if text:
            # The middle of a triangle lies below the middle of its height.
            drop = 0.36 * 10 + (0.22 * radius if marker == "^" else 0.0)
            axes.annotate(
                text, at, (0, -drop), textcoords="offset points", ha="center", va="baseline", fontsize=10,
                fontweight="bold", color=LIGHT["paper"], zorder=order, annotation_clip=False,
            )  # fmt: skip

    def pixel(self, axes: Axes, at: Point) -> Point:
        """Where a point of the axes lies on the canvas."""
        x, y = axes.transData.transform(at)
        return float(x), self.height - float(y)

    def grid(
        self, axes: Axes, *, x_ticks: Sequence[tuple[float, str]] = (), y_ticks: Sequence[tuple[float, str]] = ()
    ) -> None:
        """Draw hairlines at the y ticks, small marks at the x ticks, and the rule they stand on.

        A label that would touch the one before it is left out.
        """
        axes.set_yticks([v for v, _ in y_ticks], [_one_line(label) for _, label in y_ticks])
        axes.grid(axis="y", color=LIGHT["faint"], linewidth=1)
        axes.tick_params(axis="y", pad=7)
        shown, end = [], float("-inf")
        for value, label in sorted(x_ticks):
            middle, half = self.pixel(axes, (value, 0.0))[0], text_width(label, 12) / 2
            shown.append((value, label if middle - half > end and middle + half <= self.width else ""))
            end = middle + half + 5 if shown[-1][1] else end
        axes.set_xticks([v for v, _ in shown], [_one_line(label) for _, label in shown])
        axes.tick_params(axis="x", length=4, pad=4)
        axes.spines["bottom"].set(visible=True, color=LIGHT["soft"], linewidth=1)

    def svg(self, *, name: str, title: str, description: str, standalone: bool = False) -> str:
        """Close the picture.

        Args:
          name: prefix of the ids inside, unique on its page.
          title: what the picture is.
          description: what it shows, in words, for those who do not see it.
          standalone: a file of its own, with its colours inside, on paper.
        """
        self.figure.set_facecolor(LIGHT["paper"] if standalone else "none")
        written = io.StringIO()
        self.figure.savefig(written, format="svg", metadata={"Date": None})
        parts = list(_shapes(ET.fromstring(written.getvalue()), {}, self.titles, ""))
        space = 'xmlns="http://www.w3.org/2000/svg" ' if standalone else ""  # HTML knows an <svg> without it
        size = f'viewBox="0 0 {_number(self.width)} {_number(self.height)}"'
        size += f' width="{_number(self.width)}" height="{_number(self.height)}"'
        head = ET.Element("svg", {"role": "img", "aria-labelledby": f"{name}-t {name}-d", "font-family": FONT})
        head.set("stroke-linejoin", "round")
        opening = ET.tostring(head, encoding="unicode").removesuffix(" />").replace("<svg ", f"<svg {space}{size} ", 1)
        words = [ET.Element("title", {"id": f"{name}-t"}), ET.Element("desc", {"id": f"{name}-d"})]
        words[0].text, words[1].text = clean(title), clean(description)
        if standalone:
            dark = "@media (prefers-color-scheme:dark){" + variables(DARK) + "}"
            words.append(ET.Element("style"))
            words[-1].text = "\n".join(["", variables(LIGHT), dark, rules().replace("svg [", "["), ""])
            # In a style of XML, > is text; nothing there needs escaping.
        body = [ET.tostring(part, encoding="unicode") for part in (*words, *parts)]
        return "\n".join([opening + ">" + body[0], *body[1:], "</svg>"]) + ("\n" if standalone else "")


# --- from matplotlib's SVG to ours ---------------------------------------------------------------------------


def _number(value: float) -> str:
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def _style(node: ET.Element) -> dict[str, str]:
    pairs = (part.partition(":") for part in node.get("style", "").split(";") if part.strip())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _shapes(
    node: ET.Element, markers: dict[str, ET.Element], titles: Mapping[str, str], said: str
) -> Iterator[ET.Element]:
    """Every shape and text in order: groups opened, references followed, styles as attributes."""
    for child in node:
        tag = child.tag.removeprefix(SVG)
        made = None
        if tag == "g":
            yield from _shapes(child, markers, titles, titles.get(child.get("id", ""), said))
        elif tag == "defs":
            markers |= {path.get("id", ""): path for path in child}
        elif tag == "text":
            made = _text(child)
        elif tag == "path":
            made = _path(child.get("d", ""), 0.0, 0.0, _style(child))
        elif tag == "use":
            mark = markers[child.get("{http://www.w3.org/1999/xlink}href", "")[1:]]
            place = float(child.get("x", 0)), float(child.get("y", 0))
            made = _path(mark.get("d", ""), *place, _style(mark) | _style(child))
        if made is not None:
            if said:
                ET.SubElement(made, "title").text = clean(said)
            yield made


def _text(found: ET.Element) -> ET.Element:
    style = _style(found)
    made = ET.Element("text", {key: _number(float(found.get(key, 0))) for key in ("x", "y")})
    made.text = found.text
    made.set("font-size", style["font-size"].removesuffix("px"))
    if "font-weight" in style:
        made.set("font-weight", "600")
    if style.get("text-anchor", "start") != "start":
        made.set("text-anchor", style["text-anchor"])
    made.set("fill", style.get("fill", "#000000"))
    return made


_KEPT: dict[str, Callable[[str], str]] = {
    "fill": str, "fill-opacity": str, "stroke": str, "stroke-opacity": str, "stroke-width": str, "opacity": str,
    "stroke-dasharray": lambda text: " ".join(_number(float(v)) for v in text.split(",")),
}  # fmt: skip


def _path(d: str, dx: float, dy: float, style: Mapping[str, str]) -> ET.Element | None:
    """A path moved by (dx, dy), or the circle or rectangle that it is; None where there is nothing to see."""
    points = [(float(x) + dx, float(y) + dy) for x, y in _PAIR.findall(d)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    letters = re.sub(r"[^A-Za-z]", "", d.replace("e-", ""))
    if not points or (style.get("fill") == "none" and "stroke" not in style):
        return None
    low, high = (min(xs), min(ys)), (max(xs), max(ys))
    if letters == "MCCCCCCCCz":
        sizes = {"cx": (low[0] + high[0]) / 2, "cy": (low[1] + high[1]) / 2, "r": (high[0] - low[0]) / 2}
        made = ET.Element("circle", {key: _number(value) for key, value in sizes.items()})
    elif letters == "MLLLz" and len(set(xs)) == len(set(ys)) == 2:
        sizes = {"x": low[0], "y": low[1], "width": high[0] - low[0], "height": high[1] - low[1]}
        made = ET.Element("rect", {key: _number(value) for key, value in sizes.items()})
    else:
        moved = _PAIR.sub(lambda m: f"{_number(float(m[1]) + dx)} {_number(float(m[2]) + dy)}", d)
        made = ET.Element("path", {"d": re.sub(r"\s*([MLCQz])\s*", r"\1", moved).strip()})
    for key, convert in _KEPT.items():
        if key in style:
            made.set(key, convert(style[key]))
    return made
