"""The report: a page that opens from disk, says every number, trusts no sample, and works on half a run."""

import itertools
import json
import math
import pathlib
import random
import re
import xml.etree.ElementTree as ET

import pytest

from jaxmerge.files.inspect.canvas import DARK, LIGHT, ticks
from train.log import UserError
from train.report.html import escape
from train.report.labels import Placer, _overlap, spread
from train.report.page import write_report

NASTY = '<script>alert("x")</script> & <b>bold</b> \x1b[31m \x00 ]]> \ud800 "quoted"'
METHODS = {  # method: (in domain, out of domain) after each round; the base is (33, 74)
    "plain": ((44, 66), (49, 62), (51, 60)),
    "imm": ((39, 74), (41, 73), (43, 73)),
    "plain_lowlr": ((40, 74), (45, 73), (47, 72)),
    "expo": ((50, 58), (52, 53), (53, 49)),
}
FAMILIES = {"id": ("gcd",), "harder": ("gcd_200",), "ood": ("chain_sum", "products", "sorting", "geometry")}
LINE = {0.25: (37, 74), 0.5: (41, 73), 0.75: (46, 69), 1.0: (51, 60), 1.25: (50, 48), 1.5: (44, 33)}


def _row(method, round_, domain, family, percent, n, **more):
    p = percent / 100
    z = 1.96 * math.sqrt(p * (1 - p) / n)
    return {
        "method": method, "round": round_, "domain": domain, "family": family, "split": "test", "accuracy": p,
        "low": max(p - z, 0.0), "high": min(p + z, 1.0), "n": n, "seconds": 3.25, **more,
    }  # fmt: skip


