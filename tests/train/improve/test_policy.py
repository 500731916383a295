"""Rounds that learn from fresh samples, through the command: every option of the table, plans, and kills."""

import json
import os

import pytest
import yaml
from helpers import ROOT, forks

from train.improve.plan import plan
from train.improve.settings import Improve
from train.learn.policy import Policy
from train.log import UserError
from train.resolve import build, override

ROWS = yaml.safe_load((ROOT / "docs" / "methods" / "policy.yaml").read_text())
TINY = {
    "model": {
        "random": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.1,
        }
    },
    "tasks": {
        "style": "compact",
        "families": [
            {"family": "gcd", "domain": "id", "args": {"min_value": 1, "max_value": 30}, "train": 8, "test": 2},
            {"family": "chain_sum", "domain": "id", "args": {"min_terms": 2, "max_terms": 2}, "train": 8},
        ],
    },
    "sampling": {"samples": 4, "max_new_tokens": 16, "slots": 16},
    "sft": {"learning_rate": 3e-3, "batch": 8, "checkpoint_every": 1, "warmup": 0.0},
    "evaluation": {"max_new_tokens": 8, "slots": 8},
    "methods": {},
}  # fmt: skip
ENVIRONMENT = {
    **os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests-runs"),
    "PYTHONPATH": str(ROOT),
}  # fmt: skip


def jaxmerge(*words, die=None, code=0):
    result = forks.run(list(map(str, words)), ENVIRONMENT, cwd=ROOT, die=die)
    assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def few(values):
    """The config with one step of every method. Random weights answer nothing, and their rewards differ by length."""
    for method in values["methods"].values():
        method["improver"] = {"steps": 1, "questions": 4, "overlong_cache": 12} | method["improver"]
    return values


def test_every_row_of_the_table_learns(tmp_path):
    """All at once, each a method of one run; what they have in common is computed once."""
    assert {row["verb"] for row in ROWS} == {"improve"}
    values = few(override(TINY, [key for row in ROWS for key in row["keys"]]))
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(values))
    jaxmerge("improve", tmp_path / "rows.yaml", f"out={tmp_path / 'run'}")
    made = {line["phase"]: line for line in lines(tmp_path / "run" / "metrics.jsonl")}
    for row in ROWS:
        name = row["keys"][0].split(".")[1]
        record = made[f"round-1/{name}/policy"]
        assert (record["improver"], record["steps"]) == ("grpo", 1), name
        (step,) = lines(tmp_path / "run" / "phases" / "round-1" / name / "policy" / "steps.jsonl")
        # DAPO learns where some samples are right and others not: none are here.
        assert step["updates"] == {"dapo": 0, "tis": 2, "relift": 3}.get(name, 2), name
        assert step["samples"] == {"dapo": 3 * 16}.get(name, 16), name
        if step["updates"]:
            assert step["gradient_norm"] > 0, name
            assert 0 < step["drift_max"] < 1e-3
            assert record["digest"] != made["base/load"]["digest"]
    assert "round-1/reft/warm-up" in made


