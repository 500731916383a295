"""Rows that branch: an answer is computed as if it alone stood after its prompt, by every attention that knows them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.models.attention import KV, attend, visible, within
from train.models.branches import by_answer, flat, obstacle, positions_of
from train.models.config import RopeScaling
from train.models.decoder import bind, forward, init
from train.models.fused import Causal
from train.models.open import random_config

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256,
}  # fmt: skip
# Two trees and padding in one row: lengths of segments, and the place of each one's parent among them.
TREE = [(70, None), (9, 0), (1, 0), (20, 0), (5, None), (30, 4), (6, 4)]
LENGTH = 150


def row_of(seed=0):
    lengths = [n for n, _ in TREE]
    parents = [0 if parent is None else parent + 1 for _, parent in TREE]
    fill = LENGTH - sum(lengths)
    segments = np.concatenate([np.repeat(np.arange(len(TREE)) + 1, lengths), np.zeros(fill, int)])
    over = np.concatenate([np.repeat(parents, lengths), np.zeros(fill, int)])
    tokens = np.random.default_rng(seed).integers(0, 64, LENGTH)
    return tokens[None], jnp.asarray(segments[None]), jnp.asarray(over[None])


def test_positions_go_on_where_the_parent_ends():
    _, segments, parents = row_of()
    found = np.asarray(positions_of(segments, parents)[0])
    starts = np.cumsum([0, *(n for n, _ in TREE)])
    for (n, parent), start in zip(TREE, starts, strict=False):
        first = 0 if parent is None else TREE[parent][0]
        assert found[start : start + n].tolist() == list(range(first, first + n))


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("kernel", ["xla", "tiled"])
def test_a_branch_is_computed_as_if_it_alone_followed_its_parent(kernel, window):
    """A window of 12 reaches from an answer into a prompt that ends many columns before it."""
    config = dataclasses.replace(random_config(SIZES), sliding_window=window)
    params = init(config, jax.random.key(0))
    tokens, segments, parents = row_of()
    positions = positions_of(segments, parents)
    seen = (
        visible(positions, segments, parents)
        if kernel == "xla"
        else Causal(segments, kernel, parents=parents, positions=positions)
    )

    @jax.jit
    def branching(params):
        decoder = bind(config, params)
        return decoder.head(decoder(jnp.asarray(tokens), positions, seen)[0], jnp.float32)[0]

    found = branching(params)
    apart = jax.jit(forward, static_argnums=0)
    starts = np.cumsum([0, *(n for n, _ in TREE)])
    for (n, parent), start in zip(TREE, starts, strict=False):
        before = np.zeros(0, int) if parent is None else tokens[0, starts[parent] : starts[parent] + TREE[parent][0]]
        alone = np.zeros(100, int)
        alone[: len(before) + n] = np.concatenate([before, tokens[0, start : start + n]])
        wanted = apart(config, params, jnp.asarray(alone[None]))[0, len(before) : len(before) + n]
        np.testing.assert_allclose(found[start : start + n], wanted, atol=2e-6 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("window", [None, 12])
def test_gradients_in_tiles_are_those_of_the_plain_attention(window):
    _, segments, parents = row_of()
    draw = np.random.default_rng(1)
    q, k, v = (jnp.asarray(draw.standard_normal((1, n, LENGTH, 8)), jnp.float32) for n in (4, 2, 2))
    positions = positions_of(segments, parents)

    def slopes(mask):
        return jax.jit(jax.grad(lambda q, k, v: jnp.sum(jnp.sin(attend(q, KV(k, v), mask))), (0, 1, 2)))(q, k, v)

    tiled = within(Causal(segments, "tiled", parents=parents, positions=positions), window)
    plain = within(visible(positions, segments, parents), window, positions=positions)
    for a, b in zip(slopes(tiled), slopes(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("window", [None, 12])
def test_cudnn_is_given_the_mask_that_the_plain_attention_has(window, monkeypatch):
    """Its kernel cannot run here; what it is called with can be looked at."""
    _, segments, parents = row_of()
    positions = positions_of(segments, parents)
    given = {}

    def called(q, k, v, *, mask, is_causal, local_window_size, **rest):
        given.update(mask=mask[0, 0], causal=is_causal, window=local_window_size)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", called)
    seen = within(Causal(segments, "cudnn", parents=parents, positions=positions), window)
    q = jnp.zeros((1, 2, LENGTH, 8), jnp.bfloat16)
    attend(q, KV(q, q), seen)
    assert given["causal"]
    assert given["window"] is None
    causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    wanted: Any = within(visible(positions, segments, parents), window, positions=positions)
    np.testing.assert_array_equal((given["mask"][:LENGTH, :LENGTH] & causal), wanted[0])


def test_what_cannot_branch_says_so():
    config = random_config(SIZES)
    assert obstacle(config, "tiled") is None
    assert "no parents" in str(obstacle(config, "splash"))
    long = dataclasses.replace(config, rope_scaling=RopeScaling("dynamic", 2.0))
    assert "rotations of the kind dynamic" in str(obstacle(long, "xla"))
    _, segments, parents = row_of()
    q = jnp.zeros((1, 2, LENGTH, 8))
    with pytest.raises(ValueError, match="splash attention knows segments and no parents"):
        attend(q, KV(q, q), Causal(segments, "splash", parents=parents, positions=segments))


def test_targets_and_answers_are_each_others_views():
    values = jnp.arange(12.0).reshape(1, 3, 4) + 1
    cells = jnp.asarray([[0, 1, 4, 8, 9, 10, 12, 12]])  # answers of 2, 1 and 3 tokens, two places filled up
    row = flat(values, cells)
    assert row.tolist() == [[1, 2, 5, 9, 10, 11, 0, 0]]
    assert by_answer(row, cells, (1, 3, 4)).tolist() == [[[1, 2, 0, 0], [5, 0, 0, 0], [9, 10, 11, 0]]]