def _rows(method, round_, percents, **more):
    inside, outside = percents
    rows = []
    for domain, value, n in (("id", inside, 400), ("harder", inside * 0.7, 400), ("ood", outside, 750)):
        rows.append(_row(method, round_, domain, "all", value, n, **more))
        names = FAMILIES[domain]
        for i, family in enumerate(names):
            shift = (i - (len(names) - 1) / 2) * 7
            rows.append(_row(method, round_, domain, family, value + shift, n // len(names), **more))
    return rows


def _change(scale, layers=12):
    change = {"model/embed_tokens": 0.2 * scale}
    change |= {f"model/layers/{i}": scale * (0.5 + math.sin(3 * i / layers) ** 2) for i in range(layers)}
    return change | {"model/norm": 0.05 * scale}


def write_run(folder: pathlib.Path, *, finished: bool = True) -> pathlib.Path:
    """Write a run as `jaxmerge improve` would have left it, with made-up numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    phases = [{"phase": "load", "kind": "load", "seconds": 1.5}]
    evaluations = [("base", 0, (33, 74))]
    rows = _rows("base", 0, (33, 74))
    phases.append(
        {
            "phase": "base/evaluate",
            "kind": "evaluate",
            "round": 0,
            "method": "base",
            "seconds": 9.0,
            "rows": rows,
        }
    )
    for r in range(3):
        for method, track in METHODS.items():
            common = {"round": r + 1, "method": method}
            if method != "expo" and not (r == 0 and method == "imm"):
                shared = {"shared_by": ["imm"]} if r == 0 and method == "plain" else {}
                kept, correct = 900 + 80 * r, 1400 + 60 * r
                phases += [
                    {"phase": f"round-{r + 1}/{method}/sample", "kind": "sample", **common, "seconds": 21.0,
                     "questions": 1000, "samples": 4000, "tokens": 91234, "tokens_per_second": 4344.5, **shared},
                    {"phase": f"round-{r + 1}/{method}/select", "kind": "select", **common, "seconds": 1.0,
                     "sampled": 4000, "correct": correct, "unjudged": 37, "duplicates": correct - kept, "kept": kept,
                     "questions_solved": 612, "families": {"gcd": {"sampled": 4000, "correct": correct}},
                     "examples": [
                         {"question": "What is the greatest common divisor of 48 and 36?", "answer": "12",
                          "text": "48 = 1·36 + 12; 36 = 3·12 + 0\n#12", "score": 1.0, "accepted": True, "reason": ""},
                         {"question": f"gcd of 91 and 35 {NASTY}", "answer": "7", "text": f"91-35=56 {NASTY}",
                          "score": 0.01, "accepted": False, "reason": "wrong answer"},
                     ], **shared},
                    {"phase": f"round-{r + 1}/{method}/sft", "kind": "sft", **common, "seconds": 30.0, "steps": 120,
                     "epochs": 2, "examples": kept, "tokens": 50000, "learning_rate": 7e-4,
                     "loss": [[s, 0.2 + math.exp(-s / 30) / (1 + r) + 0.04 * rng.random()]
                              for s in range(0, 121, 4)],
                     "loss_first": 1.3, "loss_last": 0.21, "change": _change(0.02 * (r + 1)), **shared},
                ]  # fmt: skip
            if method in ("imm", "expo"):
                scale = 0.01 * (r + 1) * (1 if method == "imm" else 2.6)
                phases.append(
                    {"phase": f"round-{r + 1}/{method}/merge", "kind": "merge", **common, "seconds": 0.4,
                     "rule": method, "coefficients": {"alpha": 0.5}, "change": _change(scale), "notes": []}
                )  # fmt: skip
            new = _rows(method, r + 1, track[r])
            evaluations.append((method, r + 1, track[r]))
            phases.append(
                {
                    "phase": f"round-{r + 1}/{method}/evaluate",
                    "kind": "evaluate",
                    **common,
                    "seconds": 9.0,
                    "rows": new,
                }
            )
            rows = rows + new
    for coefficient, percents in LINE.items():
        rows = rows + [r for r in _rows("line", 3, percents, coefficient=coefficient) if r["family"] == "all"]
    (folder / "config.yaml").write_text("model: runs/miniature  # <the checkpoint>\nrounds: 3\nmerge:\n  alpha: 0.5\n")
    if not finished:
        phases = phases[:9]
    text = "".join(json.dumps(p) + "\n" for p in phases)
    (folder / "metrics.jsonl").write_text(text + ("" if finished else '{"phase": "torn'))
    if not finished:
        return folder
    paired = [
        {"a": m, "b": "base", "round": 3, "domain": d, "split": "test", "difference": (METHODS[m][2][i] - b) / 100,
         "low": (METHODS[m][2][i] - b) / 100 - 0.04, "high": (METHODS[m][2][i] - b) / 100 + 0.04, "n": n}
        for m in METHODS for i, (d, b, n) in enumerate((("id", 33, 400), ("ood", 74, 750)))
    ]  # fmt: skip
    summary = {
        "name": "miniature", "finished": True, "rows": rows, "paired": paired, "seconds": 402.0,
        "phase_seconds": {"load": 1.5, "sample": 168.0, "select": 8.0, "sft": 240.0, "merge": 2.4, "evaluate": 117.0},
        "versions": {"python": "3.12.4", "jax": "0.12.0", "flax": "0.12.12"}, "device": "cpu x1",
        "command": "jaxmerge improve configs/miniature.yaml rounds=3", "commit": "abc1234def567",
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "miniature-0123abcd")


@pytest.fixture(scope="module")
def page(run):
    return write_report(run).read_text(encoding="utf-8")


def test_every_row_has_its_numbers(run, page):
    for row in json.loads((run / "summary.json").read_text())["rows"]:
        interval = rf"\[{100 * row['low']:.1f}, {100 * row['high']:.1f}\]"
        found = rf"{row['family']}</td><td class=\"l\">test</td>|{row['family']}</td><td>test</td>"
        assert re.search(found, page)
        assert re.search(rf"{100 * row['accuracy']:.1f} %</td><td>{interval}</td><td>{row['n']}</td>", page)


def test_nothing_is_fetched(page):
    targets = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert targets
    assert all(t.startswith("#") or t == "figures/frontier.svg" for t in targets), targets
    assert not re.search(r"url\(|@import|<link|<script|<iframe|https?:", page)


def test_samples_are_text(page):
    assert "<script" not in page
    assert "<b>bold" not in page
    assert escape(NASTY) in page
    assert "\x00" not in page
    assert "&lt;the checkpoint&gt;" in page


def test_long_texts_of_samples_make_no_large_page(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for example in (e for row in rows if isinstance(row.get("examples"), list) for e in row["examples"]):
        example |= {key: f"begin {key} " + "y" * 300_000 for key in ("question", "text", "answer", "reason")}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = path.stat().st_size
    text = write_report(folder).read_text(encoding="utf-8")
    assert size > 5_000_000 > 3 * len(text)
    for key in ("question", "text", "answer", "reason"):
        assert f"begin {key} yyy" in text
    assert "y… (300,011 characters in all)" in text


def test_pictures_are_valid_xml_with_words_for_those_who_cannot_see_them(run, page):
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(pictures) > 15
    ids = [i for picture in pictures for i in re.findall(r' id="([^"]+)"', picture)]
    assert len(ids) == len(set(ids))
    for picture in pictures:
        root = ET.fromstring(picture)
        assert root.find("title").text
        assert root.find("desc").text
        assert "nan" not in picture.split("</desc>")[1]
    alone = ET.parse(run / "figures" / "frontier.svg").getroot()
    assert alone.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [t.text for t in alone.iter("{http://www.w3.org/2000/svg}text")]
    assert {"base", *METHODS, "λ = ¼", "1½"} <= set(texts)


def test_labels_of_the_picture_keep_apart():
    placer = Placer((0, 0, 300, 200))
    for _ in range(8):
        placer.place((150, 100), "a label", gap=5)
    pairs = [(a, b) for i, a in enumerate(placer.boxes) for b in placer.boxes[:i]]
    assert all(_overlap(a, b) == 0 for a, b in pairs)


def test_sections_and_command(page):
    for wanted in (
        "jaxmerge improve configs/miniature.yaml rounds=3", "0.12.12", "Weight change per layer", "Training loss",
        "tokens/s", "alpha: 0.5", "cpu x1", "abc1234def56", "prefers-color-scheme:dark", "+18.0", "−14.0",
    ):  # fmt: skip
        assert wanted in page
    assert "Unfinished" not in page
    assert page.count("<caption>") >= page.count("<table>") > 0


def test_two_splits_are_not_mixed_up_and_pass_at_k_is_shown(tmp_path):
    folder = write_run(tmp_path / "both")
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["rows"]:
        if row["family"] == "all" and row["method"] == "imm":
            row["pass_at"] = {"1": 0.25, "8": 0.875}
    wrong = [{**p, "split": "validation", "difference": 0.777} for p in summary["paired"]]
    summary["paired"] += wrong
    (folder / "summary.json").write_text(json.dumps(summary))
    page = write_report(folder).read_text()
    cards = page[page.index('id="result"') : page.index('id="picture"')]
    assert "77.7" not in cards
    assert "(validation)" in page
    assert '<th scope="col">pass@8</th>' in page
    assert "87.5" in page


def test_unfinished_run_says_so_and_shows_what_is_there(tmp_path):
    page = write_report(write_run(tmp_path / "half", finished=False)).read_text()
    assert "Unfinished run" in page
    assert "33.0 %" in page
    assert "half" in page


def test_a_training_of_one_step_has_its_point(tmp_path):
    """One method, one round, one step: a single number to scale the axis by."""
    folder = write_run(tmp_path / "short")
    phases = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    tuned = next(p for p in phases if p["kind"] == "sft")
    kept = [p for p in phases if p["kind"] != "sft"] + [{**tuned, "loss": [[1, 0.5]]}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in kept))
    assert "Training loss" in write_report(folder).read_text()


@pytest.mark.parametrize("keep", ["config.yaml", "metrics.jsonl", "summary.json"])
def test_any_one_file_is_enough(tmp_path, keep):
    folder = write_run(tmp_path / "run")
    for name in {"config.yaml", "metrics.jsonl", "summary.json"} - {keep}:
        (folder / name).unlink()
    assert write_report(folder).exists()


def test_same_folder_same_bytes_and_nothing_left_over(tmp_path):
    folder = write_run(tmp_path / "run")
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml", "figures", "metrics.jsonl", "report.html", "summary.json",
    ]  # fmt: skip


def test_errors_name_the_folder_and_the_way_out(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "none")
    with pytest.raises(UserError, match="holds none of"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: expected JSON"):
        write_report(tmp_path)


def _contrast(a, b):
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_text_colours_have_contrast(colours):
    for colour in (colours["ink"], colours["soft"], *colours["series"]):
        assert _contrast(colour, colours["paper"]) >= 4.5


def test_ticks_and_spread():
    assert ticks(0.0, 1.0, count=5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.31, 0.55, count=5) == [0.35, 0.4, 0.45, 0.5, 0.55]
    assert ticks(3.0, 3.0) == [3.0]
    placed = sorted(spread([5.0, 5.0, 5.0], gap=10, low=0, high=100))
    assert all(b - a > 9 for a, b in itertools.pairwise(placed))
