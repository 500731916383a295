"""Group-relative policy gradients: advantages and losses are their formulas, and what must hold of them holds."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.policies import COURSE, batch_of, group_of, loss_in_numpy

from train.learn import improvers
from train.learn.curriculum import Curriculum, chosen_by_bandit, probabilities, told_of_categories, values_of
from train.learn.improvers import IMPROVERS
from train.learn.policy import ADVANTAGES, NORMALISE, Policy, PolicyLoss, advantages_of, overlong
from train.log import UserError

OPTIONS: list[dict[str, Any]] = [
    {"normalise": name, **rest}
    for name in NORMALISE
    for rest in ({}, {"low": 0.1, "high": 0.28, "beta": 0.3, "cap": 1.2})
]


def policy_loss(options, logps, batch):
    loss, weight, metrics = PolicyLoss(**{"length": 6, **options}).loss(
        logps, batch["weights"], {k: v for k, v in batch.items() if k != "weights"}
    )
    return loss / weight, metrics | {"weight": weight}


def test_the_registry_is_what_a_config_may_name():
    kinds = typing.get_args(improvers.Improver) or (improvers.Improver,)
    assert tuple(IMPROVERS.values()) == kinds
    assert all(kind.name == name for name, kind in IMPROVERS.items())


# --- advantages ---


def test_advantages_are_their_formulas():
    rewards = np.array([1.0, 0.0, 0.0, 0.5])
    mean, deviation = rewards.mean(), np.sqrt(((rewards - rewards.mean()) ** 2).sum() / 3)
    np.testing.assert_allclose(advantages_of("group", rewards), (rewards - mean) / (deviation + 1e-4))
    np.testing.assert_allclose(advantages_of("mean", rewards), rewards - mean)
    left_out = [rewards[i] - np.delete(rewards, i).mean() for i in range(4)]
    np.testing.assert_allclose(advantages_of("leave_one_out", rewards), left_out)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_sum_to_nothing_and_equal_rewards_have_none(name):
    draw = np.random.default_rng(0)
    for size in (2, 3, 8):
        assert abs(advantages_of(name, draw.normal(size=size)).sum()) < 1e-9
        np.testing.assert_array_equal(advantages_of(name, np.full(size, 0.5)), np.zeros(size))
    # What could not be judged takes no part.
    found = advantages_of(name, np.array([1.0, np.nan, 0.0, np.nan]))
    np.testing.assert_allclose(found[[0, 2]], advantages_of(name, np.array([1.0, 0.0])))
    np.testing.assert_array_equal(found[[1, 3]], [0, 0])


def test_long_samples_are_punished_as_dapo_says():
    assert [overlong(n, 20, 8) for n in (1, 12, 16, 20)] == [0.0, 0.0, -0.5, -1.0]
    assert overlong(20, 20, 0) == 0.0


# --- the loss ---


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_is_the_formula_and_its_gradient_that_of_finite_differences(options):
    """Float64 in NumPy, token by token; no token lies at the edge of the clip."""
    logps, batch = batch_of(seed=1)
    found, slope = jax.value_and_grad(lambda x: policy_loss(options, x, batch)[0])(jnp.asarray(logps, jnp.float32))
    np.testing.assert_allclose(found, loss_in_numpy(options, logps, batch, length=6), rtol=2e-6)
    step = 1e-6
    for at in np.ndindex(logps.shape):
        moved = [logps.copy(), logps.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        up, down = (loss_in_numpy(options, x, batch, length=6) for x in moved)
        np.testing.assert_allclose(slope[at], (up - down) / (2 * step), atol=2e-6)


def test_with_one_update_the_ratio_is_one_and_the_gradient_is_that_of_reinforce():
    logps, batch = batch_of(seed=2)
    del batch["old"]
    found, slope = jax.value_and_grad(lambda x: policy_loss({}, x, batch)[0])(jnp.asarray(logps, jnp.float32))
    mask = batch["weights"] > 0
    A = np.broadcast_to(batch["advantages"][:, None], mask.shape)
    np.testing.assert_allclose(found, -(A * mask).sum() / mask.sum(), rtol=1e-6)  # ratios of 1, to the bit
    np.testing.assert_allclose(slope, np.where(mask, -A / mask.sum(), 0), rtol=1e-6)


def test_equal_rewards_give_no_gradient():
    groups = [group_of([1.0, 1.0, 1.0]), group_of([0.0, 0.0, 0.0], seed=1)]
    for advantage in ADVANTAGES:
        batch = Policy(advantage=advantage).lesson(groups, COURSE).batch  # type: ignore[arg-type]
        given = {k: v[:, 1:] if v.ndim == 2 and k != "targets" else v for k, v in batch.items()}
        logps = jnp.asarray(np.random.default_rng(0).normal(size=given["weights"].shape) - 3, jnp.float32)
        assert not np.any(jax.grad(lambda x, given=given: policy_loss({}, x, given)[0])(logps))


def test_nothing_is_learnt_from_a_token_outside_the_clip():
    """A > 0 stops above 1 + high, A < 0 below 1 − low; the other sides go on."""
    ratios = np.array([[1.5, 1.25, 0.5], [0.5, 0.85, 1.5]])
    batch: dict[str, Any] = {
        "weights": np.ones((2, 3), np.float32), "advantages": np.array([1.0, -1.0], np.float32),
        "rows": np.ones(2, np.float32), "old": np.full((2, 3), -1.0, np.float32),
        "sampled": np.full((2, 3), -1.0, np.float32),
    }  # fmt: skip
    logps = jnp.asarray(np.log(ratios) - 1.0, jnp.float32)
    options = {"low": 0.2, "high": 0.28}
    slope = jax.grad(lambda x: policy_loss(options, x, batch)[0])(logps)
    assert (np.asarray(slope) != 0).tolist() == [[False, True, True], [False, True, True]]
    _, metrics = policy_loss(options, logps, batch)
    np.testing.assert_allclose(metrics["clipped"] / metrics["weight"], 2 / 6)


def test_the_divergence_is_not_negative_and_nothing_at_the_reference():
    logps, batch = batch_of(seed=3)
    batch["advantages"][:] = 0
    assert float(policy_loss({"beta": 1.0}, jnp.asarray(logps), batch)[0]) > 0
    batch["reference"] = np.asarray(logps, np.float32)
    found, slope = jax.value_and_grad(lambda x: policy_loss({"beta": 1.0}, x, batch)[0])(
        jnp.asarray(logps, jnp.float32)
    )
    assert float(found) == 0
    assert not np.any(slope)


def test_drift_is_that_of_trainer_and_sampler():
    logps, batch = batch_of(seed=4)
    mask = batch["weights"] > 0
    d = (batch["old"] - batch["sampled"])[mask].astype(np.float64)
    _, metrics = policy_loss({}, jnp.asarray(logps), batch)
    told = {name: float(metrics[name] / metrics["weight"]) for name in ("drift_mean", "drift_max", "drift_kl")}
    wanted = {"drift_mean": np.abs(d).mean(), "drift_max": np.abs(d).max(), "drift_kl": (np.exp(d) - d - 1).mean()}
    assert told == pytest.approx(wanted, rel=1e-5)


# --- what is learnt from ---


def test_a_batch_holds_the_samples_own_tokens_and_probabilities():
    groups = [group_of([1.0, 0.0, np.nan], lengths=(3, 5, 2))]
    batch = Policy().lesson(groups, COURSE).batch
    assert batch is not None
    for i, sample in enumerate(groups[0].samples):
        n = len(sample.tokens) if i < 2 else 0  # the third could not be judged
        begin, end = 2, 2 + n
        assert batch["tokens"][i, begin:end].tolist() == list(sample.tokens[:n])
        np.testing.assert_array_equal(batch["sampled"][i, begin:end], np.float32(sample.logprobs[:n]))
        learnt = np.zeros(batch["weights"].shape[1])
        learnt[begin:end] = 1
        np.testing.assert_array_equal(batch["weights"][i], learnt)


def test_samples_that_were_cut_short_are_masked_where_asked():
    groups = [group_of([1.0, 0.0], reasons=("length", "eos"))]
    for name, learnt in (("keep", [True, True]), ("mask", [False, True])):
        batch = Policy(overlong=name).lesson(groups, COURSE).batch  # type: ignore[arg-type]
        assert batch["weights"].any(axis=1).tolist() == learnt


def test_groups_without_variance_are_left_out_where_others_are_asked():
    groups = [group_of([1.0, 1.0]), group_of([1.0, 0.0], seed=1), group_of([0.0, 1.0], seed=2)]
    everything, some = Policy(questions=3), Policy(questions=1, redraws=1)
    assert len(everything.lesson(groups, COURSE).batch["tokens"]) == 6
    assert everything.lesson(groups, COURSE).metrics["varied"] == pytest.approx(2 / 3)
    batch = some.lesson(groups, COURSE).batch
    assert batch["tokens"][:, 2].tolist() == [s.tokens[0] for s in groups[1].samples]  # the first that varies
    assert some.lesson(groups[:1], COURSE).batch is None


def test_worked_solutions_are_learnt_of_questions_that_no_sample_answers():
    groups = [group_of([0.0, 0.0], question=1), group_of([1.0, 0.0], question=0), group_of([0.0, 0.0], question=2)]
    lesson = Policy(worked=True).lesson(groups, COURSE)
    assert lesson.worked is not None  # question 2 has no solution
    assert lesson.worked["tokens"][:, :5].tolist() == [[7, 8, 21, 22, 23]]
    given = {k: v[:, 1:] if v.ndim == 2 and k != "targets" else v for k, v in lesson.worked.items()}
    logps = jnp.asarray(np.random.default_rng(0).normal(size=given["weights"].shape) - 3, jnp.float32)
    slope = jax.grad(lambda x: policy_loss({}, x, given)[0])(logps)
    np.testing.assert_allclose(slope, -given["weights"] / 3)  # that of fine-tuning: the mean over three tokens
    assert Policy(worked=True).lesson(groups[1:2], COURSE).worked is None


@pytest.mark.parametrize(
    ("changes", "drawing", "sft", "said"),
    [
        (
            {},
            {"temperature": 0.8},
            {},
            r"temperature is 0\.8, .*; a policy learns from samples of its own distribution",
        ),
        ({}, {"samples": 1}, {}, r"samples is 1; a group has 2 or more"),
        ({"overlong_cache": 6}, {}, {}, r"overlong_cache is 6; it must be below sampling\.max_new_tokens=6"),
        ({}, {}, {"epochs": 2}, r"m\.sft\.epochs: learning from fresh samples does not read it"),
        ({}, {}, {"watch": {"held_out": 2}}, r"m\.sft\.watch\.held_out: learning"),
    ],
)
def test_what_does_not_fit_is_refused(changes, drawing, sft, said):
    with pytest.raises(UserError, match=said):
        Policy(**changes).check(dataclasses.replace(COURSE.drawing, **drawing), sft, "m")
    Policy().check(COURSE.drawing, {"learning_rate": 1.0}, "m")


# --- which questions ---


def test_all_questions_are_asked_before_any_comes_again():
    policy = Policy(questions=4)
    course = COURSE._replace(prompts=[None] * 10)  # type: ignore[arg-type]
    asked = [policy.choose(course, [], seed=5, step=step, draw=0).tolist() for step in range(5)]
    flat = [i for numbers in asked for i in numbers]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    again = policy.choose(course, [], seed=5, step=3, draw=1).tolist()
    assert len(set(again)) == 4
    assert again != asked[3]


def test_a_familys_value_follows_the_steps_that_asked_it():
    log = [{"advantage/a": 1.0}, {"advantage/b": 0.4}, {"advantage/a": 0.0, "advantage/b": 0.0}]
    values = values_of(Curriculum(rate=0.5), ["a", "b", "c"], log)
    np.testing.assert_allclose(values, [0.25, 0.1, 0.0])
    found = probabilities(Curriculum(temperature=0.1), values)
    np.testing.assert_allclose(found, np.exp([2.5, 1.0, 0.0]) / np.exp([2.5, 1.0, 0.0]).sum())
    assert told_of_categories(["a", "b", "a"], [np.array([1, -1.0]), np.array([0.5, 0]), np.zeros(2)]) == {
        "advantage/a": 0.5, "advantage/b": 0.25,
    }  # fmt: skip


def test_the_family_that_is_learnt_most_from_is_asked_most():
    """A toy: families whose advantage is 0.8 and 0.1. At T = 0.2 the first has e^3.5 = 33 times the other's share."""
    categories = ["slow"] * 400 + ["fast"] * 400
    bandit, log = Curriculum(rate=0.5, temperature=0.2), []
    counts = np.zeros(2)
    for step in range(60):
        chosen = chosen_by_bandit(bandit, categories, log, 8, (0, step, 0))
        assert len(set(chosen.tolist())) == 8
        fast = int((chosen >= 400).sum())
        counts += [8 - fast, fast] if step >= 10 else [0, 0]
        told = {"advantage/fast": 0.8} if fast else {}
        log.append(told | ({"advantage/slow": 0.1} if fast < 8 else {}))
    assert counts[1] / counts.sum() == pytest.approx(33 / 34, abs=0.03)
