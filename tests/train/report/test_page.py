"""The report: a page that opens from disk, says every number, trusts no sample, and works on half a run."""

import itertools
import json
import re
import xml.etree.ElementTree as ET

import pytest
from helpers.made_up_run import METHODS, NASTY, write_run

from jaxmerge.files.inspect.canvas import DARK, LIGHT, ticks
from train.log import UserError
from train.report import trees
from train.report.html import escape
from train.report.labels import Placer, _overlap, spread
from train.report.page import write_report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "miniature-0123abcd")


@pytest.fixture(scope="module")
def page(run):
    return write_report(run).read_text(encoding="utf-8")


def tables(page: str) -> list[list[list[tuple[str, str]]]]:
    """The rows of each table after its head: (label, words) of each cell, in the order of the page."""
    found = []
    for table in re.findall(r"<tbody.*?</tbody>", page, flags=re.S):
        rows = re.findall(r"<tr.*?</tr>", table, flags=re.S)
        cells = [re.findall(r"<t[hd]([^>]*)>(.*?)</t[hd]>", row, flags=re.S) for row in rows]
        found.append(
            [
                [
                    ("".join(re.findall(r'data-l="([^"]*)"', attributes)), re.sub(r"<[^>]*>", " ", words).strip())
                    for attributes, words in row
                ]
                for row in cells
            ]
        )
    return found


def test_every_row_has_its_numbers(run, page):
    every = {tuple(words for _, words in row[:-1]) for table in tables(page) for row in table if len(row) == 9}
    for row in json.loads((run / "summary.json").read_text())["rows"]:
        label = row["method"] if row.get("coefficient") is None else f"line λ={row['coefficient']:g}"
        domain = {"id": "in domain", "harder": "harder", "ood": "out of domain"}[row["domain"]]
        interval = f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        about = label, str(row["round"]), domain, row["family"], "test"
        assert (*about, f"{100 * row['accuracy']:.1f} %", interval, str(row["n"])) in every


def test_cells_of_wide_tables_say_what_they_are(page):
    """On a telephone the rows become blocks, and the head is not in sight."""
    heads = re.findall(r"<table[^>]*>.*?</table>", page, flags=re.S)
    wide = [table for table in heads if table.count('role="columnheader"') > 3]
    assert len(wide) > 5
    for table in wide:
        names = [
            re.sub(r"<small>.*?</small>|<[^>]*>", "", h).strip()
            for h in re.findall(r"<th scope=\"col\".*?</th>", table)
        ]
        assert '<table role="table" class="stack">' in table
        for row in tables(table)[0]:
            assert [label for label, _ in row[1:]] == names[1:]
    narrow = [table for table in heads if table not in wide]
    assert narrow
    assert not any("data-l" in table or "stack" in table for table in narrow)


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
    assert page.count("<caption>") >= page.count("<table ") > 0


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
    assert 'data-l="in domain (validation)"' in page
    assert ("pass@8", "87.5 %") in [cell for table in tables(page) for row in table for cell in row]


def test_unfinished_run_says_so_and_shows_what_is_there(tmp_path):
    folder = write_run(tmp_path / "half", finished=False)
    for name in ("miniature", "half"):
        page = write_report(folder).read_text()
        assert "Unfinished run" in page
        assert "33.0 %" in page
        assert f"<h1>{name}</h1>" in page
        (folder / "summary.json").unlink(missing_ok=True)


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


def tree_of(nodes: int, text: str) -> dict:
    """A row of trees.jsonl: nodes one below the other in tens, each with a long step and reflection."""
    made = [
        {
            "parent": None if i == 0 else (i - 1) // 10, "children": list(range(10 * i + 1, min(10 * i + 11, nodes))),
            "step": text, "reflection": text, "depth": 0, "score": 0.5, "value": 0.5, "visits": 1, "simulated": None,
            "solved": False, "expanded": True,
        }
        for i in range(nodes)
    ]  # fmt: skip
    solution = {"name": "a", "text": text, "reason": "eos", "verdict": 1.0}
    return {
        "question": text, "answer": text, "end": "budget", "chosen": nodes - 1, "nodes": made, "solutions": [solution]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "said", "shown"),
    [
        ([5] * 45, "The first 40 of 45 are shown", 40 * 4),
        ([150] * 4, "The first 2 of 4 are shown", 2 * 149),
        ([900, 3], "Of a large tree the first 400 nodes and the plan that was taken are shown", 400),
        ([3, 3], "marked ●.<", 4),
    ],
)
def test_trees_of_long_texts_make_no_large_page(tmp_path, monkeypatch, sizes, said, shown):
    monkeypatch.setattr(trees, "NODES", 400)
    monkeypatch.setattr(trees, "CHARACTERS", 400_000)
    (tmp_path / "trees.jsonl").write_text("".join(json.dumps(tree_of(n, "y" * 3000)) + "\n" for n in sizes))
    page = trees.trees(tmp_path)
    assert len(page) < 1_000_000
    assert said in page
    assert page.count("</small> yyy") == shown
