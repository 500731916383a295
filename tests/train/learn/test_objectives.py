"""Objectives of fine-tuning: each is its formula, and the default one is what fine-tuning was before the others."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sft_cases import SFT, InMemory, Killed, assert_bits, kill_after, tune

from train.learn import registry
from train.learn.batches import batches, to_rows
from train.learn.objectives import MaskedThought, ResponseOnly, RewardWeighted, Talr
from train.learn.registry import OBJECTIVES
from train.learn.settings import Sft
from train.learn.shares import Shares
from train.learn.step import init_state, make_step
from train.log import UserError
from train.models.characters import PAD_ID
from train.models.decoder import bind
from train.models.loss import Compute, loss_sums, objective_sums, token_logps
from train.resolve import build, to_dict
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

SETTINGS = {
    "response_only": {}, "masked_thought": {"token": 3}, "reward_weighted": {"temperature": 0.5},
    "talr": {"temperature": 2.0}, "signed": {},
}  # fmt: skip


def of(name, **changes):
    return build(Sft, {**to_dict(SFT), "objective": {"name": name, **SETTINGS[name], **changes}}, "sft")


@pytest.fixture(scope="module")
def rewarded(examples):
    return [e | {"reward": i % 3 - 1.0} for i, e in enumerate(examples)]


def test_the_registry_is_what_a_config_may_name():
    assert tuple(OBJECTIVES.values()) == typing.get_args(registry.Objective)
    assert {name for name, kind in OBJECTIVES.items() if kind.learns == "answers"} == SETTINGS.keys()
    for name, kind in OBJECTIVES.items():
        assert type(build(Sft, {"objective": {"name": name, **SETTINGS.get(name, {})}}, "sft").objective) is kind
        assert kind.name == name  # type: ignore[attr-defined]
        assert "$" in str(kind.__doc__)
    assert Sft().objective == ResponseOnly()


def test_errors_name_the_key_and_the_way_out():
    with pytest.raises(UserError, match=r"sft\.objective\.name is 'tarl'; no such name; did you mean talr\?"):
        build(Sft, {"objective": {"name": "tarl"}}, "sft")
    with pytest.raises(UserError, match=r"sft\.objective\.tau: no such key"):
        build(Sft, {"objective": {"name": "talr", "tau": 1.0}}, "sft")
    with pytest.raises(UserError, match=r"token is None; masked_thought needs the number"):
        build(Sft, {"objective": {"name": "masked_thought"}}, "sft")
    for name in ("talr", "reward_weighted"):
        with pytest.raises(UserError, match=r"temperature is 0\.0"):
            of(name, temperature=0.0)
    with pytest.raises(UserError, match=r"temperature is 1e-50 \(above 1e-30"):
        of("talr", temperature=1e-50)  # float32 would divide 0 by 0
    with pytest.raises(UserError, match=r"a reward is 30, 60 times the temperature"):
        of("reward_weighted").objective.weight_of({"reward": 30.0})


def test_a_mask_token_that_the_model_lacks_is_refused(model):
    with pytest.raises(UserError, match=rf"token is 4000; the model has {model.config.vocab_size} tokens"):
        make_step(model.config, of("masked_thought", token=4000), "float32")


# --- the whole run ---


def test_every_objective_but_the_default_changes_the_weights(model, rewarded, mesh, undisturbed):
    """The default's are what they were; rewards alone change nothing."""
    for name in SETTINGS:
        config = of(name)
        tuned, _ = tune(model, to_rows(rewarded, config, PAD_ID), config, mesh)
        if name == "response_only":
            assert_bits(tuned, undisturbed[0])
        else:
            pairs = zip(jax.tree.leaves(tuned), jax.tree.leaves(undisturbed[0]), strict=True)
            assert any((a != b).any() for a, b in pairs), name


