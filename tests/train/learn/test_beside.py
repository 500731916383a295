"""Merging beside the trainer: the weights of decays, sums of snapshots, blocks, re-merging, and killed runs."""

from __future__ import annotations

import dataclasses
import typing

import jax
import numpy as np
import pytest
from helpers.sft_cases import SFT, InMemory, Killed, assert_bits, kill_after, tune, with_step

from train.learn import decay
from train.learn.beside import Blocks, remerge
from train.learn.checkpoints import SftCheckpoints
from train.learn.decay import DECAYS, Beside, Cosine, Ema, Linear, OneMinusSqrt, Parts, Rising, Schedule
from train.learn.settings import Sft
from train.learn.sft import fine_tune
from train.log import UserError
from train.resolve import build
from train.runtime.checkpoint import load_weights

EVERY_SHAPE = (Linear(), Cosine(), OneMinusSqrt(), Rising(), Ema(keep=0.7), Parts(weights=(1.0, 3.0)))


def of(**keys):
    return dataclasses.replace(SFT, schedule="constant", beside=Beside(**keys))


class Watched(SftCheckpoints):
    """Keeps the weights after every update beside everything else."""

    def __init__(self, folder):
        super().__init__(folder / "state", blocks=folder / "blocks")


@pytest.fixture(scope="module")
def path(model, rows, mesh):
    """The weights after every one of the eight updates of a run at a constant rate."""
    memory = InMemory()
    last, _ = tune(model, rows, dataclasses.replace(SFT, schedule="constant", snapshots=8), mesh, checkpoints=memory)
    return [params for _, params in memory.snapshots] + [last]


def summed(weights, models):
    """In float64."""
    return jax.tree.map(
        lambda *leaves: sum(w * np.asarray(x, np.float64) for w, x in zip(weights, leaves, strict=True)), *models
    )


def assert_close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=2e-6, atol=1e-7), found, wanted)


# --- the weights -------------------------------------------------------------------------------------------


def test_every_name_is_a_shape():
    assert tuple(DECAYS.values()) == typing.get_args(decay.Decay)
    for name, kind in DECAYS.items():
        config = build(Sft, {"beside": {"every": 2, "decay": {"name": name}}}, "sft")
        assert type(config.beside.decay) is kind
    assert {type(shape) for shape in EVERY_SHAPE} == set(DECAYS.values())


@pytest.mark.parametrize("shape", EVERY_SHAPE, ids=lambda shape: shape.name)
@pytest.mark.parametrize("count", [2, 5, 48])
def test_the_weights_of_a_decay_sum_to_one_and_are_its_falls(shape, count):
    points, found = shape.points(count), shape.coefficients(count)
    assert len(found) == count
    assert min(found) >= 0
    np.testing.assert_allclose([points[0], points[-1], sum(found)], [1, 0, 1], atol=1e-12)
    # θ_0 + Σ d_j (θ_j − θ_{j−1}) is the same point: the identity of the paper.
    models = np.random.default_rng(0).normal(size=(count, 7))
    steps = models[0] + sum(points[j] * (models[j] - models[j - 1]) for j in range(1, count))
    np.testing.assert_allclose(np.array(found) @ models, steps, rtol=1e-10, atol=1e-12)


def test_the_weights_by_hand():
    np.testing.assert_allclose(Linear().coefficients(4), [0.25] * 4, rtol=1e-15)
    np.testing.assert_allclose(Rising().coefficients(3), [1 / 6, 2 / 6, 3 / 6], rtol=1e-12)
    np.testing.assert_allclose(OneMinusSqrt().coefficients(4), np.diff(np.sqrt([0, 1, 2, 3, 4])) / 2, rtol=1e-12)
    np.testing.assert_allclose(Ema(keep=0.5).coefficients(3), np.array([1, 2, 4]) / 7, rtol=1e-12)
    np.testing.assert_allclose(Parts(weights=(1.0, 3.0)).coefficients(4), [1 / 8, 1 / 8, 3 / 8, 3 / 8], rtol=1e-12)
    wanted = [0.5 * (np.cos(np.pi * j / 3) - np.cos(np.pi * (j + 1) / 3)) for j in range(3)]
    np.testing.assert_allclose(Cosine().coefficients(3), wanted, rtol=1e-12)