def test_killed_anywhere_a_run_goes_on_and_ends_bit_identical(tmp_path):
    """Random weights answer nothing: what moves them here are worked solutions, and then the divergence."""
    improver = {"name": "grpo", "worked": True, "beta": 0.1, "steps": 4, "questions": 2}
    values = {**TINY, "sampling": {**TINY["sampling"], "temperature": 1.0}}
    values["methods"] = {"m": {"improver": improver, "merge": {"rule": "imm"}}}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(values))
    jaxmerge("improve", tmp_path / "m.yaml", f"out={tmp_path / 'whole'}")
    run = f"out={tmp_path / 'killed'}"
    for die in (("drawing", 2), ("learning", 2), ("saving state", 1), ("drawing", 1), ("weights saved", 1)):
        jaxmerge("improve", tmp_path / "m.yaml", run, die=die, code=-9)
    jaxmerge("improve", tmp_path / "m.yaml", run)
    whole, killed = (
        {line["phase"]: line for line in lines(tmp_path / name / "metrics.jsonl")} for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    for name in ("round-1/m/policy", "round-1/m/merge"):
        assert whole[name]["digest"] == killed[name]["digest"]
        assert whole[name]["digest"] != whole["base/load"]["digest"]
    clocks = {"seconds", "tokens_per_second", "generate_seconds"}
    ours, theirs = (
        [
            {k: v for k, v in step.items() if k not in clocks}
            for step in lines(tmp_path / name / "phases/round-1/m/policy/steps.jsonl")
        ]
        for name in ("killed", "whole")
    )
    assert ours == theirs
    assert len(ours) == 4
    assert all(step["worked_loss"] > 0 for step in ours)


# --- the plan ---


def config(methods, **changes):
    return build(Improve, {**TINY, "sampling": {"samples": 2, "temperature": 1.0}, "methods": methods, **changes})


def names(methods, **changes):
    return [phase.name for phase in plan(config(methods, **changes))[0].phases if phase.round]


def test_a_round_learns_in_place_of_sampling_and_selecting_and_is_merged():
    assert names({"m": {"improver": "grpo", "merge": {"rule": "ties"}}}, rounds=2) == [
        f"round-{n}/m/{kind}" for n in (1, 2) for kind in ("policy", "merge", "evaluate")
    ]
    todo, _ = plan(config({"m": {"improver": "grpo", "merge": {"rule": "ties"}}}, rounds=2))
    assert todo["round-2/m/policy"].inputs == {"model": "round-1/m/merge"}
    assert todo["round-1/m/merge"].inputs["tuned"] == "round-1/m/policy"


def test_methods_that_learn_alike_share_it():
    todo, _ = plan(config({"a": {"improver": "grpo"}, "b": {"improver": "grpo", "merge": {"rule": "imm"}}}))
    assert todo["round-1/a/policy"].shared_by == ["b"]


def test_a_warm_up_learns_worked_solutions_before_the_first_round():
    improver = {"name": "grpo", "warm_up": {"epochs": 2, "learning_rate": 1e-4}}
    todo, _ = plan(config({"m": {"improver": improver}}, rounds=2))
    assert [p.name for p in todo.phases if p.round == 1][:3] == [
        "round-1/m/solutions", "round-1/m/warm-up", "round-1/m/policy",
    ]  # fmt: skip
    assert todo["round-1/m/solutions"].settings.real_ratio == 1.0
    warm_up = todo["round-1/m/warm-up"].settings
    assert (warm_up.epochs, warm_up.learning_rate, warm_up.batch) == (2, 1e-4, 8)
    assert todo["round-1/m/policy"].inputs == {"model": "round-1/m/warm-up"}
    assert todo["round-1/m/policy"].settings.sft.learning_rate == 3e-3
    assert todo["round-2/m/policy"].inputs == {"model": "round-1/m/policy"}


def test_a_name_alone_is_an_improver_with_its_defaults():
    assert config({"m": {"improver": "grpo"}}).methods["m"].improver == Policy()
    with pytest.raises(UserError, match=r"methods\.m\.improver\.name is 'gpro'"):
        config({"m": {"improver": "gpro"}})


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"selection": {"per_question": 1}}, r"methods\.m\.selection: a method with an improver selects no examples"),
        ({"sampling": {"source": "dart"}}, r"methods\.m\.sampling: a method with an improver reads neither source"),
        ({"sampling": {"temperature": 0.5}}, r"methods\.m\.sampling: temperature is 0\.5"),
        ({"sft": {"packing": True}}, r"methods\.m\.sft\.packing: learning from fresh samples does not read it"),
        ({"improver": {"name": "grpo", "warm_up": {"epoch": 1}}}, r"sft\.epoch: no such key; did you mean epochs"),
    ],
)
def test_what_is_not_read_is_refused(method, said):
    with pytest.raises(UserError, match=said):
        config({"m": {"improver": "grpo", **method}})
