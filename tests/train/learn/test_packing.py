"""Packed rows: who shares one, what they hold, and that the loss and its gradient are those of the examples alone."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.learn.batches import Drawn, batches, steps_of, to_drawn, to_rows
from train.learn.packing import fill, pack
from train.learn.settings import Sft
from train.log import UserError
from train.models.characters import PAD_ID
from train.models.config import RopeScaling
from train.models.loss import loss_sums
from train.models.open import random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
SFT = Sft(epochs=2, batch=4, max_length=65, packing=True)
UNPACKED = dataclasses.replace(SFT, packing=False)


@pytest.fixture(scope="module")
def examples():
    r = np.random.default_rng(0)
    lengths = [3, 40, 12, 25, 7, 60, 18, 33, 5, 9, 22, 14, 50, 4, 11, 29]
    return [
        {"tokens": r.integers(2, 64, n).tolist(), "prompt_length": max(1, n // 3), "weight": 1 + i / 8}
        for i, n in enumerate(lengths)
    ]


# --- who goes with whom ---


def test_every_example_is_in_one_row_and_rows_are_well_filled():
    lengths = np.random.default_rng(1).geometric(1 / 90, 3000).clip(1, 512).tolist()
    rows = pack(lengths, 512)
    assert sorted(i for row in rows for i in row) == list(range(3000))
    assert all(sum(lengths[i] for i in row) <= 512 for row in rows)
    floor = -(-sum(lengths) // 512)
    assert len(rows) <= floor + max(2, floor // 50)  # 98 % full
    assert rows == pack(lengths, 512)
    windowed = pack(lengths, 512, window=100)
    starts = [min(row) // 100 for row in windowed]
    assert starts == sorted(starts)
    assert all(max(row) // 100 == min(row) // 100 for row in windowed)
    assert pack([], 8) == []


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="example 1 has 9 tokens, a row 8"):
        pack([3, 9], 8)
    with pytest.raises(UserError, match="window is 0"):
        pack([3], 8, window=0)


def test_a_row_holds_its_examples_one_after_another():
    tokens, weights, segments = fill([np.array([5, 6, 7]), np.array([8, 9])], [np.ones(3), np.ones(2)], 8, 1)
    assert tokens.tolist() == [5, 6, 7, 8, 9, 1, 1, 1]
    assert segments.tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert weights.tolist() == [0, 1, 1, 0, 1, 0, 0, 0]


# --- the loss ---


def total(model, rows, config):
    """(Σ loss, Σ weight) over the batches of an epoch, and the gradient of the loss."""
    step = jax.jit(jax.value_and_grad(lambda p, batch: loss_sums(model.config, p, batch), has_aux=True))
    parts = [step(model.params, batch) for batch in batches(rows, dataclasses.replace(config, epochs=1), seed=0)]
    sums = [float(sum(part[0][i] for part in parts)) for i in (0, 1)]
    return sums, jax.tree.map(lambda *g: sum(g), *[grad for _, grad in parts])


@pytest.mark.parametrize("loss", ["completion", "all"])
def test_packed_and_unpacked_loss_and_gradient_are_the_same(examples, loss):
    model = random_model(SIZES, make_mesh(Mesh()), seed=0)
    configs = [dataclasses.replace(c, loss=loss) for c in (SFT, UNPACKED)]
    (packed, g), (unpacked, h) = (total(model, to_rows(examples, c, PAD_ID, seed=1), c) for c in configs)
    assert packed == pytest.approx(unpacked, rel=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), g, h)


def test_scalings_that_look_at_a_sequences_length_see_that_of_the_segment(examples):
    """longrope changes its frequencies at 16 tokens: rows hold longer and shorter examples side by side."""
    model = random_model(SIZES, make_mesh(Mesh()), seed=0)
    scaling = RopeScaling(
        "longrope", factor=8.0, original_max_position_embeddings=16, short_factor=(1.0,) * 8, long_factor=(3.0,) * 8
    )
    longer = dataclasses.replace(model, config=dataclasses.replace(model.config, rope_scaling=scaling))
    sums = [total(longer, to_rows(examples, c, PAD_ID, seed=1), c)[0] for c in (SFT, UNPACKED)]
    assert sums[0] == pytest.approx(sums[1], rel=2e-6)
    plain = dataclasses.replace(scaling, long_factor=scaling.short_factor)
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, rope_scaling=plain))
    assert total(other, to_rows(examples, SFT, PAD_ID, seed=1), SFT)[0][0] != pytest.approx(sums[0][0], rel=1e-4)


def test_a_neighbour_in_the_row_changes_nothing(examples):
    """Without the segment ids it would: the law above tests something."""
    model = random_model(SIZES, make_mesh(Mesh()), seed=0)
    first, others = examples[1], [examples[3], examples[7]]
    sums = jax.jit(loss_sums, static_argnums=0)
    losses = []
    for other in others:
        arrays = fill(
            [np.array(other["tokens"]), np.array(first["tokens"])],
            [np.zeros(len(other["tokens"])), np.ones(len(first["tokens"]))],
            97,
            PAD_ID,
        )
        batch = {k: jnp.asarray(v)[None] for k, v in zip(("tokens", "weights", "segments"), arrays, strict=True)}
        losses.append([float(sums(model.config, model.params, b)[0]) for b in (batch, drop_segments(batch))])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert losses[0][1] != pytest.approx(losses[1][1], rel=1e-3)


def drop_segments(batch):
    return {k: v for k, v in batch.items() if k != "segments"}


# --- rows of a run ---


def spelled(batch):
    """Examples of a batch as tuples of tokens, by segment."""
    return [
        tuple(row[ids == s].tolist())
        for row, ids in zip(batch["tokens"], batch["segments"], strict=True)
        for s in range(1, ids.max() + 1)
    ]


def test_every_example_once_an_epoch_and_otherwise_mixed_each_time(examples):
    rows = to_rows(examples, SFT, PAD_ID, seed=5)
    assert isinstance(rows, Drawn)
    steps = list(batches(rows, SFT, seed=5))
    assert len(steps) == steps_of(rows, SFT)
    wanted = sorted(tuple(e["tokens"]) for e in examples)
    bounds = [0, -(-rows.count(0) // SFT.batch), len(steps)]
    epochs = [[e for b in steps[a:z] for e in spelled(b)] for a, z in itertools.pairwise(bounds)]
    assert [sorted(e) for e in epochs] == [wanted, wanted]
    assert epochs[0] != epochs[1]
    assert len(rows.epochs[0]) < len(examples)
    summary = rows.summary()
    assert summary["efficiency"] > 0.85 > summary["unpacked"]
    assert (summary["examples"], summary["rows"]) == (16, rows.count(0))


def test_resumed_and_shared_batches_are_the_same(examples):
    for config in (SFT, UNPACKED, dataclasses.replace(SFT, batch=2)):
        rows = to_drawn([examples[:10], examples[10:]], config, PAD_ID, rates=(0.5, 0.5), seed=2)
        whole = list(batches(rows, config, seed=0))
        assert len(whole) > 3
        for start in (1, 3, len(whole) - 1):
            again = to_drawn([examples[:10], examples[10:]], config, PAD_ID, rates=(0.5, 0.5), seed=2)
            for a, b in zip(batches(again, config, seed=0, start=start), whole[start:], strict=True):
                jax.tree.map(np.testing.assert_array_equal, a, b)
        halves = np.split(np.arange(config.batch), 2)
        shares = [list(batches(rows, config, seed=0, share=part)) for part in halves]
        for left, right, batch in zip(*shares, whole, strict=True):
            jax.tree.map(lambda a, b, c: np.testing.assert_array_equal(np.concatenate([a, b]), c), left, right, batch)


def test_rows_without_a_mixture_are_shared_too(examples):
    rows = to_rows(examples, dataclasses.replace(UNPACKED, batch=6), PAD_ID)
    config = dataclasses.replace(UNPACKED, batch=6)
    thirds = np.split(np.arange(6), 3)
    shares = [list(batches(rows, config, seed=0, share=part)) for part in thirds]
    for parts in zip(*shares, batches(rows, config, seed=0), strict=True):
        jax.tree.map(lambda *x: np.testing.assert_array_equal(np.concatenate(x[:-1]), x[-1]), *parts)


def test_an_epoch_of_a_mixture_goes_on_where_the_last_one_stopped(examples):
    """A source drawn at a low rate is seen whole over the epochs, not its beginning again and again."""
    config = dataclasses.replace(UNPACKED, epochs=3)
    rows = to_drawn([examples[:4], examples[4:]], config, PAD_ID, rates=(0.5, 0.5), draws=8, seed=0)
    seen = [[i for row in epoch for i in row] for epoch in rows.epochs]
    assert [sorted(i for i in epoch if i < 4) for epoch in seen] == [[0, 1, 2, 3]] * 3
    assert sorted(i for epoch in seen for i in epoch if i >= 4) == list(range(4, 16))


def test_too_long_examples_are_dropped_or_cut_and_counted(examples):
    for packing in (True, False):
        dropped = to_rows(examples, dataclasses.replace(SFT, packing=packing, max_length=30), PAD_ID)
        assert (dropped.dropped, dropped.truncated) == (4, 0)
        cut = to_rows(examples, dataclasses.replace(SFT, packing=packing, max_length=30, overlong="truncate"), PAD_ID)
        assert (cut.dropped, cut.truncated) == (0, 4)
        # Its prompt is 20 tokens long: cut at 20 or before, nothing would be left to learn.
        none_left = to_rows(
            examples, dataclasses.replace(SFT, packing=packing, max_length=20, overlong="truncate"), PAD_ID
        )
        assert (none_left.dropped, none_left.truncated) == (1, 6)
        assert cut.summary()["truncated"] == 4
        assert none_left.summary()["dropped"] == 1
