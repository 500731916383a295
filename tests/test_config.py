"""Configs: every mistake is named, every file under configs/ builds, and what is resolved builds again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from train.config import Finetune, Improve, Sft
from train.log import UserError
from train.plan import plan
from train.resolve import build, differences, fingerprint, load, override, to_dict
from train.search.settings import SearchRun
from train.sweeps.run import Experiment

CONFIGS = Path(__file__).parent.parent / "configs"
TINY = CONFIGS / "tiny.yaml"


def kind(path: Path) -> type:
    keys = yaml.safe_load(path.read_text())
    if "sweep" in keys:
        return Experiment
    return Finetune if "data" in keys else SearchRun if "questions" in keys else Improve


VERB = {Finetune: "sft", SearchRun: "search", Improve: "improve", Experiment: "improve"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda p: p.stem)
def test_every_config_builds_and_says_how_it_is_run(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"jaxmerge {VERB[kind(path)]} configs/{path.relative_to(CONFIGS)}" in h for h in head)
    assert any("Device:" in h for h in head)
    assert any("Metric:" in h for h in head)
    if kind(path) is Experiment:
        Experiment.of(path.stem, yaml.safe_load(path.read_text()))
        return
    config = load(kind(path), path)
    again = build(kind(path), yaml.safe_load(yaml.safe_dump(to_dict(config))))
    assert again == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("round=3", r"round: no such key; did you mean rounds\?"),
        ("merge.alpah=1", r"merge\.alpah: no such key; did you mean alpha\?"),
        ("rounds=two", "rounds is 'two'; int is wanted"),
        ("rounds=0", r"rounds is 0; it must be at least 1"),
        ("rounds=true", "rounds is True; int is wanted"),
        ("sft.learning_rate=fast", "sft.learning_rate is 'fast'; float is wanted"),
        ("merge.drop=1.5", r"merge\.drop is 1\.5; it must lie in \[0, 1\)"),
        ("merge.anchor=first", "merge.anchor is 'first'; it must be one of original, previous"),
        ("sampling.temperature=0", "they would all be the same"),
        ("sft.micro_batch=3", "must divide"),
        ("methods.imm.merge.alhpa=1", r"methods\.imm\.merge\.alhpa: no such key; did you mean alpha\?"),
        ("methods.base={}", "not `base`"),
        ("methods.expo.probe.of=nobody", "must be a trained method: plain, imm"),
        ("tasks=3", "tasks is 3; a map of keys is wanted"),
        ("tasks.families=[]", "at least one family with domain: id"),
        ("model.path=somewhere", "not both"),
        ("rounds", "overrides are written key=value"),
        ("merge=[", "not YAML"),
        ("merge.alpha=.nan", "give a finite number"),
        ("merge.alpha={search: []}", "with one α or more"),
        ("methods.expo.probe.alphas=[0.1, 0.3]", "an expo probe needs one alpha"),
        ("methods.expo.probe.rounds=[5]", "the run has rounds 1 to 2"),
        ("methods.expo.sft.epochs=3", "is a probe: it trains nothing"),
        ("methods={a-b: {}, a_b: {}}", "a-b and a_b differ in - and _ alone"),
        ("methods={Imm: {}}", "a-z, 0-9"),
        ('sampling.stop=[""]', "sampling.stop holds an empty string"),
        ("evaluation.splits=[train]", r"evaluation\.splits\[0\] is 'train'"),
    ],
)
def test_a_mistake_is_named(assignment, message):
    with pytest.raises(UserError, match=message):
        load(Improve, TINY, [assignment])


def test_overrides_reach_every_depth():
    config = load(Improve, TINY, ["rounds=3", "sft.learning_rate=2e-5", "methods.imm.merge.alpha=0.6", "mesh.fsdp=2"])
    assert (config.rounds, config.sft.learning_rate, config.mesh.fsdp) == (3, 2e-5, 2)
    assert config.block("imm", "merge").alpha == 0.6
    assert config.block("plain", "merge").rule == "none"


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="no such config; did you mean"):
        load(Improve, CONFIGS / "tini.yaml")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not YAML"):
        load(Improve, tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(UserError, match="a config is a map"):
        load(Improve, tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("rounds: 1")
    with pytest.raises(UserError, match="model is missing"):
        load(Improve, tmp_path / "c.yaml")


def test_fingerprint_and_differences():
    a, b = load(Improve, TINY), load(Improve, TINY, ["seed=1", "merge.alpha=0.6"])
    assert fingerprint(a) == fingerprint(load(Improve, TINY)) != fingerprint(b)
    assert differences(to_dict(b), to_dict(a)) == ["merge.alpha: 0.5 → 0.6", "seed: 0 → 1"]


def test_override_does_not_change_its_input():
    values = {"a": {"b": 1}}
    assert override(values, ["a.b=2", "c.d=x"]) == {"a": {"b": 2}, "c": {"d": "x"}}
    assert values == {"a": {"b": 1}}


def test_every_block_of_every_method_overrides_only_what_it_names():
    config = load(Improve, TINY, ["methods.plain.sft.epochs=9"])
    assert config.block("plain", "sft") == dataclasses.replace(config.sft, epochs=9)
    assert config.block("imm", "sft") == config.sft


def names(*assignments: str) -> list[str]:
    return [p.name for p in plan(load(Improve, TINY, assignments))[0].phases]


def test_the_plan_reads_like_the_papers():
    phases = names("methods={plain: {}, imm: {merge: {rule: imm}}}")
    assert phases == [
        "base/load",
        "base/evaluate",
        "round-1/plain/sample",
        "round-1/plain/select",
        "round-1/plain/sft",
        "round-1/plain/evaluate",
        "round-1/imm/merge",
        "round-1/imm/evaluate",
        "round-2/plain/sample",
        "round-2/plain/select",
        "round-2/plain/sft",
        "round-2/plain/evaluate",
        "round-2/imm/sample",
        "round-2/imm/select",
        "round-2/imm/sft",
        "round-2/imm/merge",
        "round-2/imm/evaluate",
    ]


def test_decisions_of_the_paper_change_the_plan():
    def phase(name, *assignments):
        config = load(Improve, TINY, ["methods={imm: {merge: {rule: imm}}}", *assignments])
        return plan(config)[0][name]

    assert phase("round-2/imm/merge").inputs["anchor"] == "base"
    assert phase("round-2/imm/merge", "merge.anchor=previous").inputs["anchor"] == "round-1/imm/merge"
    assert phase("round-2/imm/sft").inputs["model"] == "round-1/imm/merge"
    assert phase("round-2/imm/sft", "sft.start=original").inputs["model"] == "base"
    assert set(phase("round-2/imm/select").inputs) == {"samples"}
    accumulated = phase("round-2/imm/select", "selection.data=accumulated")
    assert accumulated.inputs["earlier-0"] == "round-1/imm/select"


def test_exme_needs_two_checkpoints_and_validation():
    with pytest.raises(UserError, match="snapshots to 2 or more"):
        names("sft.snapshots=1")


def test_schedules():
    from train.learn.optim import learning_rate

    config = Sft(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    constant = dataclasses.replace(config, schedule="constant", warmup=0.0)
    assert {learning_rate(constant, step, 100) for step in range(100)} == {1.0}
