"""Fine-tuning: what is learnt, that means are of tokens, that a stopped run ends as one that never stopped."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sft_cases import SFT, SIZES, assert_bits, tune, without_seconds

from train.learn.batches import batches, steps_of, to_rows
from train.learn.checkpoints import SftCheckpoints
from train.learn.optim import learning_rates
from train.learn.settings import Sft, Step, Watch
from train.learn.sft import Checkpoints, fine_tune, mean_loss
from train.learn.step import compute_of, init_state, make_step
from train.log import UserError
from train.models.characters import PAD_ID, encode
from train.models.loss import Compute, loss_sums
from train.models.open import random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh
from train.tasks.pretraining import MINIATURE, pretraining_examples

LEARNER = SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(Mesh())


@pytest.fixture(scope="module")
def model(mesh):
    return random_model(SIZES, mesh, seed=0)


@pytest.fixture(scope="module")
def examples():
    """32 worked problems of the miniature, of at most 47 symbols, as the loop hands them over."""
    texts = pretraining_examples(MINIATURE, seed=1, row=48)
    lines = [next(texts) for _ in range(32)]
    return [{"tokens": encode(line), "prompt_length": line.index("?") + 1, "weight": 1.0} for line in lines]


@pytest.fixture(scope="module")
def rows(examples):
    return to_rows(examples, SFT, PAD_ID)


def with_step(config, **changes):
    return dataclasses.replace(config, step=dataclasses.replace(config.step, **changes))


@pytest.fixture(scope="module")
def undisturbed(model, rows, mesh):
    return tune(model, rows, SFT, mesh)


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
    sums = jax.jit(loss_sums, static_argnums=0)
    some = {"tokens": rows.tokens[:6], "weights": rows.weights[:6]}
    loss, weight = sums(model.config, model.params, some)
    assert float(weight) == rows.weights[:6].sum()
    parts = [sums(model.config, model.params, {k: v[i : i + 3] for k, v in some.items()}) for i in (0, 3)]
    assert float(loss) == pytest.approx(float(parts[0][0] + parts[1][0]), rel=1e-5)
    rubbish = np.where(np.cumsum(some["weights"][:, ::-1], 1)[:, ::-1] > 0, some["tokens"], 9)  # after the last target
    padded = {
        "tokens": np.pad(rubbish, ((0, 2), (0, 16)), constant_values=7).astype(np.int32),
        "weights": np.pad(some["weights"], ((0, 2), (0, 16))),
    }
    again = sums(model.config, model.params, padded)
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
    loss, weight = loss_sums(model.config, tuned, {"tokens": rows.tokens, "weights": rows.weights})
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


# --- stopping and going on ---


class Killed(Exception):
    pass


class InMemory(Checkpoints):
    """Keeps the newest state as NumPy arrays: the next step donates the state's own buffers."""

    def __init__(self):
        self.kept: Any = None
        self.snapshots: list[tuple[int, Any]] = []

    def restore(self, like):
        if self.kept is None:
            return None, 0, []
        state, step, log = self.kept
        return jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), state, like), step, list(log)

    def save(self, state, step, metrics):
        self.kept = (jax.tree.map(np.array, state), step, list(metrics))

    def snapshot(self, params, index):
        self.snapshots.append((index, jax.tree.map(np.array, params)))


def kill_after(steps):
    """An `on_step` that dies once `steps` steps are seen."""

    def on_step(metrics):
        if metrics["step"] == steps:
            raise Killed

    return on_step


@pytest.mark.parametrize("where", ["memory", "orbax"])
@pytest.mark.parametrize("killed", [2, 5])
def test_a_resumed_run_ends_with_the_same_bits(model, rows, mesh, undisturbed, tmp_path, where, killed):
    config = dataclasses.replace(SFT, checkpoint_every=3)
    memory = InMemory()
    make = (lambda: memory) if where == "memory" else (lambda: SftCheckpoints(tmp_path / "state"))
    with pytest.raises(Killed):
        tune(model, rows, config, mesh, checkpoints=make(), on_step=kill_after(killed))
    steps = []
    tuned, log = tune(model, rows, config, mesh, checkpoints=make(), on_step=lambda m: steps.append(m["step"]))
    assert steps == list(range(1, 9))
    assert_bits(tuned, undisturbed[0])
    assert without_seconds(log) == without_seconds(undisturbed[1])
    if where == "memory":
        assert memory.kept[1] == 6


def test_orbax_state_goes_on_from_the_newest_step_and_can_be_removed(model, rows, mesh, tmp_path):
    kept = SftCheckpoints(tmp_path / "state", tmp_path / "snapshots")
    config = dataclasses.replace(SFT, checkpoint_every=3, snapshots=4)
    tune(model, rows, config, mesh, checkpoints=kept)
    state, step, log = kept.restore(init_state(SFT, model.params, mesh))
    assert step == len(log) == 6
    assert state is not None
    assert sorted(p.name for p in (tmp_path / "snapshots").iterdir()) == ["0", "1", "2"]  # the last is the result
    kept.remove()
    assert not (tmp_path / "state").exists()