@pytest.mark.parametrize("shape", [Linear(), Cosine(), OneMinusSqrt()], ids=lambda shape: shape.name)
def test_on_a_quadratic_the_merge_is_the_decayed_run_to_first_order_in_the_rate(shape):
    """Halving the rate divides what merged and decayed runs differ by by four, what the run moved by two."""
    curvature, start = np.array([0.3, 1.0, 2.5]), np.array([1.0, -2.0, 0.5])
    points = shape.points(12)

    def runs(rate):
        constant, decayed = [start], start
        for j in range(1, 12):
            constant.append(constant[-1] - rate * curvature * constant[-1])
            decayed = decayed - rate * points[j] * curvature * decayed
        return np.array(shape.coefficients(12)) @ np.array(constant), decayed

    off = [np.abs(np.subtract(*runs(rate))).max() for rate in (2e-3, 1e-3)]
    assert off[0] / off[1] == pytest.approx(4, rel=0.1)
    assert np.abs(runs(1e-3)[0] - start).max() > 10 * off[1]


# --- in a run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", EVERY_SHAPE, ids=lambda shape: shape.name)
def test_a_run_returns_its_snapshots_merged(model, rows, mesh, path, shape):
    """Of eight updates with every=3 the snapshots are after 2, 5 and 8; all of them, or the last two."""
    tuned, _ = tune(model, rows, of(every=3, decay=shape), mesh)
    assert_close(tuned, summed(shape.coefficients(3), [path[1], path[4], path[7]]))
    tuned, _ = tune(model, rows, of(every=3, decay=shape, last=0.5), mesh)
    assert_close(tuned, summed(shape.coefficients(2), [path[4], path[7]]))


def test_snapshots_change_nothing_of_the_run_itself(model, rows, mesh, path, tmp_path):
    tuned, _ = tune(model, rows, of(every=2, block=2), mesh, checkpoints=Watched(tmp_path))
    assert_bits(tuned, path[7])


@pytest.mark.parametrize("layers", ["unrolled", "stacked"])
def test_blocks_are_the_means_of_their_snapshots_and_are_merged_again_exactly(
    model, rows, mesh, path, tmp_path, layers
):
    """Eight snapshots in blocks of 3, 3 and 2."""
    config = with_step(of(every=1, block=3, decay=Linear(), last=0.6), layers=layers)
    tuned, _ = tune(model, rows, config, mesh, checkpoints=Watched(tmp_path))
    assert_close(tuned, summed([1 / 5] * 5, path[3:]))
    for number, part in enumerate((path[:3], path[3:6], path[6:])):
        mean = load_weights(tmp_path / "blocks" / str(number), model.params)
        assert_close(mean, summed([1 / len(part)] * len(part), part))
    again = remerge(tmp_path / "blocks", model.params, Linear(), 1.0)
    assert_close(again, summed([1 / 8] * 8, path))
    assert_close(remerge(tmp_path / "blocks", model.params, Linear(), 0.25), summed([1 / 2] * 2, path[6:]))


def test_a_decay_that_is_not_constant_within_a_block_is_refused(model, rows, mesh, path, tmp_path):
    tune(model, rows, of(every=1, block=4), mesh, checkpoints=Watched(tmp_path))
    wanted = (
        r"block 0 \(snapshots 0 to 3\) is kept as one mean, and this decay weighs its snapshots "
        r"\[0.0381, 0.108, 0.162, 0.191\] where the run weighed them \[0.25, 0.25, 0.25, 0.25\].*sft.beside.block=1"
    )
    with pytest.raises(UserError, match=wanted):
        remerge(tmp_path / "blocks", model.params, Cosine(), 1.0)
    with pytest.raises(UserError, match=r"block 1 \(snapshots 4 to 7\)"):
        remerge(tmp_path / "blocks", model.params, Linear(), 0.25)
    parts = Parts(weights=(1.0, 4.0))
    assert_close(remerge(tmp_path / "blocks", model.params, parts, 1.0), summed([0.05] * 4 + [0.2] * 4, path))
    with pytest.raises(UserError, match=r"nothing: no blocks of snapshots there; a run with sft\.beside\.every"):
        remerge(tmp_path / "nothing", model.params, parts, 1.0)


