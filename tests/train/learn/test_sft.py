"""Fine-tuning: what is learnt, that means are of tokens, that a stopped run ends as one that never stopped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sft_cases import (
    LEARNER,
    SFT,
    InMemory,
    Killed,
    assert_bits,
    kill_after,
    tune,
    with_step,
    without_seconds,
)

from train.learn.batches import batches, steps_of, to_rows
from train.learn.checkpoints import SftCheckpoints
from train.learn.settings import Sft, Watch
from train.learn.sft import mean_loss
from train.learn.step import init_state, make_step
from train.log import UserError
from train.models.characters import PAD_ID
from train.models.loss import Compute, loss_sums
from train.models.open import random_model

SUMS = jax.jit(loss_sums, static_argnums=0)


# --- rows and batches ---


def test_rows_learn_the_completion_only(examples, rows):
    assert rows.tokens.shape == rows.weights.shape
    assert (rows.tokens.shape[1] - 1) % 16 == 0
    for tokens, weights, e in zip(rows.tokens, rows.weights, examples, strict=True):
        n, p = len(e["tokens"]), e["prompt_length"]
        assert tokens[:n].tolist() == e["tokens"]
        assert set(tokens[n:]) <= {PAD_ID}
        assert np.flatnonzero(weights).tolist() == list(range(p, n))
    assert rows.targets == sum(len(e["tokens"]) - e["prompt_length"] for e in examples)


def test_rows_take_the_weight_and_the_loss_of_all_tokens(examples):
    heavy = to_rows([examples[0] | {"weight": 0.25}], SFT, PAD_ID)
    assert set(heavy.weights[0].tolist()) == {0.0, 0.25}
    everything = to_rows(examples, dataclasses.replace(SFT, loss="all"), PAD_ID)
    assert everything.targets == sum(len(e["tokens"]) - 1 for e in examples)  # the first has none before it


def test_rows_drop_and_count_what_is_too_long(examples):
    length = sorted(len(e["tokens"]) for e in examples)[10]
    kept = to_rows(examples, dataclasses.replace(SFT, max_length=length), PAD_ID)
    assert len(kept.tokens) + kept.dropped == 32
    assert kept.dropped == sum(len(e["tokens"]) > length for e in examples) > 0
    with pytest.raises(UserError, match=r"none of 32 examples is at most sft\.max_length=2 tokens"):
        to_rows(examples, dataclasses.replace(SFT, max_length=2))
    with pytest.raises(UserError, match="no example to train on"):
        to_rows([], SFT)


def test_batches_visit_every_row_once_an_epoch(rows):
    config = dataclasses.replace(SFT, batch=5, epochs=3)
    marked = dataclasses.replace(rows, tokens=np.arange(32, dtype=np.int32)[:, None] + 1)
    marked = dataclasses.replace(marked, weights=np.ones((32, 1), np.float32))
    seen = [b["tokens"][:, 0].tolist() for b in batches(marked, config, seed=3)]
    assert len(seen) == steps_of(rows, config) == 21
    epochs = [[t for batch in seen[7 * e : 7 * e + 7] for t in batch if t] for e in range(3)]
    assert [sorted(e) for e in epochs] == [list(range(1, 33))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert seen == [b["tokens"][:, 0].tolist() for b in batches(marked, config, seed=3)]
    assert seen != [b["tokens"][:, 0].tolist() for b in batches(marked, config, seed=4)]
    assert seen[9:] == [b["tokens"][:, 0].tolist() for b in batches(marked, config, seed=3, start=9)]
    last = list(batches(marked, config, seed=3))[6]
    assert last["weights"][:, 0].tolist() == [1, 1, 0, 0, 0]


# --- the loss and its gradient ---


def test_the_loss_is_a_sum_over_a_sum(model, rows):
    """Neither rows without weight nor padding tokens nor longer padding change anything."""
    some = {"tokens": rows.tokens[:6], "weights": rows.weights[:6]}
    loss, weight = SUMS(model.config, model.params, some)
    assert float(weight) == rows.weights[:6].sum()
    parts = [SUMS(model.config, model.params, {k: v[i : i + 3] for k, v in some.items()}) for i in (0, 3)]
    assert float(loss) == pytest.approx(float(parts[0][0] + parts[1][0]), rel=1e-5)
    rubbish = np.where(np.cumsum(some["weights"][:, ::-1], 1)[:, ::-1] > 0, some["tokens"], 9)  # after the last target
    padded = {
        "tokens": np.pad(rubbish, ((0, 2), (0, 16)), constant_values=7).astype(np.int32),
        "weights": np.pad(some["weights"], ((0, 2), (0, 16))),
    }
    again = SUMS(model.config, model.params, padded)
    np.testing.assert_allclose(again, (loss, weight), rtol=1e-5)


def test_accumulated_gradients_equal_the_whole_batch(model, rows, mesh, undisturbed):
    """Eight steps of 2 × 4 rows, whose counts of targets differ, and of 8 rows at once.

    Adam divides by the gradient's size, so where that is rounding noise a weight may move either way: gradients
    are compared by their norm, weights by what they moved on average.
    """
    whole, log = undisturbed
    parts, part_log = tune(model, rows, dataclasses.replace(SFT, micro_batch=4), mesh)
    for a, b in zip(log, part_log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)
        assert a["targets"] == b["targets"]
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert float(jnp.abs(a - b).mean()) < 1e-5


def test_one_step_is_adamw_by_hand(model, rows, mesh):
    """The first update: clipped gradient g, Adam's m/√v = g/(|g| + ε), decay of matrices only."""
    config = with_step(SFT, clip=0.5, weight_decay=0.1)
    batch = next(batches(rows, config, seed=0))
    step = make_step(model.config, config, "float32")
    state, sums = step(init_state(config, model.params, mesh), batch, jnp.float32(0.01))

    def mean_loss(params):
        loss, weight = loss_sums(model.config, params, {k: jnp.asarray(v) for k, v in batch.items()})
        return loss / weight

    g = jax.jit(jax.grad(mean_loss))(model.params)
    norm = float(jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(g))))
    assert float(sums["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
    assert norm > 0.5

    def by_hand(p, g):
        g = np.asarray(g, np.float64) * 0.5 / norm
        return np.asarray(p) - 0.01 * (g / (np.abs(g) + 1e-8) + (0.1 * np.asarray(p) if p.ndim > 1 else 0))

    for found, p, grad in zip(*map(jax.tree.leaves, (state.params, model.params, g)), strict=True):
        sure = np.abs(np.asarray(grad)) > 1e-6  # elsewhere ε and rounding decide
        np.testing.assert_allclose(np.asarray(found)[sure], by_hand(p, grad)[sure], atol=1e-5)


def test_training_drives_32_examples_under_a_twentieth(rows, mesh):
    model = random_model(LEARNER, mesh, seed=0)
    config = Sft(learning_rate=4e-3, epochs=140, batch=32, max_length=96)
    tuned, log = tune(model, rows, config, mesh)
    assert log[0]["loss"] > 3
    loss, weight = SUMS(model.config, tuned, {"tokens": rows.tokens, "weights": rows.weights})
    assert float(loss / weight) < 0.05
    assert log[-1]["loss"] < 0.05


def test_the_base_is_neither_donated_nor_changed(model, rows, mesh):
    before = jax.tree.map(np.array, model.params)
    tuned, _ = tune(model, rows, SFT, mesh)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(model.params))
    assert_bits(jax.tree.map(np.asarray, model.params), before)
    assert all((np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(tuned), jax.tree.leaves(before), strict=True))


def test_a_rate_of_zero_changes_nothing(model, rows, mesh):
    tuned, _ = tune(model, rows, dataclasses.replace(SFT, learning_rate=0.0, epochs=1), mesh)
    assert_bits(tuned, model.params)


# --- masters, averages, decay ---


def test_bfloat16_masters_hold_bfloat16_numbers_and_float32_moments(model, rows, mesh):
    config = with_step(SFT, masters="bfloat16")
    state = init_state(config, model.params, mesh)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state.optimizer) if x.ndim} == {jnp.dtype(jnp.float32)}
    tuned, log = tune(model, rows, config, mesh)
    for leaf in jax.tree.leaves(tuned):
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, leaf.astype(jnp.bfloat16).astype(jnp.float32))
    assert log[-1]["loss"] < log[0]["loss"]