def test_snapshots_are_equally_spaced(model, rows, mesh, undisturbed):
    """Of eight steps: snapshot 0 after four, the last being the result itself."""
    memory = InMemory()
    tuned, _ = tune(model, rows, dataclasses.replace(SFT, snapshots=2), mesh, checkpoints=memory)
    assert_bits(tuned, undisturbed[0])
    ((index, half),) = memory.snapshots
    assert index == 0
    stopped = InMemory()
    config = dataclasses.replace(SFT, checkpoint_every=4)
    with pytest.raises(Killed):
        tune(model, rows, config, mesh, checkpoints=stopped, on_step=kill_after(5))
    assert_bits(half, stopped.kept[0].params)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(model, rows, mesh):
    broken = jax.tree.map(lambda x: x * jnp.nan, model.params)
    with pytest.raises(
        UserError, match=r"the loss is nan and the gradient.s norm nan at step 3 of 8 .*lower sft.learning_rate"
    ):
        fine_tune(model.config, broken, rows, SFT, mesh=mesh, seed=7)
    with pytest.raises(UserError, match=r"at step [2-8] of 8 \(learning rate 1e\+3\d\), 3 skipped in a row"):
        tune(model, rows, dataclasses.replace(SFT, learning_rate=1e30, schedule="constant"), mesh)
    short = dataclasses.replace(SFT, batch=16, epochs=1, learning_rate=1e30, schedule="constant")
    with pytest.raises(UserError, match=r"at step 2 of 2 .* 1 skipped in a row"):  # nothing finite to end with
        tune(model, rows, short, mesh)


def test_an_update_that_is_not_finite_or_a_spike_changes_nothing_but_the_count(model, rows, mesh):
    config = with_step(SFT, ema=0.9)
    step = make_step(model.config, config, "float32")
    (batch, *_) = batches(rows, config, seed=0)
    state, sums = step(init_state(config, model.params, mesh), batch, jnp.float32(0.01), np.float32(0.5))
    assert sums["skipped"].tolist() == [0, 0]
    before = jax.tree.map(np.array, state)
    mean = float(sums["loss"] / sums["weight"])
    cases = [
        (batch | {"weights": np.where(batch["weights"] > 0, np.float32(np.inf), 0)}, math.inf),
        (batch, 0.5 * mean),
        (batch | {"weights": np.where(batch["weights"] > 0, np.float32(np.nan), 0)}, math.inf),
    ]
    for count, (given, limit) in enumerate(cases, start=1):
        state, sums = step(state, given, jnp.float32(0.01), np.float32(0.5), np.float32(limit))
        assert sums["skipped"].tolist() == [count, count]
        assert_bits(jax.tree.map(np.array, state[:3]), before[:3])
    state, sums = step(state, batch, jnp.float32(0.01), np.float32(0.5), np.float32(2 * mean))
    assert sums["skipped"].tolist() == [3, 0]
    assert not np.array_equal(state.params["model"]["norm"]["weight"], before.params["model"]["norm"]["weight"])


def test_a_skipped_update_is_told_and_left_out_of_the_log(model, examples, mesh, monkeypatch, capsys):
    """The tokens of one batch are made others: every update but its own is made."""
    config = with_step(dataclasses.replace(SFT, epochs=4, learning_rate=1e-2), spike=1.5)
    rows = to_rows(examples, config, PAD_ID)

    def spoil(rows, config, *, seed, start=0, share=None):
        for number, batch in enumerate(batches(rows, config, seed=seed, start=start, share=share), start):
            yield batch | ({"tokens": 63 - batch["tokens"]} if number == 12 else {})

    monkeypatch.setattr("train.learn.shares.batches", spoil)
    _, log = tune(model, rows, config, mesh)
    assert [m["step"] for m in log] == [n for n in range(1, 17) if n != 13]
    assert [m["skipped"] for m in log] == [0] * 12 + [1] * 3
    assert "at step 13 of 16, above 1.5 × the median" in capsys.readouterr().out


# --- rates and settings ---