@pytest.mark.parametrize("name", ["masked_thought", "talr"])
def test_a_resumed_run_ends_with_the_same_bits(model, rows, mesh, name):
    config = dataclasses.replace(of(name), checkpoint_every=3)
    whole, _ = tune(model, rows, config, mesh)
    memory = InMemory()
    with pytest.raises(Killed):
        tune(model, rows, config, mesh, checkpoints=memory, on_step=kill_after(5))
    assert memory.kept[1] == 3
    assert_bits(tune(model, rows, config, mesh, checkpoints=memory)[0], whole)


def test_micro_batches_and_packing_take_the_same_loss(model, examples, mesh):
    config = dataclasses.replace(of("talr"), learning_rate=0.0, epochs=1, batch=32)
    losses = []
    for c in (config, dataclasses.replace(config, micro_batch=8), dataclasses.replace(config, packing=True)):
        losses.append(tune(model, to_rows(examples, c, PAD_ID), c, mesh)[1][0]["loss"])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def test_the_held_out_loss_is_the_plain_one(model, rows, mesh):
    found = []
    for name in ("response_only", "masked_thought", "talr"):
        config = dataclasses.replace(of(name), learning_rate=0.0, epochs=1)
        found.append(tune(model, rows, config, mesh, held_out=rows)[1][-1]["held_out_loss"])
    assert found[0] == found[1] == found[2]


# --- formulas ---


