"""Fine-tuning that is stopped, killed or goes wrong, and goes on."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sft_cases import (
    SFT,
    InMemory,
    Killed,
    assert_bits,
    kill_after,
    tune,
    with_step,
    without_seconds,
)

from train.learn.batches import batches, to_rows
from train.learn.checkpoints import SftCheckpoints
from train.learn.sft import fine_tune
from train.learn.step import init_state, make_step
from train.log import UserError
from train.models.characters import PAD_ID

# --- stopping and going on ---


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
