"""Branch-and-Merge: parts of a round's examples, models of their own, one merge; its limits are the plain round."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import yaml
from helpers import ROOT

import jaxmerge
from train.cli.__main__ import main
from train.improve import phases
from train.improve.branch import part_of
from train.improve.origin import Origin
from train.improve.plan import plan
from train.improve.run import improve
from train.improve.session import Session
from train.improve.settings import Improve
from train.improve.verify import verify
from train.log import UserError
from train.resolve import build
from train.runtime.journal import Journal
from train.studies.settings import AnalyseOptions
from train.studies.study import open_study

TINY = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
BAM = {"sft": {"start": "merged"}, "branch": {"count": 2}}


def config(methods, **more) -> Improve:
    return build(Improve, {**TINY, "rounds": 1, "methods": methods, **more})


def test_parts_are_disjoint_whole_and_even():
    rows = [{"question_id": f"q{i % 7}", "completion": str(i)} for i in range(20)]
    parts = [part_of(rows, i, 3, seed=4) for i in (1, 2, 3)]
    asked = [{row["question_id"] for row in part} for part in parts]
    assert sorted(map(len, asked)) == [2, 2, 3]
    assert len(set.union(*asked)) == 7
    assert sorted(row["completion"] for part in parts for row in part) == sorted(row["completion"] for row in rows)
    assert parts == [part_of(rows, i, 3, seed=4) for i in (1, 2, 3)]
    assert parts != [part_of(rows, i, 3, seed=5) for i in (1, 2, 3)]


def test_one_branch_is_the_plain_plan():
    plain, _ = plan(config({"plain": {}}, rounds=2))
    one, _ = plan(config({"plain": {"branch": {"count": 1, "rule": "ties"}}}, rounds=2))
    assert one.phases == plain.phases


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("branch")
    methods = {"plain": {}, "bam": BAM, "bam-imm": {**BAM, "merge": {"rule": "imm", "alpha": 0.5}}}
    (folder / "branch.yaml").write_text(yaml.safe_dump({**TINY, "methods": methods}, sort_keys=False))
    assert main(["improve", str(folder / "branch.yaml"), "rounds=1", f"out={folder / 'run'}"]) == 0
    return folder / "run"


def test_the_branches_are_averaged_and_the_merge_with_the_anchor_follows(done):
    settings = build(Improve, yaml.safe_load((done / "config.yaml").read_text()))
    todo, outcomes = plan(settings)
    run = Session(settings, Journal(done), todo, outcomes)
    with run.journal:
        ends = [run.weights.get(f"round-1/bam/branch-{i}-sft") for i in (1, 2)]
        base, made = run.weights.get("base"), run.weights.get("round-1/bam/join")
        merged = run.weights.get("round-1/bam-imm/merge")
        parts = [run.read_examples(todo[f"round-1/bam/branch-{i}-part"]) for i in (1, 2)]
        whole = run.read_examples(todo["round-1/plain/select"])
    jax.tree.map(np.testing.assert_array_equal, made, jaxmerge.average(ends))
    jax.tree.map(np.testing.assert_array_equal, merged, jaxmerge.imm([made], base=base, alpha=0.5))
    assert sum(map(len, parts)) == len(whole)
    assert not {e["question_id"] for e in parts[0]} & {e["question_id"] for e in parts[1]}
    assert {row["method"] for row in json.loads((done / "summary.json").read_text())["rows"]} == {
        "base", "plain", "bam", "bam-imm"
    }  # fmt: skip


def test_what_training_ended_with_is_the_merge_of_the_branches(done):
    assert [r.tuned for r in open_study(done, AnalyseOptions(method="bam")).rounds] == ["round-1/bam/join"]
    assert "branch 2" in (done / "report.html").read_text()
    assert verify(str(done), Origin(done, ""))["code"] == 0


def test_branches_that_learn_the_same_are_the_plain_round(done, tmp_path, monkeypatch):
    """The mean of equal models is that model, to the bit."""
    monkeypatch.setattr(phases, "part_of", lambda examples, part, of, seed: examples)
    again = improve(config({"bam": BAM}), name="same", out=tmp_path / "run", quiet=True)
    digests = [
        json.loads((folder / "phases" / phase / "record.json").read_text())["digest"]
        for folder, phase in ((again, "round-1/bam/join"), (done, "round-1/plain/sft"))
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"bam": {"branch": {"rule": "mean"}}}, "branch.rule is 'mean'; it must be one of"),
        ({"bam": {"branch": {"count": 0}}}, "branch.count is 0; it must be at least 1"),
        ({"bam": {"branch": {"many": 2}}}, r"methods\.bam\.branch\.many: no such key"),
        (
            {"bam": BAM, "best": {"probe": {"of": "bam", "kind": "best"}}},
            "methods.best: best takes checkpoints of one fine-tuning, and bam branches into 2",
        ),
    ],
)
def test_mistakes_are_named_before_anything_runs(methods, message):
    with pytest.raises(UserError, match=message):
        plan(config(methods))


def test_a_rule_that_cannot_merge_the_branches_is_refused_at_the_start(tmp_path):
    three = {"bam": {"branch": {"count": 3, "rule": "slerp"}}}
    with pytest.raises(UserError, match=r"methods\.bam\.branch: slerp of 3 branches: .*2"):
        improve(config(three), name="three", out=tmp_path / "run", quiet=True)
