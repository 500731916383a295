"""Distillation on the student's own samples: what is learnt, from whom, and the same bits after a kill."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sft_cases import SIZES, InMemory, Killed, assert_bits, kill_after

from train.generate.rollout import Prompt, Sample
from train.generate.settings import Settings
from train.learn.distill import Distill
from train.learn.on_policy import Questions, learn_on_policy
from train.learn.on_policy_distill import OnPolicyDistillation, check_shown
from train.learn.rollouts import Course, Group
from train.learn.settings import Sft
from train.learn.teacher import open_teacher
from train.log import UserError
from train.models.characters import encode
from train.models.settings import Source

DRAWING = Settings(samples=4, temperature=1.0, max_new_tokens=8, slots=16)
LEARN = OnPolicyDistillation(steps=4, questions=4)
ASKED = [f"{i + 10}+{i}?" for i in range(8)]
QUESTIONS = Questions([Prompt(f"q{i}", tuple(encode(text))) for i, text in enumerate(ASKED)], ["sums"] * 8, [None] * 8)
SHOWN = QUESTIONS._replace(shown=[tuple(encode(f"{text}#{2 * i + 10}\n{text}")) for i, text in enumerate(ASKED)])
SELF = Sft(learning_rate=3e-3, batch=16, warmup=0.0, schedule="constant", checkpoint_every=2, distill=Distill(ema=0.5))
TAUGHT = dataclasses.replace(SELF, distill=Distill(teacher=Source(random={**SIZES, "hidden_size": 48})))


def learn(model, mesh, questions, config, improver=LEARN, **given):
    def none_judged(samples):
        return [None for _ in samples]

    return learn_on_policy(model, questions, none_judged, improver, DRAWING, config, mesh=mesh, seed=3, **given)


def test_the_teacher_reads_its_own_prompt_before_the_same_samples():
    """Both find every label in the same column of their targets; the teacher's shape does not depend on the draw."""
    completions = [encode("#12\n"), encode("#7"), encode("12#34567")]
    samples = [Sample("q", i, "", tuple(c), (0.0,) * len(c), "stop") for i, c in enumerate(completions)]
    groups = [
        Group(1, QUESTIONS.prompts[1].tokens, samples[:2], np.array([0.0, np.nan])),
        Group(6, QUESTIONS.prompts[6].tokens, samples[2:], np.array([1.0])),
    ]
    course = Course(*SHOWN, DRAWING, 0, {}, {}, dict, False, lambda params, batch: np.zeros(0))
    batch = LEARN.lesson(groups, course).batch
    assert batch is not None
    for prefix in ("", "teacher_"):
        tokens, weights, targets = (batch[prefix + name] for name in ("tokens", "weights", "targets"))
        assert weights.sum() == 4 + 2 + 8
        for row, completion in enumerate(completions):
            at = targets[row][targets[row] > 0]
            assert tokens[row, at].tolist() == completion
    assert batch["targets"].shape == batch["teacher_targets"].shape == (3, 32)
    assert batch["teacher_tokens"][2, : len(SHOWN.shown[6])].tolist() == list(SHOWN.shown[6])
    assert batch["teacher_tokens"].shape == (3, 1 + 32 + 32)
    plain = LEARN.lesson(groups, course._replace(shown=())).batch
    assert plain is not None
    assert not any(name.startswith("teacher_") for name in plain)


def test_a_teacher_that_is_the_student_teaches_nothing(model, mesh):
    config = dataclasses.replace(TAUGHT, distill=Distill(teacher=Source(random=SIZES)))
    teacher = open_teacher(config.distill, model, mesh, seed=0)
    _, log = learn(model, mesh, QUESTIONS, config, dataclasses.replace(LEARN, steps=1), teacher=teacher)
    assert abs(log[0]["loss"]) < 1e-5
    assert log[0]["gradient_norm"] < 1e-4


def test_a_student_comes_near_a_larger_teacher_on_its_own_samples(model, mesh):
    teacher = open_teacher(TAUGHT.distill, model, mesh, seed=5)
    assert teacher is not None
    head = {**teacher.params["lm_head"], "weight": 20 * teacher.params["lm_head"]["weight"]}
    sharp = dataclasses.replace(teacher, params={**teacher.params, "lm_head": head})
    config = dataclasses.replace(TAUGHT, learning_rate=1e-2)
    _, log = learn(model, mesh, QUESTIONS, config, dataclasses.replace(LEARN, steps=25), teacher=sharp)
    losses = [metrics["loss"] for metrics in log]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.parametrize("who", ["self", "other"])
def test_a_resumed_run_ends_with_the_same_bits(model, mesh, who):
    """With the student's average as the teacher the state has it; with another model it is given again."""
    questions, config = {"self": (SHOWN, SELF), "other": (QUESTIONS, TAUGHT)}[who]
    teacher = open_teacher(config.distill, model, mesh, seed=5)
    wanted, log = learn(model, mesh, questions, config, teacher=teacher)
    assert all(np.isfinite(metrics["loss"]) and metrics["loss"] > 0 for metrics in log)
    memory = InMemory()
    with pytest.raises(Killed):
        learn(model, mesh, questions, config, teacher=teacher, checkpoints=memory, on_step=kill_after(3))
    found, _ = learn(model, mesh, questions, config, teacher=teacher, checkpoints=memory)
    assert_bits(found, wanted)
    assert jnp.abs(found["lm_head"]["weight"] - model.params["lm_head"]["weight"]).max() > 0


def test_a_prompt_that_leaves_no_room_is_refused():
    check_shown(SHOWN.shown, 64, 30)
    with pytest.raises(UserError, match=r"has 14 tokens, a sample up to 60, and the teacher reads 64"):
        check_shown(SHOWN.shown, 64, 60)
