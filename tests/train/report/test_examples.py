"""What models said, beside what was expected; and the result as Markdown."""

import html
import re

import pytest
from helpers.made_up_run import METHODS, NASTY, QUESTIONS, write_run

from train.report.html import escape
from train.report.markdown import spell
from train.report.page import write_report


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(write_run(tmp_path_factory.mktemp("examples") / "run")).read_text()


def section(page, key):
    return re.findall(rf'<section id="{key}".*?</section>', page, flags=re.S)[0]


def test_each_question_stands_with_the_expected_answer_and_what_each_method_said_last(page):
    shown = section(page, "answers")
    for question, answer, family, _ in QUESTIONS:
        assert shown.count(f"<br>{escape(question)}</p>") == 1
        assert f"<h4>expected</h4><pre>{escape(answer)}</pre>" in shown
        assert f"{family} · " in shown
    for method in ("base", *(f"{name} · 3" for name in METHODS)):
        assert shown.count(f"<h4>{method} <span") == len(QUESTIONS)
    assert "· 2 <span" not in shown, "the last round speaks"
    for name in ("base", *METHODS):
        assert f"<pre>48 = 36 + 12, says {name}. #12</pre>" in shown
        assert shown.count(f"end by {name} #40</pre>") == 2, "the end of a long answer, and the whole behind a fold"
    count = len(METHODS) + 1
    words = [shown.count(f">{word}</span>") for word in ("right", "wrong", "not judged")]
    assert words == [count, 2 * count, count]
    assert "(nothing)" in shown
    assert shown.count("<summary>1 more questions") <= 1
    assert str(escape(NASTY)) in shown
    assert "<script" not in shown


def test_a_sampled_solution_stands_beside_the_expected_answer(page):
    shown = section(page, "examples")
    assert "<h4>expected</h4><pre>12</pre>" in shown
    assert "<h4>the model <span" in shown


def test_the_table_as_markdown_can_be_copied_whole(page):
    (block,) = re.findall(r'<pre class="copy" tabindex="0">(.*?)</pre>', page, flags=re.S)
    assert "user-select:all" in page
    lines = html.unescape(block).splitlines()
    assert lines[0].startswith("**miniature**: plain gained 18.0 points in domain [14.0, 22.0] and lost 14.0 points")
    assert "- Model: runs/miniature · 12.3 M parameters · float32" in lines
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "| method | round | in domain (n = 400) | out of domain (n = 750) | harder (n = 400) |"
    assert table[2] == "| base | 0 | 33.0 % [28.4, 37.6] | 74.0 % [70.9, 77.1] | 23.1 % [19.0, 27.2] |"
    assert table[4].startswith(
        "| imm | 3 | 43.0 % [38.1, 47.9]; +10.0 [+6.0, +14.0] | 73.0 % [69.8, 76.2]; −1.0 [−5.0, +3.0] |"
    )
    assert len(table) == 3 + len(METHODS)
    assert len({line.count("|") for line in table}) == 1
    assert "    jaxmerge improve configs/miniature.yaml rounds=3" in lines


def test_names_break_no_markdown(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("summary.json", "metrics.jsonl"):
        text = (folder / name).read_text().replace('"expo"', r'"e|x`<b>\n[p](o)"')
        (folder / name).write_text(text)
    page = write_report(folder).read_text()
    (block,) = re.findall(r'<pre class="copy" tabindex="0">(.*?)</pre>', page, flags=re.S)
    (row,) = [line for line in html.unescape(block).splitlines() if line.startswith("| e")]
    assert row.startswith(r"| e\|x\`\<b\> \[p\](o) | 3 |")
    assert len(re.findall(r"(?<!\\)\|", row)) == 6
    assert spell("a\\b*") == r"a\\b\*"
