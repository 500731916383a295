"""Mistakes that would show after an hour are named before anything is sampled; what a run rests on stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import pytest
import yaml
from helpers import ROOT

from train.evaluate.answer import generate
from train.generate.settings import Settings
from train.improve import phases, session
from train.improve.plan import plan
from train.improve.run import improve
from train.improve.settings import Improve
from train.learn.settings import Sft
from train.learn.sft import check_patterns
from train.log import UserError
from train.models.config import ModelConfig
from train.models.decoder import shapes
from train.resolve import build
from train.runtime.journal import Journal
from train.runtime.jsonl import read_jsonl

TINY = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())


def config(methods, **more) -> Improve:
    return build(Improve, {**TINY, "rounds": 1, "methods": methods, **more})


def committed(folder: Path) -> list[str]:
    return [path.parent.name for path in folder.glob("phases/**/record.json")]


def probe(rule: str, **parameters):
    return {"plain": {}, "p": {"probe": {"of": "plain", "kind": "merge", "rule": rule, "parameters": parameters}}}


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (probe("ties", densty=0.5), r"methods\.p\.probe: ties of 2 checkpoints: .*no coefficient 'densty'"),
        (probe("fisher"), r"methods\.p\.probe: fisher of 2 checkpoints: .*fishers"),
        (probe("dare", density=0.5), r"methods\.p\.probe: dare .*key"),
        (probe("nearswap", t=0.1), r"methods\.p\.probe: nearswap"),
        ({"m": {"merge": {"rule": "ties"}}}, r"methods\.m\.merge: .*needs density="),
        ({"m": {"merge": {"rule": "imm", "where": ["nowhere"]}}}, r"methods\.m\.merge: .*nowhere"),
        (
            {"m": {"sft": {"stay": {"freeze": ["nowhere"]}}}},
            r"methods\.m\.sft: sft\.stay\.freeze: 'nowhere' matches none",
        ),
        ({"m": {"sft": {"step": {"decay": ["mlpp"]}}}}, r"methods\.m\.sft: sft\.step\.decay: 'mlpp' matches none"),
        (
            {"m": {"sft": {"lora": {"targets": ["q_proj", "vproj"]}}}},
            r"methods\.m\.sft: lora\.targets: 'vproj' names no matrix",
        ),
        (
            {"m": {"sampling": {"decode": {"name": "unir", "reasoners": ["nowhere"]}}}},
            r"decode\.reasoners\[0\]: nowhere: no such model",
        ),
        ({"m": {"merge": {"rule": "imm", "reference": "nowhere"}}}, r"merge\.reference: nowhere: no such model"),
        (
            {"m": {"merge": {"rule": "imm", "drop": 0.1, "reference": str(ROOT / "configs" / "miniature")}}},
            r"methods\.m\.merge: reference has a leaf",
        ),
    ],
)
def test_what_would_fail_late_fails_first(tmp_path, methods, said):
    with pytest.raises(UserError, match=said):
        improve(config(methods), name="x", out=tmp_path / "run", quiet=True)
    assert committed(tmp_path / "run") == []


def test_patterns_are_tried_on_what_is_trained():
    model = shapes(build(ModelConfig, {**TINY["model"]["random"], "vocab_size": 32}, "model"))
    for sft in (
        {"stay": {"freeze": ["layers/0"]}},
        {"step": {"layers": "stacked", "decay": ["layers/stacked/mlp"]}},
        {"lora": {"rank": 2}, "step": {"decay": ["lora_A"]}},
    ):
        check_patterns(build(Sft, sft, "sft"), model)
    for sft in ({"step": {"layers": "stacked"}, "stay": {"freeze": ["layers/0"]}}, {"step": {"decay": ["lora_A"]}}):
        with pytest.raises(UserError, match="matches none"):
            check_patterns(build(Sft, sft, "sft"), model)


# --- what a run rests on ---


class Cut(Exception):
    """In place of a kill."""


def cut(*args):
    raise Cut


def test_another_reference_is_refused(tmp_path, monkeypatch):
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(ROOT / "configs" / "miniature", model)
    methods = {"m": {"merge": {"rule": "imm", "drop": 0.1, "reference": str(model)}}}
    values = config(methods, model={"path": str(ROOT / "configs" / "miniature")}, sft={**TINY["sft"], "epochs": 1})
    with monkeypatch.context() as patch:
        patch.setitem(phases.STEPS, "merge", cut)
        with pytest.raises(Cut):
            improve(values, name="x", out=out, quiet=True)
    assert set(json.loads((out / "phases/base/load/record.json").read_text())["references"]) == {str(model)}
    shutil.copy(ROOT / "configs" / "miniature-b" / "model.safetensors", model)
    with pytest.raises(UserError, match=r"merge\.reference=.*model: the weights changed since this run began"):
        improve(values, name="x", out=out, quiet=True)
    shutil.copy(ROOT / "configs" / "miniature" / "model.safetensors", model)
    improve(values, name="x", out=out, quiet=True)


def test_samples_are_of_the_models_together_and_another_model_is_refused(tmp_path, monkeypatch):
    one, other = (ROOT / "configs" / name for name in ("miniature", "miniature-b"))
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(one, model)
    family = {"family": "gcd", "domain": "id", "args": {"max_value": 30}, "train": 8, "test": 2}
    few = {"tasks": {"style": "compact", "families": [family]}}
    guided = {"name": "proxy_tuning", "expert": str(other), "antiexpert": str(model)}
    values = config({"m": {"sampling": {"decode": guided}}}, model={"path": str(one)}, **few)

    def go_to(phase, values, folder):
        with monkeypatch.context() as patch:
            patch.setitem(phases.STEPS, phase, cut)
            with pytest.raises(Cut):
                improve(values, name="x", out=folder, quiet=True)

    go_to("sample", values, out)
    found = json.loads((out / "phases/base/load/record.json").read_text())["references"]
    assert list(found) == [guided["expert"], guided["antiexpert"]]
    shutil.copy(other / "model.safetensors", model)
    with pytest.raises(UserError, match=r"sampling\.decode: .*model: the weights changed since this run began"):
        improve(values, name="x", out=out, quiet=True)
    shutil.copy(one / "model.safetensors", model)
    go_to("select", values, out)
    # one + (other - one) is the other: the same questions and keys, so the same samples.
    go_to("select", config({"m": {}}, model={"path": str(other)}, **few), tmp_path / "alone")
    together, alone = (
        [row["text"] for path in sorted(run.glob("phases/round-1/m/sample/batch-*")) for row in read_jsonl(path)]
        for run in (out, tmp_path / "alone")
    )
    assert len(alone) == 16
    assert together == alone


@pytest.mark.parametrize("what", ["answer", "text", "solution"])
def test_other_questions_are_refused(tmp_path, what):
    path, out = tmp_path / "q.jsonl", tmp_path / "run"
    lines = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    family = {"family": "gsm8k:mine", "domain": "id", "args": {"path": str(path)}, "train": 3, "test": 3}
    values = config({"plain": {}}, tasks={"families": [family]})
    one = session.build_suite(values.tasks.families, seed=0, style="instruct")
    assert one.digests() == session.build_suite(values.tasks.families, seed=0, style="instruct").digests()

    class Kept:
        root = out

        def __init__(self, **record):
            self.record = record

        def committed(self, name):
            return self.record if name == "base/load" else None

    kept = Kept(questions=one.digests())
    session.check_questions(one, kept)
    changed = {
        "answer": {"answer": "0 + 1 = 2\n#### 2"}, "text": {"question": "What is 0 + 2?"},
        "solution": {"answer": "1 + 0 = 1\n#### 1"},
    }  # fmt: skip
    lines[0] |= changed[what]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = session.build_suite(values.tasks.families, seed=0, style="instruct")
    with pytest.raises(
        UserError, match=r"solutions of gsm8k:mine \(.*q\.jsonl\) changed since this run began; restore"
    ):
        session.check_questions(other, kept)
    session.check_questions(other, Kept(digest="of a run begun before questions were kept"))


def test_a_run_does_not_go_on_with_other_questions(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setitem(phases.STEPS, "sample", cut)
        with pytest.raises(Cut):
            improve(config({"plain": {}}), name="x", out=out, quiet=True)
    draw = session.build_suite
    monkeypatch.setattr(session, "build_suite", lambda specs, *, seed, style: draw(specs, seed=seed + 1, style=style))
    with pytest.raises(UserError, match=r"solutions of gcd, chain_sum changed since this run began"):
        improve(config({"plain": {}}), name="x", out=out, quiet=True)


def test_the_speed_of_sampling_is_that_of_what_this_start_sampled(tmp_path):
    """tiny.yaml samples 24 questions in batches of 8."""
    values = config({"plain": {}})
    todo, outcomes = plan(values)
    phase = todo["round-1/plain/sample"]
    with Journal(tmp_path) as journal:
        opened, folder = session.Session(values, journal, todo, outcomes), journal.folder(phase.name)
        first = phases.sample(opened, phase, folder)
        assert first["tokens_per_second"] > 0
        assert first["generated"] == first["tokens"]
        # Cut off before it was committed, with all batches there, and with two of three.
        assert phases.sample(opened, phase, folder) == {**first, "tokens_per_second": None}
        last = folder / "batch-0002.jsonl"
        wanted = sum(len(json.loads(line)["tokens"]) for line in last.read_text().splitlines())
        last.unlink()
        settings = Settings(2, 1.0, max_new_tokens=24, slots=16)
        questions, key = opened.suite.questions("train"), jax.random.fold_in(opened.key, 1)
        model = opened.weights.model_of("base")
        rows, new, _ = generate(model, opened.suite, questions, settings, key, batch=8, folder=folder)
    assert (sum(len(row["tokens"]) for row in rows), new) == (first["tokens"], wanted)