def test_the_rate_warms_up_and_falls_along_a_cosine():
    config = Sft(learning_rate=1.0, warmup=0.2)
    rates = [*learning_rates(config, 10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert rates[2:] == sorted(rates[2:], reverse=True)
    constant = dataclasses.replace(config, schedule="constant")
    assert [*learning_rates(constant, 10)] == [0.5, *[1.0] * 9]
    assert learning_rates(dataclasses.replace(config, warmup=0.0), 10)[0] == 1.0
    assert learning_rates(dataclasses.replace(config, warmup=1.0), 10)[9] == 1.0
    assert learning_rates(Sft(learning_rate=1.0), 1) == (1.0,)  # one step in all


def test_two_rates_share_one_compilation(model, rows, mesh, undisturbed, caplog):
    how = compute_of(SFT, model.config, model.params, mesh, "float32")
    step: Any = make_step(model.config, dataclasses.replace(SFT, learning_rate=0.0), how)
    before = step._cache_size()
    assert before > 0
    changed = dataclasses.replace(SFT, learning_rate=1e-5)
    with caplog.at_level("WARNING", logger="jax"), jax.log_compiles(True):
        tune(model, rows, changed, mesh)
    assert step._cache_size() == before
    assert not [r for r in caplog.records if "Compiling jit(step)" in r.getMessage()]


# `start` is read where the loop is planned (train/plan.py), `packing` and `overlong` where rows are made, not here.
CHANGES = {
    "learning_rate": 1e-3, "epochs": 1, "batch": 16, "micro_batch": 4, "warmup": 0.5, "schedule": "constant",
    "max_length": 24, "loss": "all", "snapshots": 4, "checkpoint_every": 2,
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_every_setting_is_read(model, examples, mesh, undisturbed, field):
    config = dataclasses.replace(SFT, **{field: CHANGES[field]})
    memory = InMemory()
    tuned, log = tune(model, to_rows(examples, config, PAD_ID), config, mesh, checkpoints=memory)
    if field in ("snapshots", "checkpoint_every"):  # change what is kept, and nothing else
        assert_bits(tuned, undisturbed[0])
        assert [i for i, _ in memory.snapshots] == ([0, 1, 2] if field == "snapshots" else [])
        assert (memory.kept and memory.kept[1]) == (None if field == "snapshots" else 6)
    elif field == "micro_batch":  # changes how the sum is taken, and not what it is
        assert "[4,48]" in program(model, examples, mesh, config)
        assert "[4,48]" not in program(model, examples, mesh, SFT)
    else:
        losses = [m["loss"] for m in log]
        assert losses != [m["loss"] for m in undisturbed[1]]


def program(model, examples, mesh, config) -> str:
    """What is asked of XLA, before it is compiled."""
    batch = next(batches(to_rows(examples, config, PAD_ID), config, seed=0))
    given = (init_state(config, model.params, mesh), batch, jnp.float32(0))
    return str(jax.make_jaxpr(make_step(model.config, config, "float32"))(*given))


def test_no_setting_is_forgotten():
    assert {f.name for f in dataclasses.fields(Sft)} >= {*CHANGES, "start", "step", "watch"}
    assert {f.name for f in dataclasses.fields(Step)} == {
        *STEPS, "attention", "layers", "masters", "decay", "ema", "remat", "logits_at_once", "spike", "max_skipped"
    }  # fmt: skip


# The others have tests of their own, `attention` in test_models_fused.py.
STEPS = {"clip": 1e-9, "weight_decay": 0.0}


@pytest.mark.parametrize("field", STEPS)
def test_every_setting_of_a_step_is_read(model, rows, mesh, field):
    config = with_step(dataclasses.replace(SFT, epochs=1), weight_decay=0.5)
    results = [tune(model, rows, c, mesh)[0] for c in (config, with_step(config, **{field: STEPS[field]}))]
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, results), strict=True))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(results[1]))


def test_remat_and_chunks_are_read(model, examples, mesh):
    plain = program(model, examples, mesh, SFT)
    assert "remat" not in plain
    assert "remat" in program(model, examples, mesh, with_step(SFT, remat="full"))
    assert "scan" not in plain
    assert "scan" in program(model, examples, mesh, with_step(SFT, logits_at_once=64))


def test_spikes_and_their_count_are_read(model, rows, mesh):
    config = dataclasses.replace(SFT, epochs=4, learning_rate=0.0)
    assert len(tune(model, rows, config, mesh)[1]) == 16
    with pytest.raises(UserError, match=r"above 1\.0001 × the median"):
        tune(model, rows, with_step(config, spike=1.0001, max_skipped=1), mesh)
    _, log = tune(model, rows, with_step(config, spike=1.0001, max_skipped=16), mesh)
    assert 8 <= len(log) < 16


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
    loss, weight = loss_sums(model.config, tuned, {"tokens": held.tokens, "weights": held.weights})
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
        (loss, weight), grads = jax.value_and_grad(
            lambda p, b=batch: loss_sums(model.config, p, jax.tree.map(jnp.asarray, b)), has_aux=True
        )(model.params)
        results.append((float(loss), float(weight), grads))
    assert results[0][:2] == pytest.approx(results[1][:2], rel=1e-5)
    for a, b in zip(jax.tree.leaves(results[0][2]), jax.tree.leaves(results[1][2]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
