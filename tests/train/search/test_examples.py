"""What goes into a search and what is kept of it: questions, prompts, tests of programs, filters."""

import dataclasses
import json
import re

import pytest
import yaml
from helpers import ROOT
from helpers.tiny_tokenizers import byte_level

from train.log import UserError
from train.models.tokenizer import Tokenizer
from train.resolve import build
from train.search import testing
from train.search.examples import distribution, select
from train.search.prompts import INSTALLED, PROMPTS, load_prompts
from train.search.questions import Item, equal, read_questions
from train.search.run import judged
from train.search.settings import Questions, Search, SearchRun
from train.search.testing import compiles

# --- questions, prompts, filters ---


def test_questions_of_a_file(tmp_path):
    path = tmp_path / "riddles.jsonl"
    path.write_text('{"question": "1+1?", "answer": 2}\n{"problem": "Say why.", "id": "why"}\n{"prompt": "1+1?"}\n')
    items = read_questions(Questions(path=str(path)))
    assert [item.text for item in items] == ["1+1?", "Say why."]  # one question, one tree
    assert items[0].verify("so 1+1 = 2") == 1.0
    assert items[1].verify is None
    assert items[1].id == "why"
    path.write_text('{"words": "?"}\n')
    with pytest.raises(UserError, match=r"riddles.jsonl:1: found the keys words; wanted a text under question"):
        read_questions(Questions(path=str(path)))
    with pytest.raises(UserError, match=r"either questions\.path or questions\.families"):
        Questions()
    assert equal("red", "Answer: **Red**") == 1.0


def test_prompts_are_checked_before_anything_is_computed(tmp_path):
    for domain in ("code", "mathematics"):
        prompts = load_prompts(domain)
        for name in PROMPTS:
            messages, _ = prompts[name].render({"question": "Q{{x}}", "steps": [], "hint": "", "siblings": []})
            assert "Q{{x}}" in messages[-1]["content"]  # a question is no template
    path = tmp_path / "p.yaml"
    domains = yaml.safe_load(INSTALLED.read_text())
    for change, words in (
        ({"step": {"messages": [{"role": "user", "content": "{{ quest }}"}]}}, "code.step: 'quest' is undefined"),
        ({"step": {"messages": [{"role": "user", "content": "{% if %}"}]}}, "code.step:"),
        ({"sorce": {}}, "sorce: no such key; did you mean score"),
        ({"hint": {"messages": []}}, "one or more"),
    ):
        path.write_text(yaml.safe_dump({"code": {**domains["code"], **change}}))
        with pytest.raises(UserError, match=re.escape(words)):
            load_prompts("code", path)
    with pytest.raises(UserError, match="no prompts for mathematics; it has code"):
        load_prompts("mathematics", path)


def test_programs_compile_or_not():
    assert compiles("print('a')")
    assert not compiles("print('a'")
    assert not compiles("x = '\0'")


def plain():
    """A tokenizer without a chat template."""
    return Tokenizer(byte_level(), {"eos_token": "<|im_end|>"})


def solution(text="```python\nx = 1\n```", steps=("one two three four",) * 5, **changes):
    row = {
        "name": "write0",
        "node": 1,
        "steps": list(steps),
        "text": text,
        "reason": "stop",
        "value": 0.7,
        "verdict": 1.0,
    }
    return row | changes


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"reason": "context", "text": ""}, "no room"),
        ({"value": 0.2}, "low value"),
        ({"steps": ["too short"]}, "short plan"),
        ({"text": "```python\nx = ", "reason": "length"}, "open fence"),
        ({"text": "no code"}, "no program"),
        ({"text": "```python\nx = = 1\n```"}, "does not compile"),
        ({"verdict": 0.0}, "wrong"),
        ({"verdict": None}, "unjudged"),
        ({}, "duplicate"),
        ({"text": "```python\nx = 2\n```"}, "over per_question"),
    ],
)
def test_each_filter_counts_what_it_removes(given, why):
    item = Item("q", "f", "?", "?", verify=lambda text: 1.0)
    rows = {"q": {"solutions": [solution(), solution(**given)]}}
    settings = {"code": True, "words": 20, "value": 0.5, "tests": True, "per_question": 1}
    if why == "duplicate":
        settings["per_question"] = None
    examples, counts = select([item], rows, plain(), load_prompts("code"), **settings)
    assert len(examples) == 1
    assert {k: v for k, v in counts["removed"].items() if v} == {why: 1}
    assert examples[0]["completion"].startswith("Step 1: one two three four\n")
    assert examples[0]["completion"].endswith("```python\nx = 1\n```")


