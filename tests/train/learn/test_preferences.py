"""Objectives that compare answers: NumPy's float64 formulas, finite differences, identities, and whole runs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sft_cases import SFT, SIZES, InMemory, Killed, assert_bits, kill_after, tune

from train.learn.batches import batches
from train.learn.pairs import BUILDERS, Groups, check, rows_of
from train.learn.preferences import Fait, differing
from train.learn.registry import OBJECTIVES
from train.learn.settings import Sft
from train.log import UserError
from train.models.characters import PAD_ID
from train.models.loss import Compute, objective_sums, token_logps
from train.models.open import random_model
from train.resolve import build, to_dict
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

B, K = 5, 6
VARIANTS: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 0.3, "smoothing": 0.1},
    "ipo": {"name": "ipo", "beta": 0.3},
    "ipo by length": {"name": "ipo", "beta": 0.3, "length_normalised": True},
    "orpo": {"name": "orpo", "weight": 0.4},
    "cpo": {"name": "cpo", "beta": 0.2, "nll": 0.7},
    "simpo": {"name": "cpo", "beta": 2.0, "nll": 0.0, "length_normalised": True, "margin": 0.5},
    "aft": {"name": "aft", "constraint": "none"},
    "aft detached": {"name": "aft", "constraint": "detached"},
    "aft boundary": {"name": "aft", "constraint": "boundary", "beta": 0.3},
    "kto": {"name": "kto", "beta": 0.2, "desirable": 1.5},
}


def of(**objective):
    return build(Sft, {**to_dict(SFT), "objective": objective}, "sft")


def objective_of(variant) -> Any:
    return of(**VARIANTS[variant]).objective


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def formula(variant, o, d, lengths, label, held):
    """The loss of each pair in NumPy; o: sums [B, 2], d: less the reference's, held: o where no gradient flows."""
    w, l = o.T / lengths.T
    if variant == "dpo":
        m = 0.3 * (d[:, 0] - d[:, 1])
        return -0.9 * log_sigmoid(m) - 0.1 * log_sigmoid(-m)
    if variant.startswith("ipo"):
        d = d / lengths if variant == "ipo by length" else d
        return (d[:, 0] - d[:, 1] - 1 / 0.6) ** 2
    if variant == "orpo":
        odds = w - l - np.log1p(-np.exp(w)) + np.log1p(-np.exp(l))
        return -w - 0.4 * log_sigmoid(odds)
    if variant == "cpo":
        return -log_sigmoid(0.2 * (o[:, 0] - o[:, 1])) - 0.7 * w
    if variant == "simpo":
        return -log_sigmoid(2 * (w - l) - 0.5)
    if variant == "aft":
        return -w + np.log1p(np.exp(l - w))
    if variant == "aft detached":
        return -w + np.log1p(np.exp(held[:, 1] / lengths[:, 1] - w))
    if variant == "aft boundary":
        return -w + np.log1p(np.exp(l - w) + np.exp(held[:, 0] / lengths[:, 0] - 0.6 - l))
    z = max(0.0, float((held - (o - d))[:, 1].mean()))
    value = 1 / (1 + np.exp(-0.2 * label * (d[:, 0] - z)))
    return np.where(label > 0, 1.5, 1.0) * (1 - value)


@pytest.fixture(scope="module")
def case():
    """Log-probabilities [B, 2, K] of answers of several lengths, in float64, the last pair only filling up."""
    random = np.random.default_rng(0)
    logps = -random.gamma(1.0, 1.0, (B, 2, K))
    weights = (np.arange(K) < random.integers(2, K + 1, (B, 2))[..., None]).astype(np.float64)
    weights[-1] = 0
    reference = logps + 0.4 * random.normal(size=logps.shape) - 0.1
    return logps, weights, {"reference": reference, "label": np.array([1.0, -1.0, 1.0, -1.0, 0.0])}


def summed(case):
    logps, weights, beside = case
    real = weights[:, 0].any(-1)
    o = (logps * weights).sum(-1)[real]
    d = o - (beside["reference"] * weights).sum(-1)[real]
    return o, d, weights.sum(-1)[real], beside["label"][real]


def loss_of(variant, logps, weights, beside):
    objective = objective_of(variant)
    return objective.loss(logps, jnp.asarray(weights), {k: jnp.asarray(v) for k, v in beside.items()})


