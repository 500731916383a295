"""A search goes on with the questions, tests and prompts it began with, and with no others."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from train.log import UserError
from train.search.prompts import INSTALLED, load_prompts
from train.search.questions import read_questions
from train.search.run import refuse_others
from train.search.settings import Questions

LINES = [
    {"text": "Double x.", "test_list": ["assert double(2) == 4"], "task_id": 7},
    {"question": "1+1?", "answer": 2, "id": "sum"},
]


@pytest.fixture
def questions(tmp_path):
    def written(lines):
        path = tmp_path / "q.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return read_questions(Questions(path=str(path), domain="code"))

    return written


@pytest.fixture
def prompts():
    return load_prompts("code")


@pytest.mark.parametrize(
    ("number", "change", "named"),
    [
        (0, {"test_list": ["assert double(2) == 5"]}, "7"),
        (0, {"test_setup_code": "import math"}, "7"),
        (1, {"answer": 3}, "sum"),
        (1, {"question": "1+2?"}, "sum"),
    ],
)
def test_a_changed_question_or_test_is_refused(tmp_path, questions, prompts, number, change, named):
    refuse_others(tmp_path, questions(LINES), prompts)
    refuse_others(tmp_path, questions(["", *LINES][1:]), prompts)
    lines = [{**line, **change} if i == number else line for i, line in enumerate(LINES)]
    with pytest.raises(UserError, match=rf"answers or tests \({named}\) changed since this search began; restore"):
        refuse_others(tmp_path, questions(lines), prompts)
    with pytest.raises(UserError, match="tests changed since this search began"):
        refuse_others(tmp_path, questions(LINES[:1]), prompts)


def test_changed_prompts_are_refused(tmp_path, questions, prompts):
    refuse_others(tmp_path, questions(LINES), prompts)
    file, domains = tmp_path / "prompts.yaml", yaml.safe_load(INSTALLED.read_text())
    file.write_text(yaml.safe_dump(domains))
    refuse_others(tmp_path, questions(LINES), load_prompts("code", file))  # the same words from elsewhere
    domains["code"]["score"]["prefix"] = "I give "
    domains["code"]["target"] += "."
    file.write_text(yaml.safe_dump(domains))
    with pytest.raises(UserError, match=r"prompts\.json: the prompts score, target changed since this search began"):
        refuse_others(tmp_path, questions(LINES), load_prompts("code", file))


def test_a_search_begun_before_these_were_kept_goes_on(tmp_path, questions, prompts):
    items = questions(LINES)
    old = [{"id": item.id, "text": item.text, "answer": item.answer} for item in items]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    refuse_others(tmp_path, items, prompts)
    with pytest.raises(UserError, match="prompts target changed"):  # kept from now on
        refuse_others(tmp_path, items, dataclasses.replace(prompts, target="x"))
