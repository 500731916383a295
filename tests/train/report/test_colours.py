"""One meaning for each colour over a whole page, and what methods have in common drawn once."""

import json
import re
import xml.etree.ElementTree as ET

import pytest
from helpers.made_up_run import METHODS, write_run

from jaxmerge.files.inspect.canvas import DARK, LIGHT
from train.report.page import write_report
from train.report.plots import Line, lines
from train.report.style import css

SERIES = LIGHT["series"]
COLOURS = dict(zip(METHODS, SERIES, strict=False))


def pictures(page):
    return [ET.fromstring(picture) for picture in re.findall(r"<svg.*?</svg>", page, flags=re.S)]


def section(page, key):
    return re.findall(rf'<section id="{key}".*?</section>', page, flags=re.S)[0]


def change_phases(folder, change, *, without=""):
    phases = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    phases = [phase for phase in phases if phase["phase"] != without]
    for phase in phases:
        change(phase)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in phases))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("colours") / "run")


@pytest.fixture(scope="module")
def page(folder):
    return write_report(folder).read_text()


def test_a_method_has_its_colour_in_every_picture_and_the_base_its_own(page):
    named = {name: set() for name in ("base", *METHODS)}
    for picture in pictures(page):
        for text in picture.iter("text"):
            first = re.split(r" · | − |$", text.text or "")[0]
            if first in named:
                named[first].add(text.get("fill"))
    assert named == {"base": {LIGHT["ink"]}, **{name: {colour} for name, colour in COLOURS.items()}}


def test_no_colour_of_a_method_means_anything_else(page):
    """Of a run with two methods only two of the seven colours are on the page; bars, links and verdicts have none."""
    names = {f"--s{i}": name for i, name in enumerate(METHODS)}
    body = page[page.index("<body>") :]
    for variable, words in re.findall(r'var\((--s\d)\)"[^>]*>(?:<h[34]>)?([^<]*)', body):
        assert words.split(" ")[0] == names[variable], (variable, words)
    rules = page[page.index("*{box-sizing") : page.index("</style>")]
    assert not re.search(r"var\(--s\d", rules)
    used = {p.get(kind) for picture in pictures(page) for p in picture.iter() for kind in ("fill", "stroke")}
    assert used & set(SERIES) == set(COLOURS.values())


def test_an_analysis_takes_colours_that_no_method_has():
    for palette in (LIGHT, DARK):
        for count in (2, 4):
            turned = re.findall(r"#analysis\{(.*?)\}", css(methods=count))
            assert len(turned) == 2
            own = dict(pair.split(":") for pair in turned[palette is DARK].split(";"))
            assert own["--s0"] == palette["series"][count]
            assert not {own[f"--s{i}"] for i in range(3)} & set(palette["series"][:count])
    assert "#analysis" not in css()


def test_a_loss_that_methods_share_is_drawn_once_in_both_colours(page):
    panels = pictures(section(page, "training"))
    titles = [next(t.text for t in panel.iter("text") if t.get("font-weight")) for panel in panels]
    assert titles == ["plain, imm", "plain", "imm", "plain_lowlr"]
    rounds = [sorted(t.text for t in panel.iter("text") if (t.text or "").startswith("round")) for panel in panels]
    assert rounds == [["round 1"], ["round 2", "round 3"], ["round 2", "round 3"], ["round 1", "round 2", "round 3"]]
    strokes = [{p.get("stroke") for p in panel.iter("path")} & set(SERIES) for panel in panels]
    assert strokes == [{SERIES[0], SERIES[1]}, {SERIES[0]}, {SERIES[1]}, {SERIES[2]}]
    assert "drawn once, striped in their colours" in section(page, "training")
    assert "drawn once, striped in their colours" in section(page, "layers")


