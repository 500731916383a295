"""Every setting of fine-tuning is read, and changes what it says."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers.sft_cases import SFT, InMemory, assert_bits, tune, with_step

from train.learn.batches import batches, to_rows
from train.learn.optim import learning_rates
from train.learn.settings import Sft, Step
from train.learn.step import compute_of, init_state, make_step
from train.log import UserError
from train.models.characters import PAD_ID

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


# `start` is read where the loop is planned (train/improve/plan.py), `packing` and `overlong` where rows are made.
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
        *STEPS, "attention", "layers", "masters", "decay", "ema", "remat", "logits_at_once", "spike", "max_skipped",
        "router_aux_loss_coef",
    }  # fmt: skip


# The others have tests of their own, `attention` in test_fused.py, `router_aux_loss_coef` in test_experts_row.py.
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
