"""The sentences at the head of a report: they follow from the run's paired intervals, and from nothing else."""

import json
import re

import numpy as np
import pytest
from helpers.made_up_run import NASTY, write_run

from train.evaluate.accuracy import paired_interval
from train.report.html import escape
from train.report.page import write_report
from train.report.verdict import format_points, is_beyond_chance, verdict

ROWS = [{"method": method} for method in ("base", "plain", "imm")]


def pair(a, domain, difference, low, high, *, b="base", round=1, split="test", n=400):
    return {
        "a": a, "b": b, "round": round, "domain": domain, "split": split,
        "difference": difference / 100, "low": low / 100, "high": high / 100, "n": n,
    }  # fmt: skip


def said(pairs, rows=ROWS, **options):
    sentences = verdict(pairs, rows, **options).sentences
    return [re.sub(r"\s", " ", "".join(words for words, _ in sentence)) for sentence in sentences]


def test_what_is_beyond_chance_is_gained_or_lost_and_the_rest_may_be_chance():
    pairs = [
        pair("plain", "id", 7.8, 3.2, 12.2), pair("plain", "ood", -70.0, -74.4, -65.1),
        pair("imm", "id", -10.5, -15.0, -6.0), pair("imm", "ood", -1.0, -5.0, 3.0),
    ]  # fmt: skip
    assert said(pairs) == [
        "plain gained 7.8 points in domain [3.2, 12.2] and lost 70.0 points out of domain [65.1, 74.4].",
        "imm lost 10.5 points in domain [6.0, 15.0]; out of domain its change of −1.0 [−5.0, +3.0] may be chance.",
    ]


def test_nothing_beyond_chance_is_said_so():
    pairs = [pair(m, d, 2.8, -6.8, 12.2, n=72) for m in ("plain", "imm") for d in ("id", "ood")]
    expected = "does not differ from the base beyond chance in domain (72 questions) or out of domain (72 questions)."
    assert said(pairs[:2]) == [f"plain {expected}"]
    assert not verdict(pairs, ROWS).brackets
    assert said(pairs) == [f"No method differs{expected.removeprefix('does not differ')}"]
    assert said([*pairs, pair("expo", "id", 20, 16, 24)])[1:] == ["plain and imm changed nothing beyond chance."]


def test_an_interval_that_touches_zero_may_be_chance():
    assert not is_beyond_chance(pair("a", "id", 5, 0, 10))
    assert not is_beyond_chance(pair("a", "id", -5, -10, 0))
    assert is_beyond_chance(pair("a", "id", 5, 0.1, 10))
    assert is_beyond_chance(pair("a", "id", -5, -10, -0.1))


def test_the_last_round_and_the_test_questions_speak():
    pairs = [
        pair("plain", "id", 50, 40, 60, round=1), pair("plain", "id", 9, 5, 13, round=2),
        pair("plain", "id", 77, 70, 80, round=2, split="validation"), pair("imm", "id", 4, 1, 7, round=1),
        pair("plain", "harder", 33, 30, 36, round=2),
    ]  # fmt: skip
    assert said(pairs) == [
        "plain after round 2 gained 9.0 points in domain [5.0, 13.0].",
        "imm after round 1 gained 4.0 points in domain [1.0, 7.0].",
    ]
    validation = [{**p, "split": "validation"} for p in pairs[1:2]]
    assert said(validation) == ["plain gained 9.0 points in domain [5.0, 13.0]."]


def test_methods_are_compared_with_the_first_one_where_that_is_beyond_chance():
    base = [pair("plain", "ood", -30, -36, -24), pair("imm", "ood", 0.5, -2, 3)]
    better = [pair("imm", "ood", 30.5, 24, 36, b="plain"), pair("imm", "id", -3, -6.04, 0.2, b="plain")]
    assert said(base + better) == [
        "plain lost 30.0 points out of domain [24.0, 36.0].",
        "imm changed nothing beyond chance.",
        "imm ended 30.5 points above plain out of domain [24.0, 36.0].",
    ]
    assert said([*base, pair("imm", "ood", -30.5, -36, -24, b="plain")])[-1].startswith("imm ended 30.5 points below")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "Nothing has been evaluated yet."),
        (ROWS[:1], "Only the base has been evaluated so far"),
        (ROWS[1:], "The base was not evaluated"),
        (ROWS, "holds no paired differences"),
    ],
)
def test_where_nothing_is_compared_it_says_why(rows, words):
    (sentence,) = said([], rows)
    assert words in sentence
    assert not verdict([], rows).meaning


def test_an_unfinished_run_speaks_of_so_far():
    assert said([pair("imm", "id", 4, 1, 7)], finished=False)[0] == "The run is not finished; so far:"


def test_equal_models_are_seldom_called_different():
    """What the page promises: of many comparisons between equal models about one in twenty is beyond chance."""
    rng, called = np.random.default_rng(0), 0
    for _ in range(2000):
        right = rng.random((2, 120)) < 0.4
        difference, low, high = paired_interval(*right.astype(float).tolist())
        called += is_beyond_chance({"difference": difference, "low": low, "high": high})
    assert 0.02 < called / 2000 < 0.065
    pairs = [pair(m, d, 1, -5, 7) for m in ("plain", "imm") for d in ("id", "ood")]
    assert "of 4 such comparisons between equal models, 0.2 on average" in verdict(pairs, ROWS).meaning
    assert "such comparisons" not in verdict(pairs[:1], ROWS).meaning


def test_points_have_signs_and_no_negative_zero():
    assert [format_points(v) for v in (0.0, -0.0001, 0.0004, -0.1)] == ["0.0", "0.0", "0.0", "−10.0"]
    assert format_points(0.104, digits=0) == "+10"


def test_the_two_domains_of_the_sentences_come_first_in_every_table(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    paired = [{**p, "domain": "harder"} for p in summary["paired"] if p["domain"] == "id"] + summary["paired"]
    path.write_text(json.dumps({**summary, "paired": paired}))
    shown = re.findall(
        r'<section id="(table|paired)".*?<thead.*?>(.*?)</thead>', write_report(folder).read_text(), re.S
    )
    assert [key for key, _ in shown] == ["table", "paired"]
    for _, head in shown:
        found = re.findall("in domain|out of domain|harder", head)
        assert found == ["in domain", "out of domain", "harder"]


def test_the_page_begins_with_it_in_the_colours_of_the_methods(tmp_path):
    folder = write_run(tmp_path / "run")
    page = write_report(folder).read_text()
    lead = page[page.index("</h1>") : page.index("<nav")]
    assert '<strong style="color:var(--s1)">imm</strong> gained 10.0 points in domain' in lead
    assert "lost 25.0 points out of domain [21.0,\u00a029.0]." in lead
    path = folder / "summary.json"
    path.write_text(path.read_text().replace('"expo"', '"' + NASTY.replace('"', "").split("\x1b")[0] + '"'))
    page = write_report(folder).read_text()
    assert "<script" not in page
    assert str(escape("<b>bold</b>")) in page[page.index("</h1>") : page.index("<nav")]
