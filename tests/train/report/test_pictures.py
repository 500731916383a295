"""The small pictures of analyses and of docs/results.md: all that is drawn is inside, and can be read."""

import xml.etree.ElementTree as ET

import pytest
from helpers import ROOT

from train.report import plots as pictures
from train.report.canvas import text_width


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*.svg")), ids=lambda path: path.name)
def test_every_word_of_a_committed_picture_is_inside_it(path):
    root = ET.parse(path).getroot()
    width, height = (float(v) for v in root.get("viewBox", "").split()[2:])
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        wide = 0.9 * text_width(text.text or "", size=12)  # the estimate is on the wide side
        share = {"middle": 0.5, "end": 1.0}.get(text.get("text-anchor", "start"), 0.0)
        left = float(text.get("x", "nan")) - share * wide
        assert -3 <= left <= width - wide + 3, text.text
        assert 0 <= float(text.get("y", "nan")) <= height, text.text


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