def test_the_average_is_the_recursion_by_hand(model, rows, mesh):
    """a ← k a + (1 − k) θ with k = min(ema, (1 + n)/(10 + n)), from the base on; it is what a run returns."""
    ema = 0.25
    config = with_step(dataclasses.replace(SFT, checkpoint_every=1), ema=ema)
    seen = []

    class Every(InMemory):
        def save(self, state, step, metrics):
            seen.append(jax.tree.map(np.array, (state.params, state.average)))

    tuned, _ = tune(model, rows, config, mesh, checkpoints=Every())
    average = jax.tree.map(np.array, model.params)
    for n, (params, found) in enumerate(seen, start=1):
        keep = np.float32(min(ema, (1 + n) / (10 + n)))
        average = jax.tree.map(lambda a, p, k=keep: k * a + (1 - k) * p, average, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), average, found)
    last = jax.tree.leaves(tuned)[0]
    assert not np.array_equal(last, jax.tree.leaves(seen[-1][1])[0])  # one update further
    assert float(np.abs(last - jax.tree.leaves(average)[0]).max()) < 0.01


def test_a_resumed_run_keeps_its_average_and_its_count(model, rows, mesh, tmp_path):
    config = with_step(dataclasses.replace(SFT, checkpoint_every=3), ema=0.9, masters="bfloat16")
    whole, log = tune(model, rows, config, mesh)
    with pytest.raises(Killed):
        tune(model, rows, config, mesh, checkpoints=SftCheckpoints(tmp_path / "state"), on_step=kill_after(5))
    tuned, again = tune(model, rows, config, mesh, checkpoints=SftCheckpoints(tmp_path / "state"))
    assert_bits(tuned, whole)
    assert without_seconds(again) == without_seconds(log)