def test_what_the_run_weighed_within_a_block_is_merged_again_too():
    """A block holds its snapshots by the run's own decay; that decay, and it times constants, are exact."""
    schedule = Schedule(Beside(every=1, decay=Cosine(), block=3), 12)
    np.testing.assert_allclose(schedule.remerged(Cosine(), 1.0), [total for _, total in schedule.blocks()])
    with pytest.raises(UserError, match="block 0"):
        schedule.remerged(Linear(), 1.0)


@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("killed", [4, 6])
def test_a_killed_run_ends_with_the_same_bits(model, rows, mesh, tmp_path, block, killed):
    config = dataclasses.replace(of(every=1, decay=Cosine(), block=block), checkpoint_every=3)
    whole, _ = tune(model, rows, config, mesh, checkpoints=Watched(tmp_path / "whole"))
    with pytest.raises(Killed):
        tune(model, rows, config, mesh, checkpoints=Watched(tmp_path / "cut"), on_step=kill_after(killed))
    tuned, _ = tune(model, rows, config, mesh, checkpoints=Watched(tmp_path / "cut"))
    assert_bits(tuned, whole)
    if block:
        for number in range(4):
            folders = [tmp_path / name / "blocks" / str(number) for name in ("whole", "cut")]
            assert_bits(*(load_weights(folder, model.params) for folder in folders))


def test_the_held_out_loss_at_the_end_is_that_of_the_merged_weights(model, rows, mesh, path):
    del path
    watch = dataclasses.replace(SFT.watch, evaluate_every=8)
    config = dataclasses.replace(of(every=2, decay=Linear()), watch=watch)
    tuned, log = tune(model, rows, config, mesh, held_out=rows)
    plain = dataclasses.replace(config, beside=Beside(), learning_rate=0.0)
    _, still = fine_tune(model.config, tuned, rows, plain, mesh=mesh, seed=7, held_out=rows)
    assert log[-1]["held_out_loss"] == pytest.approx(still[-1]["held_out_loss"], rel=1e-6)


def test_a_state_without_snapshots_has_no_copy_of_the_weights(model, rows, mesh, tmp_path):
    kept = Watched(tmp_path)
    tune(model, rows, dataclasses.replace(SFT, checkpoint_every=4), mesh, checkpoints=kept)
    assert not (tmp_path / "blocks").exists()
    assert Blocks(tmp_path / "blocks").folder == tmp_path / "blocks"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"beside": {"every": 2}}, "nothing would come of the snapshots; give sft.beside.decay"),
        ({"beside": {"decay": {"name": "linear"}}}, "decay and block need snapshots; give sft.beside.every"),
        ({"beside": {"every": 2, "block": 0}}, r"sft\.beside\.block is 0; it must be at least 1"),
        ({"beside": {"every": 2, "block": 2, "last": 0.0}}, r"sft\.beside\.last is 0\.0; it is a share"),
        ({"beside": {"every": 2, "decay": {"name": "ema", "keep": 1.0}}}, r"sft\.beside\.decay\.keep is 1\.0"),
        ({"beside": {"every": 2, "decay": {"name": "parts", "weights": [0, 0]}}}, r"weights is \[0\.0, 0\.0\]"),
        ({"beside": {"every": 2, "block": 2}, "step": {"ema": 0.9}}, "give one of the three"),
        ({"beside": {"every": 2, "block": 2}, "lora": {"rank": 2}}, "product of the means; leave sft.lora"),
    ],
)
def test_what_cannot_be_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        build(Sft, keys, "sft")


def test_too_few_updates_are_refused(model, rows, mesh):
    with pytest.raises(UserError, match=r"sft\.beside\.every is 8, but there are only 8 steps; lower it"):
        tune(model, rows, of(every=8, decay=Linear()), mesh)
    with pytest.raises(UserError, match=r"this run keeps nothing on disk; leave block null"):
        tune(model, rows, of(every=2, block=2), mesh)
    with pytest.raises(UserError, match=r"3 weights, but 2 snapshots are merged; give fewer"):
        tune(model, rows, of(every=4, decay=Parts(weights=(1.0, 2.0, 3.0))), mesh)