@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_gradient_are_the_formulas(case, variant):
    logps, weights, beside = case
    held = summed(case)[0]

    def of_logps(logps):
        return formula(variant, *summed((logps, weights, beside)), held).sum()

    wanted = np.zeros_like(logps)
    for at in np.ndindex(*logps.shape):
        step = np.zeros_like(logps)
        step[at] = 1e-6
        wanted[at] = (of_logps(logps + step) - of_logps(logps - step)) / 2e-6
    with jax.enable_x64(True):
        (found, weight), slope = jax.value_and_grad(lambda x: loss_of(variant, x, weights, beside)[:2], has_aux=True)(
            jnp.asarray(logps)
        )
        metrics = loss_of(variant, jnp.asarray(logps), weights, beside)[2]
    assert float(weight) == B - 1
    np.testing.assert_allclose(found, of_logps(logps), rtol=1e-9)
    np.testing.assert_allclose(slope, wanted, atol=1e-8)
    assert np.abs(wanted[:-1]).max() > 1e-3
    assert all(np.isfinite(float(value)) for value in metrics.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing_and_many_are_the_mean_of_one(case, variant):
    logps, weights, beside = (case[0].astype(np.float32), case[1].astype(np.float32), dict(case[2]))
    beside = {k: v.astype(np.float32) for k, v in beside.items()}
    whole = loss_of(variant, jnp.asarray(logps), weights, beside)[0]
    wide = [np.pad(x, ((0, 0), (0, 0), (0, 3)), constant_values=v) for x, v in ((logps, -99.0), (weights, 0.0))]
    padded = {**beside, "reference": np.pad(beside["reference"], ((0, 0), (0, 0), (0, 3)), constant_values=7.0)}
    np.testing.assert_allclose(loss_of(variant, jnp.asarray(wide[0]), wide[1], padded)[0], whole, rtol=1e-6)
    if variant != "kto":  # its divergence is a mean over the batch
        parts = [
            loss_of(
                variant, jnp.asarray(logps[i : i + 1]), weights[i : i + 1], {k: v[i : i + 1] for k, v in beside.items()}
            )
            for i in range(B)
        ]
        np.testing.assert_allclose(sum(float(part[0]) for part in parts), whole, rtol=1e-5)


def test_dpo_begins_at_log_2_and_swapping_the_answers_turns_its_gradient_round(case):
    logps, weights, _ = case
    plain = build(Sft, {"objective": {"name": "dpo", "beta": 0.3}}, "sft").objective
    same = {"reference": jnp.asarray(logps, jnp.float32)}

    def total(x, weights, beside):
        return plain.loss(x, jnp.asarray(weights, jnp.float32), beside)[0]

    found, slope = jax.value_and_grad(total)(same["reference"], weights, same)
    np.testing.assert_allclose(found, 4 * np.log(2), rtol=1e-6)
    sign = np.array([-1.0, 1.0])[None, :, None]
    np.testing.assert_allclose(slope, 0.3 / 2 * sign * weights, rtol=1e-6)
    turned = jax.grad(total)(same["reference"][:, ::-1], weights[:, ::-1], {"reference": same["reference"][:, ::-1]})
    np.testing.assert_allclose(turned[:, ::-1], -slope, rtol=1e-6)


def test_ipo_has_its_optimum_where_the_paper_says():
    objective = objective_of("ipo")
    logps = jnp.zeros((1, 2, 1)).at[0, 0, 0].set(1 / 0.6)
    beside = {"reference": jnp.zeros((1, 2, 1))}
    value, slope = jax.value_and_grad(lambda x: objective.loss(x, jnp.ones((1, 2, 1)), beside)[0])(logps)
    np.testing.assert_allclose(value, 0, atol=1e-12)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_the_boundary_of_aft_is_where_the_worse_answer_is_left_alone():
    objective = objective_of("aft boundary")  # β = 0.3
    for distance, sign in ((0.1, 1), (0.3, 0), (0.9, -1)):
        logps = jnp.array([[[-1.0], [-1.0 - distance]]])
        slope = jax.grad(lambda x: objective.loss(x, jnp.ones((1, 2, 1)), {})[0])(logps)[0, 1, 0]
        assert np.sign(round(float(slope), 6)) == sign


def test_orpo_is_finite_where_an_answer_is_certain():
    objective = objective_of("orpo")
    for certain in (0.0, -1e-9, -80.0):
        logps = jnp.array([[[certain], [-1.0]]])
        value, slope = jax.value_and_grad(lambda x: objective.loss(x, jnp.ones((1, 2, 1)), {})[0])(logps)
        assert np.isfinite(value)
        assert np.isfinite(slope).all()


def test_objectives_without_a_reference_ask_for_none():
    asked = {
        name for name, kind in OBJECTIVES.items() if kind.reference_model is not OBJECTIVES["orpo"].reference_model
    }
    assert asked == {"dpo", "ipo", "kto"}
    assert {kind.learns for kind in OBJECTIVES.values()} == set(BUILDERS)


def test_fait_weighs_what_the_wrong_program_lacks():
    objective = Fait(factor=3.0)
    example = {"tokens": [9, 9, 1, 2, 3, 4], "prompt_length": 2, "rejected": [9, 9, 1, 5, 3, 4]}
    assert objective.weight_of(example).tolist() == [1, 1, 1, 3, 1, 1]
    rows: Any = rows_of([example], of(name="fait", factor=3.0), PAD_ID)
    assert rows.tokens[0, :6].tolist() == example["tokens"]
    assert rows.weights[0, :6].tolist() == [0, 0, 1, 3, 1, 1]
    assert differing([1, 2], [1, 2]).tolist() == [False, False]
    assert differing([1, 2], [1, 2, 3]).tolist() == [False, False]  # nothing of ours comes after


# --- rows ---


@pytest.fixture(scope="module")
def pairs(examples):
    """Pairs of the miniature's worked problems: the answer of another problem is the worse one."""
    made = []
    for i, e in enumerate(examples):
        other = examples[(i + 7) % len(examples)]
        start = e["prompt_length"]
        answer = other["tokens"][other["prompt_length"] :]
        made.append({**e, "rejected": e["tokens"][:start] + answer})
    return made


def test_rows_are_the_two_sequences(pairs):
    rows: Any = rows_of(pairs, of(name="dpo"), PAD_ID)
    taken = rows.take(np.array([3, 0]), 0)
    for at, number in enumerate((3, 0)):
        for member, name in enumerate(("tokens", "rejected")):
            ids, start = pairs[number][name], pairs[number]["prompt_length"]
            assert taken["tokens"][at, member, : len(ids)].tolist() == ids
            assert np.flatnonzero(taken["weights"][at, member]).tolist() == list(range(start, len(ids)))
    assert rows.summary()["examples"] == len(pairs)
    (first, *_) = batches(rows, of(name="dpo"), seed=0)
    assert first["tokens"].shape[:2] == (8, 2)


def test_long_prompts_leave_few_targets():
    prompt = list(range(1, 30))
    pairs = [{"tokens": [*prompt, 2, 3, 4], "prompt_length": 29, "rejected": [*prompt, 5]}] * 2
    rows: Any = rows_of(pairs, of(name="dpo"), PAD_ID)
    targets = rows.take(np.array([1]), 0)["targets"]
    assert targets.shape == (1, 2, 8)
    assert [t[t > 0].tolist() for t in targets[0]] == [[29, 30, 31], [29]]


def test_too_long_pairs_go_or_are_cut_as_a_whole():
    pair = {"tokens": [1, 2, 3], "prompt_length": 1, "rejected": [1, *range(2, 30)]}
    short = {"tokens": [1, 2, 3], "prompt_length": 1, "rejected": [1, 4]}
    config = dataclasses.replace(of(name="dpo"), max_length=20)
    dropped: Any = rows_of([pair, short], config, PAD_ID)
    assert (len(dropped.tokens), dropped.dropped, dropped.truncated) == (1, 1, 0)
    cut: Any = rows_of([pair, short], dataclasses.replace(config, overlong="truncate"), PAD_ID)
    assert (len(cut.tokens), cut.dropped, cut.truncated) == (2, 0, 1)
    assert (cut.weights[0, 1] > 0).sum() == 19
    with pytest.raises(UserError, match=r"none of 1 pairs is at most sft\.max_length=20"):
        rows_of([pair], config, PAD_ID)


def test_labels_pair_an_answer_with_that_of_another_prompt():
    examples = [
        {"tokens": [1, 5], "prompt_length": 1, "reward": 1.0},
        {"tokens": [1, 6], "prompt_length": 1, "reward": -1.0},
        {"tokens": [2, 7, 7], "learnt": [0, 1, 1], "reward": -1.0},
    ]
    rows: Any = rows_of(examples, of(name="kto"), PAD_ID)
    assert rows.beside["label"].tolist() == [1, -1, -1]
    seen = [[[t for t in member if t != PAD_ID] for member in row.tolist()] for row in rows.tokens]
    assert seen == [[[1, 5], [1, 7, 7]], [[1, 6], [1, 7, 7]], [[2, 7, 7], [2, 5]]]
    two: Any = rows_of([{"tokens": [1, 5], "prompt_length": 1, "rejected": [1, 6]}, examples[2]], of(name="kto"), 0)
    assert two.beside["label"].tolist() == [1, -1, -1]
    with pytest.raises(UserError, match="two prompts or more"):
        rows_of(examples[:2], of(name="kto"), PAD_ID)
    with pytest.raises(UserError, match=r"set data\.learn=last"):
        rows_of([{"tokens": [1, 2, 3, 4], "learnt": [0, 1, 0, 1], "reward": 1.0}], of(name="kto"), PAD_ID)


@pytest.mark.parametrize(
    ("wants", "example", "said"),
    [
        ("answers", {"rejected": []}, r"set data\.format=chosen|data\.format=chosen"),
        ("pairs", {}, "keys prompt, chosen, rejected"),
        ("better", {}, "keys prompt, chosen, rejected"),
        ("labels", {"reward": 0.0}, "keys prompt, completion, label"),
    ],
)
def test_examples_of_another_kind_are_refused(wants, example, said):
    with pytest.raises(UserError, match=said):
        check([example], wants, "it")


def test_what_packs_or_learns_prompts_compares_no_answers():
    for key in ({"packing": True}, {"loss": "all"}):
        with pytest.raises(UserError, match="dpo compares answers"):
            build(Sft, {"objective": {"name": "dpo"}, **key}, "sft")
    assert build(Sft, {"objective": {"name": "fait"}, "packing": True}, "sft").packing


def test_mistakes_name_the_key():
    for name, key in (("dpo", "beta"), ("orpo", "weight"), ("kto", "desirable"), ("fait", "factor"), ("aft", "beta")):
        with pytest.raises(UserError, match=rf"sft\.objective\.{key} is 0\.0; {name} needs it above 0"):
            build(Sft, {"objective": {"name": name, key: 0.0}}, "sft")


# --- whole runs ---


@pytest.fixture(scope="module")
def dpo_run(model, pairs, mesh):
    config = of(name="dpo", beta=0.5)
    rows = rows_of(pairs, config, PAD_ID)
    return config, rows, tune(model, rows, config, mesh)


def test_training_prefers_the_chosen_answers(dpo_run):
    _, _, (_, log) = dpo_run
    np.testing.assert_allclose(log[0]["loss"], np.log(2), rtol=1e-5)
    np.testing.assert_allclose(log[0]["margin"], 0, atol=1e-4)
    assert log[-1]["loss"] < np.log(2) - 0.1
    assert log[-1]["margin"] > 0.1
    assert log[-1]["preferred"] > 0.5
    assert log[-1]["targets"] == 8  # pairs


def test_a_resumed_run_ends_with_the_same_bits(model, dpo_run, mesh):
    config, rows, (whole, _) = dpo_run
    config = dataclasses.replace(config, checkpoint_every=3)
    memory = InMemory()
    with pytest.raises(Killed):
        tune(model, rows, config, mesh, checkpoints=memory, on_step=kill_after(5))
    assert memory.kept[1] == 3
    assert_bits(tune(model, rows, config, mesh, checkpoints=memory)[0], whole)


def test_several_devices_train_what_one_does(pairs, dpo_run):
    config, rows, (whole, log) = dpo_run
    mesh = make_mesh(Mesh(data=2, fsdp=2))
    spread, other = tune(random_model(SIZES, mesh, seed=0), rows, config, mesh)
    np.testing.assert_allclose([m["loss"] for m in other], [m["loss"] for m in log], rtol=2e-3)
    np.testing.assert_allclose(other[0]["gradient_norm"], log[0]["gradient_norm"], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), jax.device_get(spread), whole)


