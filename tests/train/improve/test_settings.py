"""Configs: every mistake is named, every file under configs/ builds, and what is resolved builds again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from train.generate.decodings import ProxyTuning, UniR
from train.improve.plan import check_sampled, plan, spell
from train.improve.settings import Improve
from train.learn.settings import Finetune, Sft
from train.log import UserError
from train.resolve import build, load, override, read_yaml, to_dict
from train.runtime.folder import differences, fingerprint
from train.search.settings import SearchRun
from train.studies.sweep import Experiment

CONFIGS = ROOT / "configs"
TINY = CONFIGS / "tiny.yaml"


def kind(path: Path) -> type:
    keys = yaml.safe_load(path.read_text())
    if "sweep" in keys:
        return Experiment
    return Finetune if "data" in keys else SearchRun if "questions" in keys else Improve


VERB = {Finetune: "sft", SearchRun: "search", Improve: "improve", Experiment: "improve"}


@pytest.mark.parametrize(
    "path", [p for p in sorted(CONFIGS.glob("**/*.yaml")) if p.parent.name != "recipes"], ids=lambda p: p.stem
)
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
        ("merge=[", "is no YAML"),
        ("seed=18446744073709551616", "seed is 18446744073709551616; a whole number of 64 bits is wanted"),
        ("sft.learning_rate=.inf", r"sft\.learning_rate is inf; a finite number is wanted"),
        (f"sft.learning_rate=1{'0' * 400}", r"sft\.learning_rate is a number of 401 digits"),
        ("rounds=[&a [x], *a, *a]", r"rounds is \[\['x'\], \['x'\], \['x'\]\]; int is wanted"),
        ("merge.alpha=.nan", "give a finite number"),
        ("merge.alpha={search: []}", "with one α or more"),
        ("methods.expo.probe.alphas=[0.1, 0.3]", "an expo probe needs one alpha"),
        ("methods.expo.probe.rounds=[5]", "the run has rounds 1 to 2"),
        ("methods.expo.sft.epochs=3", "is a probe: it trains nothing"),
        ("merge.alpha={search: [0.3, {'**': [0.3, 0.7]}]}", "merge.alpha.search holds {'\\*\\*'.*finite numbers"),
        ("merge.alpha={search: [.inf]}", "merge.alpha.search holds inf"),
        ("merge.alpha={importance: [0.1, high]}", "merge.alpha.importance holds 'high'"),
        (
            "methods.plain.merge={alpha: 0.7, drop: 0.2}",
            r"plain\.merge sets alpha, drop.*set methods\.plain\.merge\.rule",
        ),
        ("methods.expo.probe.search=grid", r"probe\.search is 'grid', and a probe of kind expo does not read it"),
        ("methods.line.probe.parameters={density: 1}", r"parameters is {'density': 1}, and a probe of kind line"),
        ("methods.exme.probe.coefficients=[1.0]", "kind exme does not read it; it reads best, search, alphas, weights"),
        ("methods.exme.probe={of: plain, kind: exme, search: grid, alphas: [0.1]}", "exme with a search does not read"),
        ("methods.expo.probe={of: plain, kind: best, best: 3}", "kind best does not read it; it reads none of these"),
        ("methods.plain.sampling={source: dart, samples: 8}", r"plain\.sampling\.samples is 8, and source: dart"),
        ("methods.plain.sampling={source: dart, search: {beam: 2}}", "search.beam: source: dart does not read it"),
        ("methods.plain.sampling={source: tot, search: {kind: mcts}}", "search.kind: source: tot does not read it"),
        ("sft.step.clip=0", r"sft\.step\.clip is 0\.0; it must be above 0.*give a large one"),
        ("methods={a-b: {}, a_b: {}}", "a-b and a_b differ in - and _ alone"),
        ("methods={Imm: {}}", "a-z, 0-9"),
        ('sampling.stop=[""]', "sampling.stop holds an empty string"),
        ("evaluation.splits=[train]", r"evaluation\.splits\[0\] is 'train'"),
    ],
)
def test_a_mistake_is_named(assignment, message):
    with pytest.raises(UserError, match=message):
        load(Improve, TINY, [assignment])


@pytest.mark.parametrize(
    "assignment",
    [
        "methods.plain.merge={rule: none, alpha: 0.7}",  # said in so many words
        "methods.plain.merge={offload: true}",  # has its effect under any rule
        "sampling={source: mcts, samples: 8, search: {iterations: 4, beam: 2}}",  # shared: methods may read it
        "methods.plain.sampling={source: tot, search: {kind: tot, beam: 2}}",
        "methods.expo.probe={of: plain, kind: exme, best: 1, search: staged}",
        "sft.step.clip=1e9",
    ],
)
def test_what_is_read_or_inherited_is_no_mistake(assignment):
    load(Improve, TINY, [assignment])


def test_a_measured_alpha_in_a_list_needs_validation_questions():
    families = [{"family": "gcd", "domain": "id", "train": 4, "test": 4}]
    values = {**yaml.safe_load(TINY.read_text()), "methods": {"imm": {"merge": {"rule": "imm"}}}}
    values["tasks"] = {"style": "compact", "families": families}
    build(Improve, values)
    values["methods"]["imm"]["merge"]["alpha"] = [0.5, {"importance": [0.1, 0.5]}]
    with pytest.raises(UserError, match=r"methods\.imm\.merge\.alpha: importance needs validation questions"):
        build(Improve, values)


def test_overrides_reach_every_depth():
    config = load(Improve, TINY, ["rounds=3", "sft.learning_rate=2e-5", "methods.imm.merge.alpha=0.6", "mesh.fsdp=2"])
    assert (config.rounds, config.sft.learning_rate, config.mesh.fsdp) == (3, 2e-5, 2)
    assert config.block("imm", "merge").alpha == 0.6
    assert config.block("plain", "merge").rule == "none"


def test_a_method_may_choose_another_kind_than_the_run():
    run, own = {"name": "proxy_tuning", "expert": "e", "antiexpert": "a"}, "methods.plain.sampling.decode"
    values = override(read_yaml(TINY), [f"sampling.decode={run}"])
    assert build(Improve, override(values, [f"{own}={{alpha: 2}}"])).block("plain", "sampling").decode == ProxyTuning(
        expert="e", antiexpert="a", alpha=2.0
    )
    other = build(Improve, override(values, [f"{own}={{name: unir, reasoners: [r]}}"]))
    assert other.block("plain", "sampling").decode == UniR(reasoners=("r",))
    assert other.block("imm", "sampling").decode == ProxyTuning(expert="e", antiexpert="a")


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="no such config; did you mean"):
        load(Improve, CONFIGS / "tini.yaml")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is no YAML"):
        load(Improve, tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(UserError, match="a config is one map"):
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
    # The last selection holds all earlier ones.
    third = phase("round-3/imm/select", "selection.data=accumulated", "rounds=3")
    assert third.inputs == {"samples": "round-3/imm/sample", "earlier-0": "round-2/imm/select"}


def test_numbers_in_names_are_short_and_never_shared():
    near = [0.1234567, 0.1234568, 0.25, 1.0, 3, 1e-7]
    assert [spell(x) for x in near] == ["0.1234567", "0.1234568", "0.25", "1", "3", "1e-07"]
    methods = "methods={plain: {}, line: {probe: {of: plain, kind: line, coefficients: [0.1234567, 0.1234568]}}}"
    lines = [name for name in names(methods) if "/line/" in name]
    assert len(lines) == len(set(lines)) == 4


def test_samples_that_nobody_would_draw_are_refused():
    only = ["evaluation.samples=8", "evaluation.splits=[validation]"]
    with pytest.raises(UserError, match=r"evaluation\.samples is 8.*splits is \['validation'\]"):
        check_sampled(load(Improve, TINY, only))
    for fine in ([*only[1:], "evaluation.samples=0"], [only[0], "evaluation.splits=[validation, test]"]):
        check_sampled(load(Improve, TINY, fine))


def test_exme_needs_two_checkpoints_and_validation():
    with pytest.raises(UserError, match="snapshots to 2 or more"):
        names("sft.snapshots=1")


def test_schedules():
    from train.learn.optim import learning_rates

    config = Sft(learning_rate=1.0, warmup=0.1)
    rates = [*learning_rates(config, 100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    constant = dataclasses.replace(config, schedule="constant", warmup=0.0)
    assert {*learning_rates(constant, 100)} == {1.0}
