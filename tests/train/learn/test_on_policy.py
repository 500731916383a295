"""Learning from fresh samples: the loop learns, says how, and goes on after a kill as if there had been none."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.sft_cases import InMemory, Killed, assert_bits, kill_after

from train.generate.rollout import Prompt
from train.generate.settings import Settings
from train.learn.checkpoints import SftCheckpoints
from train.learn.curriculum import Curriculum
from train.learn.on_policy import Questions, learn_on_policy
from train.learn.policy import Policy
from train.learn.settings import Sft
from train.log import UserError
from train.models.characters import encode
from train.models.config import Lora

SFT = Sft(learning_rate=3e-3, batch=16, warmup=0.0, schedule="constant", checkpoint_every=2)
DRAWING = Settings(samples=4, temperature=1.0, max_new_tokens=8, slots=16)
POLICY = Policy(steps=5, questions=4)
TIMED = ("seconds", "tokens_per_second", "generate_seconds")
QUESTIONS = Questions(
    [Prompt(f"q{i}", tuple(encode(f"{i + 10}+{i}?"))) for i in range(8)],
    ["even", "odd"] * 4,
    [tuple(encode(f"{2 * i + 10}")) for i in range(8)],
)


def digits(samples):
    """The share of a sample's tokens that are digits; one in nine samples cannot be judged."""
    wanted = set(encode("0123456789"))
    shares = [sum(t in wanted for t in s.tokens) / len(s.tokens) for s in samples]
    return [None if len(s.tokens) % 9 == 0 else share for s, share in zip(samples, shares, strict=True)]


def learn(model, mesh, policy=POLICY, config=SFT, **given):
    return learn_on_policy(model, QUESTIONS, digits, policy, DRAWING, config, mesh=mesh, seed=3, **given)


def timeless(log):
    return [{k: v for k, v in metrics.items() if k not in TIMED} for metrics in log]


def test_what_is_rewarded_becomes_more(model, mesh):
    """Of 64 symbols ten are digits; after 30 steps most are."""
    _, log = learn(model, mesh, dataclasses.replace(POLICY, steps=30), dataclasses.replace(SFT, learning_rate=1e-2))
    rewards = [metrics["reward"] for metrics in log]
    assert np.mean(rewards[:3]) < 0.3
    assert np.mean(rewards[-3:]) > 0.7
    assert all(0 < metrics["drift_max"] < 1e-4 for metrics in log)  # never 0: two programs round differently
    assert all(metrics["samples"] == 16 for metrics in log)
    assert all(metrics["updates"] == 1 for metrics in log)
    assert all(metrics["clipped"] == 0 for metrics in log)


CASES = {
    "one update": (POLICY, SFT),
    "several updates, a bandit, solutions": (
        dataclasses.replace(
            POLICY, iterations=2, beta=0.1, importance_cap=2.0, redraws=1, worked=True,
            curriculum=Curriculum(temperature=0.1),
        ),
        dataclasses.replace(SFT, batch=8),
    ),
    "samples left out": (
        dataclasses.replace(POLICY, skip_equal=True, advantage="mean"), dataclasses.replace(SFT, batch=8, micro_batch=4)
    ),
    "an adapter": (POLICY, dataclasses.replace(SFT, lora=Lora(rank=2, dropout=0.1))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_ends_with_the_same_bits(model, mesh, tmp_path, name):
    policy, config = CASES[name]
    wanted, theirs = learn(model, mesh, policy, config)
    for where, killed in (("memory", 3), ("orbax", 4)):
        memory = InMemory()
        for die in (True, False):
            kept = memory if where == "memory" else SftCheckpoints(tmp_path / "state")
            on_step = kill_after(killed) if die else (lambda metrics: None)
            if die:
                with pytest.raises(Killed):
                    learn(model, mesh, policy, config, checkpoints=kept, on_step=on_step)
            else:
                found, ours = learn(model, mesh, policy, config, checkpoints=kept, on_step=on_step)
        assert_bits(found, wanted)
        assert timeless(ours) == timeless(theirs)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (wanted, model.params)), strict=True))


def test_weights_that_are_sampled_from_are_the_newest_and_no_average(model, mesh):
    """With an average the first step's rollouts are the same, and so is every later one's reward."""
    average = dataclasses.replace(SFT, step=dataclasses.replace(SFT.step, ema=0.9))
    plain, averaged = learn(model, mesh), learn(model, mesh, config=average)
    assert timeless(plain[1]) == timeless(averaged[1])
    with pytest.raises(AssertionError):
        assert_bits(plain[0], averaged[0])


def test_a_sample_depends_on_its_own_question_and_number_alone(model, mesh):
    """With half as many questions in a step, those that both ask are answered alike."""
    seen = []

    def judge(samples):
        seen.append({(s.prompt_id, s.index): s.tokens for s in samples})
        return digits(samples)

    for questions in (8, 4):
        policy = dataclasses.replace(POLICY, steps=1, questions=questions)
        learn_on_policy(model, QUESTIONS, judge, policy, DRAWING, SFT, mesh=mesh, seed=3)
    assert len(seen[1]) == 16
    assert all(seen[0][key] == tokens for key, tokens in seen[1].items())


def test_more_questions_than_there_are_is_an_error(model, mesh):
    with pytest.raises(UserError, match=r"improver\.questions is 9, and there are 8 training questions"):
        learn(model, mesh, dataclasses.replace(POLICY, questions=9))