def test_a_model_that_methods_share_is_one_mark_in_the_picture(tmp_path):
    folder = write_run(tmp_path / "run")
    before = write_report(folder).read_text()

    def share(phase):
        if phase["phase"] == "round-1/plain/evaluate":
            phase["shared_by"] = ["imm"]

    change_phases(folder, share, without="round-1/imm/evaluate")
    summary = json.loads((folder / "summary.json").read_text())
    plain = [row for row in summary["rows"] if (row["method"], row["round"]) == ("plain", 1)]
    summary["rows"] = [row for row in summary["rows"] if (row["method"], row["round"]) != ("imm", 1)]
    summary["rows"] += [{**row, "method": "imm"} for row in plain]
    (folder / "summary.json").write_text(json.dumps(summary))
    after = write_report(folder).read_text()
    for page, marks, dashed in ((before, 4, 0), (after, 3, 1)):
        (wide, narrow) = pictures(section(page, "picture"))
        for picture in (wide, narrow):
            assert (
                sum(text.text == "1" and text.get("fill") == LIGHT["paper"] for text in picture.iter("text")) == marks
            )
            lines = [p for p in picture.iter("path") if p.get("stroke") in SERIES and p.get("stroke-dasharray")]
            assert len(lines) == dashed
    assert "they have one line, striped" in after
    assert "they have one line, striped" not in before
    assert "plain, imm round 1:" in after


def test_three_methods_make_three_stripes_of_equal_length():
    drawn = lines(
        [Line("r", [(0, 0), (9, 1)] + [(i, 0.5) for i in range(10, 30)], hues=(0, 1, 2))], name="x", title="t",
        x_title="x", y_title="y",
    )  # fmt: skip
    striped = [p for p in ET.fromstring(drawn).iter("path") if p.get("stroke") in SERIES]
    dashes = {p.get("stroke"): [float(v) for v in p.get("stroke-dasharray", "0 0").split()] for p in striped}
    assert [p.get("stroke") for p in striped] == [SERIES[2], SERIES[1], SERIES[0]], "the first lies above"
    (on2, off2), (on1, off1) = dashes[SERIES[1]], dashes[SERIES[0]]
    assert dashes[SERIES[2]] == [0, 0]
    assert on1 == pytest.approx(off2)
    assert on2 == pytest.approx(2 * on1)
    assert off1 == pytest.approx(2 * on1)


def test_few_panels_use_the_width_of_the_page(tmp_path):
    def width(picture):
        return float(picture.get("viewBox").split()[2])

    folder = write_run(tmp_path / "run")
    for kept, wide in ((1, 680), (2, 512), (9, None)):
        write_run(folder)
        tuned = [f"round-1/{name}/sft" for name in ("plain", "plain_lowlr")][:kept]
        change_phases(folder, lambda p: p.pop("loss", None) if kept < 9 and p["phase"] not in tuned else None)  # noqa: B023
        found = pictures(section(write_report(folder).read_text(), "training"))
        assert {width(picture) for picture in found} == ({330, wide} if wide else {330})
        assert len(found) == (2 * kept if wide else 4)


def test_an_axis_of_accuracies_ends_where_the_accuracies_do(page):
    """Made-up accuracies are between 20 and 89 %: 0 and 100 % are not on the axes."""
    for picture in pictures(section(page, "families")):
        ticks = [t.text for t in picture.iter("text") if (t.text or "").endswith(" %")]
        assert ticks == ["20 %", "40 %", "60 %", "80 %"]


def test_a_fine_tuning_of_one_step_is_drawn(tmp_path):
    folder = write_run(tmp_path / "run")

    def shorten(phase):
        if "loss" in phase:
            if phase["phase"] == "round-1/plain_lowlr/sft":
                phase["loss"] = [[1, 0.5]]
            else:
                del phase["loss"]

    change_phases(folder, shorten)
    assert len(pictures(section(write_report(folder).read_text(), "training"))) == 2


def test_the_axis_of_steps_begins_with_the_first_step(tmp_path):
    folder = write_run(tmp_path / "run")
    change_phases(folder, lambda p: p.update(loss=[[i, 1 / i] for i in range(1, 5)]) if "loss" in p else None)
    for panel in pictures(section(write_report(folder).read_text(), "training")):
        marks = sorted(float(c.get("cx")) for c in panel.iter("circle"))
        axis = next(float(t.get("x")) for t in panel.iter("text") if t.text == "1")
        assert marks[0] == pytest.approx(axis, abs=1), "the first point stands where the axis begins"
        assert "0" not in {t.text for t in panel.iter("text") if t.get("text-anchor") == "middle"}