def test_filters_of_mathematics_look_for_no_code():
    items = [Item("q", "f", "?", "?"), Item("p", "f", "?", "?")]
    rows = {"q": {"solutions": [solution(text="Answer: 4", verdict=None)]}, "p": {"solutions": []}}
    settings = {"code": False, "words": 0, "value": 0.0, "tests": True, "per_question": None}
    examples, counts = select(items, rows, plain(), load_prompts("mathematics"), **settings)
    assert [row["question_id"] for row in examples] == ["q"]
    assert counts["removed"]["no solution"] == 1
    assert distribution([0.05, 0.1, 1.0], [0.0, 0.1, 1.0]) == [1, 2]


def test_every_key_of_the_config_has_a_reader():
    """A field that nobody reads lies."""
    source = "".join(p.read_text() for p in (ROOT / "train" / "search").glob("*.py"))
    for cls in (Search, SearchRun, Questions):
        for field in dataclasses.fields(cls):
            if field.name not in ("distributed",):  # read where the verb starts
                assert re.search(rf"\.{field.name}\b", source), field.name
    json.dumps(dataclasses.asdict(Search()))


# --- programs and their tests ---


def test_tests_are_found_in_the_lines_people_write(tmp_path):
    read = testing.read_problem
    problem = read({"tests": ["assert f(1) == g(2)", "assert len(f(3)) == 1"]}, "?", "x:1")
    assert problem.calls == ("f", "g")
    stub = "def inc(x):\n    # One more.\n"
    problem = read({"test": "def check(c):\n    assert c(1) == 2\n", "entry_point": "inc"}, stub, "x:1")
    assert problem.calls == ("inc",)
    assert problem.stub == stub
    assert problem.tests.endswith("check(inc)\n")
    problem = read({"test_list": ["assert f(sqrt(4)) == 2"], "test_setup_code": "from math import sqrt"}, "?", "x:1")
    assert problem.calls == ("f",)
    assert read({"question": "?"}, "?", "x:1") is None
    for line, words in (
        ({"tests": "assert f("}, "x:1: tests is no Python"),
        ({"tests": "assert True"}, "uses nothing of the program; name its function in entry_point"),
        ({"tests": 3}, "a text or a list"),
    ):
        with pytest.raises(UserError, match=words):
            read(line, "?", "x:1")
    path = tmp_path / "code.jsonl"
    path.write_text('{"text": "Double x.", "test_list": ["assert double(2) == 4"], "task_id": 7}\n')
    (item,) = read_questions(Questions(path=str(path), domain="code"))
    assert item.id == "7"
    assert "assert double(2) == 4" in item.text  # which names the function
    assert item.judged
    family = {"family": "mbpp", "domain": "id", "train": 1, "args": {"path": str(path)}}
    try:
        (item,) = read_questions(build(Questions, {"families": [family], "domain": "code"}))
    except UserError as error:
        if not str(error).startswith("sandbox: programs cannot be confined"):
            raise
        pytest.skip(str(error))
    assert item.tests.entry_point == "double"


def test_an_answer_whose_verifier_raises_is_not_judged(capsys):
    def broken(text):
        raise ValueError("Exceeds the limit (4300 digits)")

    item = Item("q1", "f", "?", "?", "1", broken)
    assert judged(item, "x" * 100) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"q1: {'x' * 60!r} could not be judged (ValueError: Exceeds the limit (4300 digits))"


def test_programs_are_run_in_the_sandbox_and_what_has_none_fails():
    problem = testing.read_problem({"tests": "assert double(4) == 8"}, "?", "x:1")
    problem = dataclasses.replace(problem, timeout=1.0)
    texts = [
        "```python\ndef double(x):\n    return 2 * x\n```",
        "```python\ndef double(x):\n    return x\n```",
        "```python\ndef double(x)\n```",
        "no program",
        "```python\ndef double(x):\n    while True: pass\n```",
    ]
    try:
        examiner = testing.Examiner()
    except UserError as error:
        pytest.skip(str(error))
    with examiner:
        futures = [examiner.submit(problem, text) for text in texts * 2]
        assert [f.result(timeout=60) for f in futures] == [1.0, 0.0, 0.0, 0.0, 0.0] * 2
