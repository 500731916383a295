"""Merges measured on the way and models made of checkpoints, in whole runs of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml
from helpers import ROOT

import jaxmerge
from train.improve import probes
from train.improve.plan import plan
from train.improve.run import improve
from train.improve.session import Session
from train.improve.settings import Improve
from train.log import UserError
from train.resolve import build
from train.runtime.journal import Journal
from train.runtime.jsonl import read_jsonl
from train.tasks import Question

TINY = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
METHODS = {
    "plain": {},
    "adaptive": {"merge": {"rule": "imm", "alpha": {"importance": [0.2, 0.8]}}},
    "average": {"merge": {"rule": "imm", "anchor": "average"}},
    "ties": {"merge": {"rule": "ties", "parameters": {"density": 0.4}}},
    "searched": {"probe": {"of": "plain", "kind": "exme", "search": "staged"}},
    "best": {"probe": {"of": "plain", "kind": "best"}},
    "mean": {"probe": {"of": "plain", "kind": "merge", "rule": "average"}},
    "stock": {"probe": {"of": "plain", "kind": "merge", "rule": "model_stock"}},
}


def config(methods=METHODS, **more) -> Improve:
    values = {**TINY, "methods": methods, **more}
    return build(Improve, {**values, "evaluation": {**TINY["evaluation"], "samples": 4, **more.get("evaluation", {})}})


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    return improve(config(), name="probes", out=tmp_path_factory.mktemp("probes") / "run", quiet=True)


def record(folder: Path, phase: str) -> dict:
    return json.loads((folder / "phases" / phase / "record.json").read_text())


def opened(folder: Path) -> Session:
    todo, outcomes = plan(config())
    return Session(config(), Journal(folder), todo, outcomes)


def test_every_method_ends_with_its_scores(done):
    summary = json.loads((done / "summary.json").read_text())
    assert {row["method"] for row in summary["rows"]} == {"base", *METHODS}


def test_alpha_by_layer_follows_what_was_measured(done):
    for number in (1, 2):
        found = record(done, f"round-{number}/adaptive/merge")["coefficients"]
        risk = [i * c for i, c in zip(found["importance"], found["change"], strict=True)]
        wanted = [0.2, 0.8] if risk[0] > risk[1] else [0.8, 0.2]
        assert [found["alpha"][f"model/layers/{i}"] for i in range(2)] == wanted
        assert found["alpha"]["**"] == 0.5
        assert all(i > 0 for i in found["importance"])


def test_the_running_average_is_of_the_original_and_every_round(done):
    """Round 2 merges with the mean of the original and of what round 1 ended with."""
    run = opened(done)
    with run.journal:
        base, first = run.weights.get("base"), run.weights.get("round-1/average/merge")
        tuned, merged = run.weights.get("round-2/average/sft"), run.weights.get("round-2/average/merge")
    wanted = jax.tree.map(lambda b, f, t: 0.5 * (b + f) / 2 + 0.5 * t, base, first, tuned)
    jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-6) or pytest.fail(f"{a} {b}"), merged, wanted)


def test_probes_are_what_the_library_makes_of_the_checkpoints(done):
    run = opened(done)
    with run.journal:
        snapshots = [run.weights.read(path) for path in run.weights.snapshots("round-2/plain/sft")]
        base = run.weights.get("base")
        ranked = record(done, "round-2/searched/rank")["best"]
        found = record(done, "round-2/searched/merge")["coefficients"]["found"]
        wanted = {
            "mean": jaxmerge.average(snapshots),
            "stock": jaxmerge.model_stock(snapshots, base=base),
            "best": snapshots[ranked[0]],
            "searched": jaxmerge.exme_merge([snapshots[i] for i in ranked[:2]], base)(**found),
        }
        for name, params in wanted.items():
            made = run.weights.get(f"round-2/{name}/merge")
            assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), made, params))) < 1e-6


def test_a_search_says_what_it_cost_and_never_chooses_worse_than_a_checkpoint(done):
    found = record(done, "round-2/searched/merge")
    trials = read_jsonl(done / "phases/round-2/searched/merge/trials.jsonl", torn="drop")
    assert found["trials"] == len(trials) > 5
    assert found["validation"] == max(t["score"] for t in trials)
    assert found["validation"] >= max(record(done, "round-2/searched/rank")["scores"])
    assert found["search_seconds"] > 0


def test_a_search_cut_off_goes_on_from_its_trials(done, tmp_path, monkeypatch):
    methods = {name: METHODS[name] for name in ("plain", "searched")}
    out, append = tmp_path / "cut", probes.append_jsonl

    def fifth(path, row):
        append(path, row)
        if row["number"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(probes, "append_jsonl", fifth)
    with pytest.raises(KeyboardInterrupt):
        improve(config(methods), name="cut", out=out, quiet=True)
    monkeypatch.setattr(probes, "append_jsonl", append)
    asked = []
    validate = Session.validate
    monkeypatch.setattr(Session, "validate", lambda self, *args: asked.append(args[1].name) or validate(self, *args))
    improve(config(methods), name="cut", out=out, quiet=True)
    searched = [name for name in asked if name.startswith("trial")]
    assert searched[0] == "trial-0005"
    wanted = record(done, "round-2/searched/merge")
    found = record(out, "round-2/searched/merge")
    assert found["digest"] == wanted["digest"]
    assert found["trials"] == wanted["trials"] == 5 + len(searched)


def test_pass_at_k_of_the_last_round_and_the_base(done):
    summary = json.loads((done / "summary.json").read_text())
    for row in summary["rows"]:
        sampled = row["split"] == "test" and row["round"] in (0, 2)
        assert ("pass_at" in row) == sampled
        if sampled:
            values = [row["pass_at"][k] for k in ("1", "2", "4")]
            assert values == sorted(values)
            assert 0 <= values[0] <= values[-1] <= 1


def test_without_the_base_nothing_is_compared_with_it(tmp_path):
    small = config({"plain": {}}, rounds=1, evaluation={"base": False, "samples": 0})
    summary = json.loads((improve(small, name="x", out=tmp_path / "run", quiet=True) / "summary.json").read_text())
    assert {row["method"] for row in summary["rows"]} == {"plain"}
    assert not summary["paired"]


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        ({"kind": "merge"}, r"probe\.rule is ''; kind: merge takes one of"),
        ({"kind": "expo", "rule": "ties"}, r"probe\.rule is 'ties'; kind: merge takes"),
        ({"kind": "exme", "best": 3}, "an exme probe of 3 snapshots needs as many alphas"),
        (
            {"kind": "exme", "best": 3, "search": "staged"},
            "which keeps 2 a round; set methods.plain.sft.snapshots to 3",
        ),
    ],
)
def test_mistakes_are_named(probe, said):
    with pytest.raises(UserError, match=said):
        plan(config({"plain": {}, "probe": {"probe": {"of": "plain", **probe}}}))


def test_lines_are_checked_with_as_many_questions_as_the_mean_over_domains_is_worth():
    def asked(**counts):
        return [
            Question(f"{d}{i}", "f", d, "validation", "", "", None, {}) for d, n in counts.items() for i in range(n)
        ]

    assert probes.effective_size(asked(id=20)) == 20
    assert probes.effective_size(asked(id=20, ood=20)) == 40
    assert probes.effective_size(asked(id=90, ood=10)) == 36  # 2² / (1/90 + 1/10)
    assert probes.effective_size([]) == 0
