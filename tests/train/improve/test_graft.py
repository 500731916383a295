"""Probes of a run that moves weights from base to tuned: a learned graft, and a line with the length of its answers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from helpers import ROOT

from jaxmerge.files.verdict import Unsure
from train.cli.__main__ import main
from train.improve.origin import Origin
from train.improve.plan import plan
from train.improve.session import Session
from train.improve.settings import Improve
from train.improve.verify import verify
from train.log import UserError
from train.resolve import build
from train.runtime.journal import Journal
from train.runtime.jsonl import read_jsonl

TINY = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
TASKS = {**TINY["tasks"], "families": [{**TINY["tasks"]["families"][i], "test": 8} for i in (0, 2)]}
LINE = (0.0, 0.25, 1.0, 1.5)
METHODS = {
    "plain": {},
    "graft": {"probe": {"of": "plain", "kind": "graft", "graft": {"density": 0.1, "passes": 4, "questions": 8}}},
    "valve": {"probe": {"of": "plain", "kind": "line", "coefficients": list(LINE)}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graft")
    (folder / "graft.yaml").write_text(yaml.safe_dump({**TINY, "rounds": 1, "methods": METHODS, "tasks": TASKS}))
    assert main(["improve", str(folder / "graft.yaml"), "evaluation.samples=2", f"out={folder / 'run'}"]) == 0
    settings = build(Improve, yaml.safe_load((folder / "run" / "config.yaml").read_text()))
    todo, outcomes = plan(settings)
    session = Session(settings, Journal(folder / "run"), todo, outcomes)
    names = ["base", *(phase.name for phase in todo.phases if phase.makes_weights)]
    with session.journal:
        weights = {name: jax.device_get(session.weights.get(name)) for name in names}
    rows = json.loads((folder / "run" / "summary.json").read_text())["rows"]
    return SimpleNamespace(folder=folder / "run", weights=weights, rows=rows)


def record(run, phase):
    return json.loads((run.folder / "phases" / phase / "record.json").read_text())


def test_a_graft_takes_each_parameter_from_the_base_or_from_the_tuned_model(run):
    found, made = record(run, "round-1/graft/merge"), run.weights["round-1/graft/merge"]
    base, tuned = run.weights["base"], run.weights["round-1/plain/sft"]
    moved = jax.tree.map(lambda g, b: np.abs(g - b) > 0, made, base)
    jax.tree.map(
        lambda g, b, t, m: np.testing.assert_allclose(g, np.where(m, t, b), atol=1e-6), made, base, tuned, moved
    )
    told = found["coefficients"]
    assert told["loss"] <= told["start_loss"]
    assert told["start_share"] == pytest.approx(0.1, abs=0.01)
    grafted = sum(int(np.sum(m)) for m in jax.tree.leaves(moved)) / sum(m.size for m in jax.tree.leaves(moved))
    assert told["share"] == pytest.approx(grafted, abs=1e-3)
    assert set(found["shares"]) >= {"model/layers/0", "model/layers/1", "model/embed_tokens"}
    assert {row["method"] for row in run.rows} == {"base", *METHODS}


def test_what_is_learned_is_kept_and_cannot_be_replayed(run):
    with pytest.raises(Unsure, match="training cannot be replayed"):
        verify(str(run.folder), Origin(run.folder, "round-1/graft"))


def test_the_ends_of_the_line_are_the_two_models_to_the_bit(run):
    ends = {0.0: "base", 1.0: "round-1/plain/sft"}
    for coefficient, name in ends.items():
        made = run.weights[f"round-1/valve/{coefficient:g}-merge"]
        jax.tree.map(np.testing.assert_array_equal, made, run.weights[name])
    base, tuned = run.weights["base"], run.weights["round-1/plain/sft"]
    far = jax.tree.map(lambda b, t: t + 0.5 * (t - b), base, tuned)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run.weights["round-1/valve/1.5-merge"], far)


def test_the_length_of_answers_stands_beside_their_accuracy(run):
    answers = read_jsonl(run.folder / "phases/round-1/valve/1.5-evaluate/batch-0000.jsonl", torn="drop")
    lengths = {}
    for path in sorted((run.folder / "phases/round-1/valve/1.5-evaluate").glob("batch-*.jsonl")):
        lengths |= {row["question_id"]: len(row["tokens"]) for row in read_jsonl(path, torn="drop")}
    assert len(lengths) >= len(answers)
    mine = [r for r in run.rows if r["method"] == "valve" and r["coefficient"] == 1.5 and r["family"] != "all"]
    assert sum(r["tokens"] * r["n"] for r in mine) == pytest.approx(sum(lengths.values()))
    assert [
        r["coefficient"] for r in run.rows if (r["method"], r["domain"], r["family"]) == ("valve", "id", "all")
    ] == [*LINE]
    page = (run.folder / "report.html").read_text()
    assert "Length of answers" in page
    assert "length-id" in page


def test_samples_are_ranked_beside_pass_at_k(run):
    for row in run.rows:
        assert set(row["pass_at"]) == set(row["maj_at"]) == set(row["rank_at"]) == {"1", "2"}
        assert row["maj_at"]["2"] <= row["pass_at"]["2"] + 1e-9


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ({"graft": {"density": 0.0}}, r"graft\.density is 0\.0; it must lie in \(0, 1\]"),
        ({"graft": {"passes": 0}}, "graft.passes is 0; it must be at least 1"),
        ({"graft": {"rate": 1}}, "graft.rate: no such key"),
        ({"alphas": [0.5]}, "probe.alphas is .*and a probe of kind graft does not read it; it reads graft"),
    ],
)
def test_mistakes_are_named(probe, message):
    values = {**TINY, "methods": {"plain": {}, "graft": {"probe": {"of": "plain", "kind": "graft", **probe}}}}
    with pytest.raises(UserError, match=message):
        build(Improve, values)
