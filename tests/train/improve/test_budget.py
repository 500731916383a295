"""What a plan reckons: tokens, examples, models in memory and seconds, against sums by hand."""

from __future__ import annotations

import pytest

from train.improve import budget, paper
from train.improve.budget import Amount
from train.improve.devices import GIB, Device
from train.improve.plan import plan
from train.improve.settings import Improve
from train.models.open import random_config
from train.resolve import build
from train.tasks import build_suite

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES = [
    {"family": "gcd", "domain": "id", "args": {"max_value": 60}, "train": 10, "validation": 4, "test": 6},
    {"family": "chain_sum", "domain": "ood", "args": {}, "test": 5},
]


def config(**given) -> Improve:
    values = {
        "model": {"random": SIZES}, "tasks": {"style": "compact", "families": FAMILIES}, "rounds": 2,
        "sampling": {"samples": 3, "max_new_tokens": 20, "slots": 8},
        "sft": {"epochs": 3, "batch": 4, "max_length": 64}, "evaluation": {"max_new_tokens": 24},
        "methods": {"plain": {}, "imm": {"merge": {"rule": "imm"}}},
    }  # fmt: skip
    return build(Improve, {**values, **given})


def work(given: Improve):
    suite = build_suite(given.tasks.families, seed=given.tasks.seed, style=given.tasks.style)
    found = budget.work_of(given, suite, plan(given)[0])
    return {phase.name: done for phase, done in found}


def test_what_is_sampled_learnt_and_asked():
    found = work(config())
    assert found["round-1/plain/sample"].answers.most == 10 * 3 * 20
    assert found["round-2/imm/sample"].answers.most == 10 * 3 * 20
    assert found["base/evaluate"].answers.most == 11 * 24
    assert found["round-1/plain/sft"].examples == Amount(10 * 1.5 * 3, 10 * 3 * 3)
    assert found["round-1/plain/sft"].length.most == 64
    assert 0 < found["round-1/plain/sample"].answers.about < found["round-1/plain/sample"].answers.most
    few = work(config(selection={"per_question": 1, "real_ratio": 0.5, "data": "accumulated"}))
    assert few["round-1/plain/sft"].examples.most == (5 + 5) * 3
    assert few["round-2/plain/sft"].examples.most == 2 * (5 + 5) * 3
    drawn = work(config(evaluation={"max_new_tokens": 24, "samples": 7}))
    assert drawn["base/evaluate"].answers.most == (11 + 7 * 11) * 24
    assert drawn["round-1/imm/evaluate"].answers.most == 11 * 24


def test_searches_and_rankings_are_counted():
    search = {"iterations": 4, "children": 2, "samples": 2}
    found = work(config(sampling={"source": "mcts", "max_new_tokens": 20, "slots": 8, "search": search}))
    # Expanded nodes, each with a hint and two steps with their scores; then two texts from the plan.
    assert found["round-1/plain/sample"].answers.most == 10 * (4 * (64 + 2 * (20 + 16)) + 2 * 20)
    dart = {"source": "dart", "max_new_tokens": 20, "search": {"dart": {"right": 2, "samples": 4, "most": 9}}}
    assert work(config(sampling=dart))["round-1/plain/sample"].answers.most == 10 * 9 * 20
    methods = {
        "plain": {"sft": {"snapshots": 3}}, "best": {"probe": {"of": "plain", "kind": "best"}},
        "imm": {"merge": {"rule": "imm", "alpha": {"search": [0.3, 0.5]}}},
    }  # fmt: skip
    found = work(config(methods=methods))
    assert found["round-2/best/rank"].answers.most == 3 * 4 * 24
    assert found["round-1/imm/merge"].answers.most == 2 * 4 * 24


def test_fresh_samples_are_drawn_and_learnt_step_by_step():
    """Five steps of 4 questions × 3 samples, learnt twice; other questions may be asked twice more."""
    improver = {"name": "grpo", "steps": 5, "questions": 4, "iterations": 2, "redraws": 2, "warm_up": {"epochs": 2}}
    sampling = {"samples": 3, "max_new_tokens": 20, "slots": 8, "temperature": 1.0}
    found = work(config(methods={"m": {"improver": improver}}, sampling=sampling))
    done = found["round-1/m/policy"]
    assert (done.answers.most, done.slots) == (5 * 4 * 3 * 20 * 3, 8)
    assert (done.examples.about, done.examples.most) == (5 * 4 * 3 * 2,) * 2
    assert found["round-1/m/warm-up"].examples.most == 2 * 10
    assert "round-2/m/warm-up" not in found


def test_models_that_are_held_are_those_that_a_run_holds():
    def beside(**given):
        return budget.models_beside(one := config(**given), plan(one)[0])

    alone = {"methods": {"imm": {"merge": {"rule": "imm"}}}}
    assert beside(**alone, rounds=1)["sft"] == 1
    assert beside(**alone, rounds=1)["merge"] == 2  # the original and the tuned one
    assert beside(**alone)["sft"] == 2  # the original, and what round 1 ended with
    offloaded = {"methods": {"imm": {"merge": {"rule": "imm", "offload": True}}}}
    assert beside(**offloaded)["sft"] == 1
    # What the other method ended its round with waits too.
    assert beside()["sft"] == 3


def test_memory_is_that_of_the_programs_and_the_models_beside_them():
    given, model = config(), random_config(SIZES)
    found = budget.memory(given, model, plan(given)[0], read=30)
    one = 4 * paper.parameters(model)
    tuned = found["fine-tuning"]
    assert (tuned["masters"], tuned["moments"], tuned["gradients"]) == (one, 2 * one, one)
    assert tuned["models beside"] == 3 * one
    assert found["sampling"]["caches"] == 2 * 4 * 2 * 2 * 32 * (30 + 20) * 8
    assert found["evaluating"]["caches"] == 2 * 4 * 2 * 2 * 32 * (30 + 24) * 64
    spread = config(mesh={"fsdp": 2, "gather_to_decode": True})
    halved = budget.memory(spread, model, plan(spread)[0], read=30)
    assert halved["fine-tuning"]["moments"] == one
    assert halved["sampling"]["weights"] == one  # gathered, in the float32 that this model computes in


def test_seconds_are_bytes_over_bandwidth_and_products_over_their_peak():
    given, model = config(), random_config(SIZES)
    count, slow = paper.parameters(model), Device(GIB, flops=1e30, hbm_rate=1e6)
    sampled = budget.Work(answers=Amount(80, 160), slots=8)
    caches = 2 * 4 * 2 * 2 * 32 * 10 * 8
    step = (4 * count + caches) / (1e6 * budget.DECODING)
    assert budget.seconds(given, model, sampled, slow).most == pytest.approx(160 / 8 * step)
    assert budget.seconds(given, model, sampled, slow).about == pytest.approx(80 / 8 * step)
    learnt = budget.Work(examples=Amount(10, 20), length=Amount(32, 64))
    busy = Device(GIB, flops=1e9, hbm_rate=1e30)
    every = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    head = model.vocab_size * 64
    wanted = 6 * (every * 20 * 64 + head * 20 * 64 / 2) + 12 * 2 * 2 * 32 * 20 * 64**2
    assert budget.seconds(given, model, learnt, busy).most == pytest.approx(wanted / (1e9 * budget.TRAINING))
    two = config(mesh={"data": 2})
    assert budget.seconds(two, model, learnt, busy).most == pytest.approx(wanted / (2e9 * budget.TRAINING))