def test_what_decays(model, rows, mesh):
    """With no gradient at all, one update takes rate × decay of what decays and nothing of the rest."""
    config = with_step(SFT, weight_decay=0.5)
    batch = {"tokens": np.zeros((8, 17), np.int32), "weights": np.zeros((8, 17), np.float32)}
    flat = lambda tree: {  # noqa: E731
        "/".join(k.key for k in path): np.array(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    before = flat(model.params)
    for patterns, expected in (
        ((), {p for p in before if not p.endswith("norm/weight")}),
        (("mlp", "/model/norm"), {p for p in before if "/mlp/" in p or p == "model/norm/weight"}),
    ):
        c = with_step(config, decay=patterns)
        state, _ = make_step(model.config, c, "float32")(init_state(c, model.params, mesh), batch, jnp.float32(0.1))
        after = flat(state.params)
        shrunk = {p for p in before if not np.array_equal(before[p], after[p])}
        assert shrunk == expected
        for path in shrunk:
            np.testing.assert_allclose(after[path], before[path] * (1 - 0.1 * 0.5), rtol=1e-6)
    with pytest.raises(UserError, match=r"sft\.step\.decay: 'mpl' matches none of the"):
        tune(model, rows, with_step(config, decay=("mpl",)), mesh)


# --- what is measured ---


def test_the_held_out_loss_is_measured_on_rows_not_learnt(model, examples, mesh):
    config = dataclasses.replace(SFT, watch=Watch(evaluate_every=3))
    rows, held = (to_rows(part, config, PAD_ID) for part in (examples[:24], examples[24:]))
    tuned, log = tune(model, rows, config, mesh, held_out=held)
    assert [m["step"] for m in log if "held_out_loss" in m] == [3, 6]
    loss, weight = SUMS(model.config, tuned, {"tokens": held.tokens, "weights": held.weights})
    assert log[-1]["held_out_loss"] == pytest.approx(float(loss / weight), rel=1e-5)
    odd = dataclasses.replace(config, batch=5)  # batches filled up with rows without weight
    assert mean_loss(model.config, tuned, held, odd, Compute(), mesh=mesh) == pytest.approx(
        float(loss / weight), rel=1e-5
    )
    without, log = tune(model, rows, config, mesh)
    assert_bits(without, tuned)  # measuring changes nothing
    assert "held_out_loss" not in log[-1]


def test_speed_is_in_the_metrics(model, rows, undisturbed):
    _, log = undisturbed
    for metrics in log:
        assert 0 < metrics["mfu"] < 1
        tokens = metrics["tokens_per_second"] * metrics["seconds"]
        assert metrics["targets"] < tokens <= 8 * (rows.tokens.shape[1] - 1)


def test_a_trace_is_written(model, rows, mesh, tmp_path):
    config = dataclasses.replace(SFT, epochs=1, watch=Watch(trace_from=2, trace_steps=1))
    tune(model, rows, config, mesh, trace_to=tmp_path / "trace")
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_judging_the_targets_alone_gives_the_same_sums_and_gradients(model):
    """The head sees only the positions with a loss; sums and gradients are those of all positions."""
    rows = to_rows([{"tokens": list(range(2, 2 + n)), "prompt_length": n - 3} for n in (20, 30, 9)], Sft(batch=3))
    assert rows.positions is not None
    assert rows.positions.shape == (3, 8)
    assert [sorted(set(p.tolist()) - {0}) for p in rows.positions] == [[17, 18, 19], [27, 28, 29], [6, 7, 8]]
    (sparse,) = batches(rows, Sft(batch=3, epochs=1), seed=0)
    dense = {name: values for name, values in sparse.items() if name != "targets"}
    results = []
    for batch in (sparse, dense):
        sums = jax.value_and_grad(lambda p, b=batch: loss_sums(model.config, p, b), has_aux=True)
        (loss, weight), grads = jax.jit(sums)(model.params)
        results.append((float(loss), float(weight), grads))
    assert results[0][:2] == pytest.approx(results[1][:2], rel=1e-5)
    for a, b in zip(jax.tree.leaves(results[0][2]), jax.tree.leaves(results[1][2]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