def test_talr_is_its_formula_and_no_gradient_flows_through_its_factors(model, rows):
    """Against logits of the whole model in float64, and finite differences with the factors held."""
    batch: Any = next(batches(rows, SFT, seed=0))

    def losses(params):
        tokens = jnp.asarray(batch["tokens"])
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1] - 1), tokens[:, 1:].shape)
        seen = jnp.tril(jnp.ones((tokens.shape[1] - 1,) * 2, bool))[None]
        net = bind(model.config, params)
        hidden, _ = net(tokens[:, :-1], index, jnp.broadcast_to(seen, (len(tokens), *seen.shape[1:])))
        z = np.asarray(net.head(hidden, jnp.dtype("float32")), np.float64)
        gold = np.take_along_axis(z, batch["tokens"][:, 1:, None], -1)[..., 0]
        return np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1) - gold

    weights = batch["weights"][:, 1:].astype(np.float64)
    each = losses(model.params)
    floor = float(np.median(np.exp(-each / 2.0)[weights > 0]))  # both sides of it are met
    factors = np.maximum(np.exp(-each / 2.0), floor)
    objective = Talr(temperature=2.0, floor=floor)

    def ours(params):
        return objective_sums(model.config, params, batch, Compute(), objective.loss)[:2]

    (loss, total), gradient = jax.value_and_grad(ours, has_aux=True)(model.params)
    np.testing.assert_allclose(loss, np.sum(weights * factors * each), rtol=1e-5)
    np.testing.assert_allclose(total, weights.sum(), rtol=1e-6)
    direction = jax.tree.map(lambda g: g / jnp.sqrt(jnp.sum(g * g) + 1e-12), gradient)
    step = 2e-3

    def at(t):
        return np.sum(weights * factors * losses(jax.tree.map(lambda p, d: p + t * d, model.params, direction)))

    slope = sum(float(jnp.sum(g * d)) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    np.testing.assert_allclose((at(step) - at(-step)) / (2 * step), slope, rtol=1e-3)


def test_talr_takes_its_temperature_from_the_batch():
    """τ is the median over the rows of their mean losses; a row without targets has none."""
    random = np.random.default_rng(0)
    logps = -random.gamma(1.0, 1.0, (5, 6))
    weights = (random.random((5, 6)) < 0.7).astype(np.float64)
    weights[3] = 0
    for rows in (slice(None), slice(1, None)):  # four rows with targets, then three
        l, w = logps[rows], weights[rows]
        tau = np.median([-(a * b).sum() / b.sum() for a, b in zip(l, w, strict=True) if b.any()])
        found = Talr(temperature=None, floor=0.2).loss(jnp.asarray(l, "float32"), jnp.asarray(w, "float32"), {})
        np.testing.assert_allclose(found[0], -(w * np.maximum(np.exp(l / tau), 0.2) * l).sum(), rtol=1e-5)


def test_talr_at_a_high_temperature_is_the_plain_loss(model, rows):
    batch: Any = next(batches(rows, SFT, seed=0))
    plain = loss_sums(model.config, model.params, batch)
    hot = objective_sums(model.config, model.params, batch, Compute(), Talr(temperature=1e9).loss)[:2]
    np.testing.assert_allclose(hot, plain, rtol=1e-6)


def test_rewards_weigh_examples_exponentially_and_a_constant_changes_nothing(rewarded):
    config = of("reward_weighted")  # τ = 0.5
    rows: Any = to_rows(rewarded, config, PAD_ID)
    plain: Any = to_rows(rewarded, SFT, PAD_ID)
    wanted = np.exp(np.array([e["reward"] for e in rewarded]) / 0.5)[:, None] * plain.weights
    np.testing.assert_allclose(rows.weights, wanted, rtol=1e-6)
    more: Any = to_rows([e | {"reward": e["reward"] + 2.0} for e in rewarded], config, PAD_ID)
    np.testing.assert_allclose(more.weights / more.weights.sum(), rows.weights / rows.weights.sum(), rtol=1e-5)
    assert RewardWeighted().weight_of({"score": 1.0}) == pytest.approx(np.e)  # a run's sample


def test_masked_thought_hides_the_answer_alone_and_ever_more_of_it(rows, mesh):
    objective = MaskedThought(token=3, probability=0.5, rise=0.5)
    tokens, weights = np.full((64, 100), 7, np.int32), np.ones((64, 100), np.float32)
    weights[:, :40] = 0.0
    shares = []
    for done in (0.0, 0.25, 0.5, 1.0):
        shown = objective.inputs(tokens, weights, numbers=np.arange(64), seed=1, done=done)
        assert (shown[:, :40] == 7).all()
        assert set(np.unique(shown)) <= {3, 7}
        shares.append((shown[:, 40:] == 3).mean())
    np.testing.assert_allclose(shares, [0, 0.25, 0.5, 0.5], atol=0.03)
    part = objective.inputs(tokens[:9], weights[:9], numbers=np.arange(55, 64), seed=1, done=1.0)
    assert (part == shown[55:]).all()  # a row's mask is its own, whoever reads it
    assert (part != shown[:9]).any()
    assert (objective.inputs(tokens, weights, numbers=np.arange(64), seed=2, done=1.0) != shown).any()
    config = dataclasses.replace(SFT, objective=objective)
    *_, last = Shares(mesh, config).batches(rows, seed=7)
    assert (np.asarray(last["inputs"]) != np.asarray(last["tokens"])).any()


def test_the_model_reads_the_inputs_and_learns_the_labels(model, rows):
    batch: Any = next(batches(rows, SFT, seed=0))
    same = loss_sums(model.config, model.params, batch | {"inputs": batch["tokens"]})
    assert_bits(same, loss_sums(model.config, model.params, batch))
    # Only what stands before a token is seen: a masked last input changes nothing.
    tokens = batch["tokens"].copy()
    tokens[:, -1] = 3
    assert_bits(same, loss_sums(model.config, model.params, batch | {"inputs": tokens}))
    hidden = np.where(batch["weights"] > 0, 3, batch["tokens"]).astype(np.int32)
    changed = loss_sums(model.config, model.params, batch | {"inputs": hidden})
    assert changed[1] == same[1]
    assert abs(changed[0] - same[0]) > 1e-3


# --- objectives that are functions of log-probabilities ---


def pairwise(logps, weights, beside):
    """A loss of pairs that every token's log-probability is in, not linearly; metrics beside it."""
    sums = jnp.sum(weights * logps, -1)  # [B, 2]
    near = jnp.sum(weights * beside["like_tokens"] * logps)
    each = jnp.tanh(sums[:, 0] - 0.5 * sums[:, 1]) * beside["of_rows"]
    return jnp.sum(each) + 0.1 * near, jnp.float32(len(sums)), {"first": jnp.sum(sums[:, 0])}


@pytest.mark.parametrize("at_once", [16, 4096])
@pytest.mark.parametrize("narrow", [False, True])  # whether the batch says where its targets are
def test_the_gradient_of_any_function_of_log_probabilities_is_autodiffs(model, rows, at_once, narrow):
    batch: Any = {k: jnp.asarray(v)[:8] for k, v in next(batches(rows, SFT, seed=0)).items()}
    if not narrow:
        batch.pop("targets", None)
    B, T = batch["tokens"].shape
    pairs = {k: v.reshape(B // 2, 2, -1) for k, v in batch.items()}
    noise = jax.random.normal(jax.random.key(3), (B // 2, 2, T))
    pairs |= {"like_tokens": noise, "of_rows": jnp.arange(1.0, B // 2 + 1)}

    def ours(params):
        loss, *others = objective_sums(model.config, params, pairs, Compute(logits_at_once=at_once), pairwise)
        return loss, others

    def plain(params):
        index = jnp.broadcast_to(jnp.arange(T - 1), (B, T - 1))
        seen = jnp.broadcast_to(jnp.tril(jnp.ones((T - 1, T - 1), bool)), (B, T - 1, T - 1))
        net = bind(model.config, params)
        hidden, _ = net(batch["tokens"][:, :-1], index, seen)
        logps = jax.nn.log_softmax(net.head(hidden, jnp.dtype("float32")))
        logps = jnp.take_along_axis(logps, batch["tokens"][:, 1:, None], -1)[..., 0].reshape(B // 2, 2, -1)
        beside = {"like_tokens": noise[..., 1:], "of_rows": pairs["of_rows"]}
        loss, *others = pairwise(logps, pairs["weights"][..., 1:], beside)
        return loss, (others, logps)

    (loss, others), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(model.params)
    (wanted, (theirs, logps)), slope = jax.jit(jax.value_and_grad(plain, has_aux=True))(model.params)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(others[1]["first"], theirs[1]["first"], rtol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(slope))
    for a, b in zip(*map(jax.tree.leaves, (gradient, slope)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * scale)
    found = jax.jit(token_logps, static_argnums=(0, 3))(model.config, model.params, pairs, Compute())
    np.testing.assert_allclose(found[..., 1:], jnp.where(pairs["weights"][..., 1:] > 0, logps, 0), atol=2e-5)


def test_a_batch_of_groups_in_parts_is_the_batch(model, rows):
    """Micro-batches keep groups together, and metrics are summed as losses are."""

    @dataclasses.dataclass(frozen=True)
    class Pairwise(ResponseOnly):
        joint = True

        def loss(self, logps, weights, beside):
            return pairwise(logps, weights, beside)

    batch: Any = {k: jnp.asarray(v)[:8] for k, v in next(batches(rows, SFT, seed=0)).items()}
    pairs = {k: v.reshape(4, 2, -1) for k, v in batch.items()}
    pairs |= {"like_tokens": jnp.ones(pairs["tokens"].shape), "of_rows": jnp.arange(1.0, 5)}
    found = []
    for micro in (None, 2):
        config = dataclasses.replace(SFT, batch=4, micro_batch=micro, objective=Pairwise())
        state = init_state(config, model.params, make_mesh(Mesh()))
        found.append(make_step(model.config, config, "float32")(state, pairs, np.float32(1e-3))[1])
    for name in ("loss", "weight", "gradient_norm", "tokens"):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-5)
    np.testing.assert_allclose(found[1]["metrics"]["first"], found[0]["metrics"]["first"], rtol=1e-5)
