"""The small pictures of analyses and of docs/results.md: all that is drawn is inside, and can be read."""

import itertools
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import pytest
from helpers import ROOT

from jaxmerge.files.inspect.canvas import DARK, LIGHT, text_width
from train.report import plots as pictures

SVG = "{http://www.w3.org/2000/svg}"
Box = tuple[float, float, float, float]


def boxes(root: ET.Element) -> list[tuple[str, Box]]:
    """Where each text is, in the font that matplotlib measures with."""
    found = []
    for text in root.iter():
        if text.tag in ("text", f"{SVG}text"):
            size, words = float(text.get("font-size", "nan")), text.text or ""
            wide = text_width(words, size, bold=text.get("font-weight") == "600")
            left = (
                float(text.get("x", "nan")) - {"middle": 0.5, "end": 1.0}.get(text.get("text-anchor", ""), 0.0) * wide
            )
            base = float(text.get("y", "nan"))
            found.append((words, (left, base - 0.72 * size, left + wide, base + 0.1 * size)))
    return found


def check(root: ET.Element) -> None:
    """Every word is inside the picture, and no word lies on another; numbers in markers may, as the markers do."""
    width, height = (float(v) for v in root.get("viewBox", "").split()[2:])
    found = boxes(root)
    assert found
    for word, (left, top, right, bottom) in found:
        assert left >= -1, word
        assert right <= width + 1, word
        assert top >= 0, word
        assert bottom <= height, word
    outside = [(word, box) for word, box in found if box[3] - box[1] > 9]
    for (one, a), (two, b) in itertools.combinations(outside, 2):
        apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1
        assert apart, (one, two)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*.svg")), ids=lambda path: path.name)
def test_words_of_a_committed_picture_are_inside_it_and_apart(path):
    check(ET.parse(path).getroot())


LONG = "a-method-whose-name-is-far-too-long-for-any-picture $x^2$ <b>" * 3
CURVES = [pictures.Line(LONG, [(0, 0.1), (9, 0.11)], loose={"emb": 0.3, "norm": 0.1}), pictures.Line("b", [(0, 1e-7)])]
DRAWN = {
    "lines": lambda name: pictures.lines(CURVES, name=name, title=LONG, x_title="x", y_title="y"),
    "one colour": lambda name: pictures.lines(
        CURVES, name=name, title="t", x_title="x", y_title="y", high=(9, 1), one=1
    ),
    "marks": lambda name: pictures.lines(
        [pictures.Line(f"line {i}", [(j, 0.5) for j in range(30)], [(0.4, 0.6)] * 30) for i in range(9)], name=name,
        title="t", x_title="x", y_title="y", x_marks=[(j, f"mark {j}") for j in range(30)], rules=[(29, "tuned")],
    ),
    "dots": lambda name: pictures.dots(
        [(LONG, -0.3, (-0.4, 0.1)), ("b", 123456.0, None)], name=name, title="t", low=-1.0, note=LONG
    ),
    "scatter": lambda name: pictures.scatter(
        [(1e6 + i % 6, 1e-9 * i, f"layer {i}") for i in range(24)], name=name, title="t", x_title="x", y_title="y"
    ),
    "cells": lambda name: pictures.cells(
        [[0.1, None, -3.0]] * 2, name=name, title="t", rows=[LONG, "b"], columns=["first", "second", "third"], top=3.0
    ),
    "many cells": lambda name: pictures.cells(
        [[0.1] * 130], name=name, title="t", rows=["a"], columns=list(map(str, range(130))), top=1.0
    ),
    "terrain": lambda name: pictures.terrain(
        [0, 1, 2], [0, 1], [[1.0, 2.0, math.nan], [3.0, 4.0, 9.0]], [("base", 0, 0), (LONG, 1, 0), ("c", 1, 0.01)],
        name=name, title="t",
    ),
    "flat terrain": lambda name: pictures.terrain(
        [0, 1], [0, 1], [[1, 1], [1, 1]], [("base", 0, 0)], name=name, title="t"
    ),
}  # fmt: skip


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_no_word_is_clipped_or_covered_whatever_is_drawn(draw):
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "font.family": "serif", "svg.fonttype": "path"}):
        drawn = draw("x")
    check(ET.fromstring(drawn))
    assert drawn == draw("x"), "the same bytes, whatever the reader's matplotlibrc says"
    assert "nan" not in drawn.split("</desc>")[1]
    assert not re.search(r"href|<script|<b>|url\(", drawn)


def test_matplotlib_is_imported_only_when_a_picture_is_drawn():
    code = (
        "import sys, train.report.page, train.studies.pictures, jaxmerge.files.inspect.picture as p;"
        "assert 'matplotlib' not in sys.modules; p.text_width('x'); assert 'matplotlib' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_light_and_dark_share_a_file():
    drawn = pictures.dots([("a", 0.5, None)], name="x", title="t", standalone=True)
    for name, (light, dark) in {
        "ink": (LIGHT["ink"], DARK["ink"]),
        "s0": (LIGHT["series"][0], DARK["series"][0]),
    }.items():
        assert f'[fill="{light}"]{{fill:var(--{name})}}' in drawn
        assert f"--{name}:{light}" in drawn.split("@media (prefers-color-scheme:dark)")[0]
        assert f"--{name}:{dark}" in drawn.split("@media (prefers-color-scheme:dark)")[1]
    colours = set(re.findall(r'(?:fill|stroke)="(#[0-9a-f]{6})"', drawn))
    assert colours <= {*LIGHT["series"], *(LIGHT[k] for k in ("ink", "soft", "faint", "paper", "tint"))}, (
        "none is left out"
    )


def test_a_rule_beyond_the_points_is_inside_the_picture():
    drawn = pictures.lines(
        [pictures.Line("short", [(0.0, 0.4), (0.75, 0.5)])], name="l", title="t", x_title="x", y_title="y",
        rules=[(1.0, "tuned")],
    )  # fmt: skip
    places = {t.text: float(t.get("x", "nan")) for t in ET.fromstring(drawn).iter() if t.tag.endswith("text")}
    assert places["tuned"] < places["short"]


def test_many_points_are_named_shortly_and_wide_numbers_have_room():
    points = [(float(i % 7), 0.0012 + 1e-6 * i, f"layer {i}") for i in range(30)]
    drawn = pictures.scatter(points, name="s", title="t", x_title="x", y_title="y")
    words = [t.text for t in ET.fromstring(drawn).iter() if t.tag.endswith("text")]
    assert {str(i) for i in range(30)} <= set(words)
    assert not any("layer" in (word or "") for word in words)
    few = pictures.scatter(points[:12], name="s", title="t", x_title="x", y_title="y")
    assert "layer 11" in few