def test_the_reference_is_the_model_that_is_named(model, pairs, mesh):
    """The anchor of a run that asks for the original model, and the start of one that does not."""
    other = random_model(SIZES, mesh, seed=1)
    losses = {}
    for reference in ("start", "original"):
        config = dataclasses.replace(of(name="ipo", beta=0.5, reference=reference), epochs=1, learning_rate=0.0)
        rows: Any = rows_of(pairs, config, PAD_ID)
        losses[reference] = tune(model, rows, config, mesh, anchor=other.params)[1][0]["loss"]
        if reference == "original":
            first: Any = next(batches(rows, config, seed=7))
            found = token_logps(model.config, other.params, first, Compute())
            wanted = objective_sums(
                model.config, model.params, {**first, "reference": found}, Compute(), config.objective.loss
            )
            np.testing.assert_allclose(losses[reference], wanted[0] / wanted[1], rtol=1e-4)
    np.testing.assert_allclose(losses["start"], 1.0, rtol=1e-4)
    assert abs(losses["original"] - losses["start"]) > 1e-4


def test_rows_of_single_answers_have_no_reference(model, rows, mesh):
    assert not isinstance(rows, Groups)
    with pytest.raises(UserError, match="dpo needs a reference"):
        tune(model, rows, of(name="dpo"), mesh)
