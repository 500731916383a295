"""Distillation in `improve`: the gate, both kinds of teacher through the verb, and what a teacher is shown."""

import json

import pytest

from train.cli import __main__ as cli
from train.evaluate.answer import prompt_text
from train.improve.gate import check_passed, told
from train.improve.settings import Improve
from train.log import UserError
from train.resolve import build
from train.runtime.jsonl import read_jsonl
from train.tasks import build_suite, demonstrated
from train.tasks.settings import FamilySpec

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
FAMILY = {
    "family": "chain_sum", "domain": "id", "train": 8, "validation": 4, "test": 4,
    "args": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}  # fmt: skip
LARGER = {"teacher": {"random": {**SIZES, "hidden_size": 48}}}
CONFIG = {
    "model": {"random": SIZES},
    "tasks": {"style": "compact", "families": [FAMILY]},
    "sampling": {"samples": 2, "temperature": 1.0, "max_new_tokens": 8, "slots": 8},
    "evaluation": {"max_new_tokens": 8, "slots": 8},
    "sft": {"batch": 8},
}


def config_of(**methods):
    return {**CONFIG, "methods": methods}


def improve(tmp_path, *words, **methods):
    (tmp_path / "config.yaml").write_text(json.dumps(config_of(**methods)))
    return cli.main(["improve", str(tmp_path / "config.yaml"), f"out={tmp_path / 'run'}", *words])


def test_both_teachers_teach_and_a_gate_that_is_not_passed_refuses(tmp_path, capsys):
    """Random models answer nothing: the gate says so, its record stays, and go_on goes on from there."""
    short = {"name": "distill", "steps": 1, "questions": 4}
    methods = {
        "self": {"improver": short, "sft": {"distill": {}}},
        "other": {"improver": {**short, "gate": "off"}, "sft": {"distill": LARGER}},
    }
    assert improve(tmp_path, **methods) == 2
    said = "the teacher, shown the worked solution, does not beat the student: 0.0 % against 0.0 % of 4"
    assert f"round-1/self/policy: {said}" in capsys.readouterr().err
    records = {r["phase"]: r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")}
    assert records["round-1/self/gate"]["better"] is False
    assert records["round-1/self/gate"]["demonstrates"] is True
    assert records["round-1/self/gate"]["n"] == 4
    methods["self"]["improver"] = {**short, "gate": "go_on"}
    (tmp_path / "again").mkdir()
    assert improve(tmp_path / "again", **methods) == 0
    records = {r["phase"]: r for r in read_jsonl(tmp_path / "again" / "run" / "metrics.jsonl")}
    assert "round-1/other/gate" not in records
    assert {records[f"round-1/{m}/policy"]["improver"] for m in methods} == {"distill"}
    assert len({records[f"round-1/{m}/policy"]["digest"] for m in methods} | {records["base/load"]["digest"]}) == 3
    assert "better beyond chance" in (tmp_path / "again" / "run" / "report.html").read_text()


def test_a_gate_is_passed_where_the_interval_is_above_nothing():
    record = {
        "teacher": 0.9, "student": 0.5, "difference": 0.4, "low": 0.3, "high": 0.5, "n": 200, "demonstrates": True,
        "better": True,
    }  # fmt: skip
    check_passed(record, "here", "refuse")
    check_passed(None, "here", "refuse")
    worse = {**record, "low": -0.1, "better": False}
    check_passed(worse, "here", "go_on")
    with pytest.raises(UserError, match=r"here: the teacher, shown the worked solution, does not beat .*gate: go_on"):
        check_passed(worse, "here", "refuse")
    assert "beats the student: 90.0 % against 50.0 % of 200" in told(record)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"improver": "distill"}, "needs sft.distill"),
        ({"sft": {"distill": {}}}, "teaches with improver: distill alone"),
        ({"improver": "grpo", "sft": {"distill": {}}, "sampling": {"samples": 2}}, "teaches with improver: distill"),
        ({"improver": {"name": "distill", "demonstrate": False}, "sft": {"distill": {}}}, "nothing to teach"),
    ],
)
def test_what_has_no_teacher_is_refused(method, message):
    with pytest.raises(UserError, match=message):
        build(Improve, config_of(m=method))


def test_a_gate_needs_validation_questions(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(
        json.dumps(
            config_of(m={"improver": "distill", "sft": {"distill": {}}})
            | {"tasks": {"style": "compact", "families": [{**FAMILY, "validation": 0}]}}
        )
    )
    assert cli.main(["improve", str(tmp_path / "config.yaml"), "--dry-run"]) == 2
    assert "methods.m.improver.gate asks teacher and student validation questions" in capsys.readouterr().err


def test_what_a_teacher_is_shown():
    """Texts are solved and asked again; worked examples end with the question's own; a chat says it in words."""
    suite = build_suite((FamilySpec(**FAMILY),), seed=0, style="compact")
    question = suite.questions("train")[0]
    shown = prompt_text(suite, None, question, demonstrate=True)
    assert shown == f"\n{question.text}{question.solution}\n{question.text}"
    worked = prompt_text(suite, None, question, 2, demonstrate=True)
    plain = prompt_text(suite, None, question, 2)
    opening = f"Question: {question.text}\nSolution:"
    assert worked.count(opening) == 2
    assert worked.startswith(plain.removesuffix(opening))
    assert worked.endswith(f"{opening} {question.solution}\nAnswer: {question.answer}\n\n{opening}")
    turns = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "2?"},
    ]
    *before, last = demonstrated(turns, "It is 2.")
    assert before == turns[:2]
    assert last["content"].startswith(
        "2?\n\nThis is an example for a response to the question:\nIt is 2.\n\nNow answer"
    )
