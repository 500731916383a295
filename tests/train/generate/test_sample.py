"""Choosing tokens: inversion against NumPy in float64, cut-offs against sorting, frequencies against softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.generate.sample import BLOCK, choose, invert, restrict

LARGEST = np.float32(1 - 2**-24)
"""The largest float32 below 1."""


inverted = jax.jit(invert)
chosen = jax.jit(choose, static_argnames=("greedy", "top_k", "top_p"))
restricted = jax.jit(restrict, static_argnames=("top_k", "top_p"))


def weights_of(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of the counts: the chi-square is near normal after Wilson and Hilferty's cube root."""
    from math import erfc, sqrt

    expected = counts.sum() * probabilities
    statistic, free = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    z = ((statistic / free) ** (1 / 3) - (1 - 2 / (9 * free))) / sqrt(2 / (9 * free))
    return 0.5 * erfc(z / sqrt(2))


def tokens_of(logits: np.ndarray, draws: int, *, temperature: float = 1.0, seed: int = 0, **cut) -> np.ndarray:
    """`draws` tokens of one row of logits, each with its own key."""
    keys = jax.random.split(jax.random.key(seed), draws)
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, len(logits)))
    zeros = jnp.zeros(draws, jnp.int32)
    return np.asarray(chosen(rows, keys, zeros, jnp.float32(temperature), greedy=False, **cut)[0])


# --- inversion ---


@pytest.mark.parametrize("vocabulary", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
def test_invert_is_searchsorted_on_the_float64_distribution(vocabulary):
    r = np.random.default_rng(vocabulary)
    logits = (4 * r.standard_normal((400, vocabulary))).astype(np.float32)
    logits[:, 1:][r.random((400, vocabulary - 1)) < 0.3] = -np.inf
    uniform = r.random(400, np.float32)
    ends = np.cumsum(weights_of(logits), -1)
    target = uniform * ends[:, -1]
    wanted = np.array([np.searchsorted(e, t, side="right") for e, t in zip(ends, target, strict=True)])
    found = np.asarray(inverted(jnp.asarray(logits), jnp.asarray(uniform)))
    # Float32 may fall on the other side of an end that lies closer than its rounding.
    near = np.abs(ends - target[:, None]).min(-1) < 2e-6 * ends[:, -1]
    assert found.dtype == np.int32
    assert near.mean() < 0.05
    np.testing.assert_array_equal(found[~near], wanted[~near])


@pytest.mark.parametrize(("rows", "blocks"), [(300, 1), (300, 40), (48, 594)])
def test_invert_never_picks_minus_infinity(rows, blocks):
    """Whole blocks are empty; the numbers are 0, the largest below 1, and the ends of the slices and of the blocks.

    594 blocks are a vocabulary of 151,936: there a parallel cumulative sum in float32 is not monotone.
    """
    r = np.random.default_rng(blocks)
    logits = np.full((rows, blocks * BLOCK - 5), -np.inf, np.float32)
    for row in logits:
        some = r.choice(len(row), r.integers(2, 60), replace=False)
        row[some] = 3 * r.standard_normal(len(some))
    weights = np.pad(np.exp(logits - logits.max(-1, keepdims=True)), ((0, 0), (0, 5)))
    ends = np.asarray(jnp.cumsum(jnp.asarray(weights.reshape(rows, blocks, BLOCK).sum(-1)), axis=-1))
    slices = np.cumsum(weights, -1, np.float64)
    every = np.arange(rows)
    tries = [np.zeros(rows), np.full(rows, LARGEST)]
    for _ in range(8):
        tries.append(ends[every, r.integers(0, blocks, rows)] / ends[:, -1])
        tries.append(slices[every, r.integers(0, slices.shape[1], rows)] / slices[:, -1])
    for near in tries:
        uniform = near.astype(np.float32) + np.float32(2**-24) * r.integers(-1, 2, rows).astype(np.float32)
        found = np.asarray(inverted(jnp.asarray(logits), jnp.asarray(np.clip(uniform, 0, LARGEST))))
        assert np.isfinite(logits[every, found]).all()


def test_invert_at_the_edges_gives_the_first_and_the_last_possible_token():
    logits = np.full((2, 2 * BLOCK + 9), -np.inf, np.float32)
    logits[:, [3, 200, BLOCK + 60]] = 0.0
    found = inverted(jnp.asarray(logits), jnp.asarray([0.0, LARGEST], jnp.float32))
    assert found.tolist() == [3, BLOCK + 60]


def test_frequencies_are_those_of_softmax():
    logits = np.random.default_rng(1).standard_normal(BLOCK + 44).astype(np.float32)
    counts = np.bincount(tokens_of(logits, 100_000), minlength=len(logits))
    expected = weights_of(logits) / weights_of(logits).sum()
    assert chi_square(counts, expected) > 1e-4
    # The test can tell: it refuses a temperature that is off by 5 %.
    off = weights_of(logits / np.float32(1.05))
    assert chi_square(counts, off / off.sum()) < 1e-4


def test_temperature_divides_the_logits():
    logits = np.random.default_rng(2).standard_normal(40).astype(np.float32)
    hot = weights_of(logits / np.float32(0.5))
    counts = np.bincount(tokens_of(logits, 40_000, temperature=0.5), minlength=40)
    assert chi_square(counts, hot / hot.sum()) > 1e-4
    assert set(tokens_of(logits, 500, temperature=1e-3)) == {int(logits.argmax())}


# --- cut-offs ---


def kept(logits: np.ndarray, **cut) -> np.ndarray:
    return np.isfinite(np.asarray(restricted(jnp.asarray(logits), **cut)))


def test_top_k_keeps_the_k_largest_and_those_tied_with_the_last():
    logits = np.array([[3.0, 1.0, 2.0, 2.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]], np.float32)
    assert kept(logits, top_k=2).tolist() == [[True, False, True, True, False], [True, True, False, False, False]]
    for all_of_them in (0, 5, 9):
        assert kept(logits, top_k=all_of_them).all()


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_holds_it(top_p):
    r = np.random.default_rng(3)
    logits = (2 * r.standard_normal((200, 300))).astype(np.float32)
    found = kept(logits, top_p=top_p)
    for row, inside in zip(logits, found, strict=True):
        p = np.sort(weights_of(row) / weights_of(row).sum())[::-1]
        count = int(np.searchsorted(np.cumsum(p), top_p)) + 1  # the first so many hold top_p, one fewer do not
        assert inside[row.argmax()]
        assert inside.sum() == count or np.abs(np.cumsum(p) - top_p).min() < 1e-6
        assert row[inside].min() > row[~inside].max(initial=-np.inf)


def test_top_p_counts_the_mass_that_top_k_left():
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    assert kept(logits, top_p=0.5).tolist() == [[True, True, False, False]]
    assert kept(logits, top_p=0.5, top_k=2).tolist() == [[True, False, False, False]]  # 0.4 of 0.7


def test_what_is_cut_off_is_never_drawn():
    logits = np.random.default_rng(4).standard_normal(300).astype(np.float32)
    assert set(tokens_of(logits, 5000, top_k=5)) == set(np.argsort(logits)[-5:])
    inside = np.flatnonzero(kept(logits[None], top_p=0.3)[0])
    assert set(tokens_of(logits, 5000, top_p=0.3)) == set(inside)


# --- choose ---


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}])
def test_top_1_equals_greedy(cut):
    logits = jnp.asarray(np.random.default_rng(5).standard_normal((50, 300)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 50)
    steps, one = jnp.zeros(50, jnp.int32), jnp.float32(1)
    greedy = chosen(logits, keys, steps, one, greedy=True)
    sampled = chosen(logits, keys, steps, one, greedy=False, **cut)
    np.testing.assert_array_equal(greedy[0], np.asarray(logits).argmax(-1))
    np.testing.assert_array_equal(sampled[0], greedy[0])
    np.testing.assert_array_equal(sampled[1], greedy[1])


def test_logprobs_are_the_model_s_own_whatever_is_cut_off():
    logits = np.random.default_rng(6).standard_normal((20, 30)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 20)
    tokens, logprobs = chosen(
        jnp.asarray(logits), keys, jnp.zeros(20, jnp.int32), jnp.float32(0.7), greedy=False, top_k=3, top_p=0.9
    )
    wanted = np.log(weights_of(logits) / weights_of(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs, wanted[np.arange(20), np.asarray(tokens)], atol=1e-5)


def test_a_draw_depends_on_key_and_step_alone():
    logits = jnp.asarray(np.random.default_rng(7).standard_normal((64, 500)), jnp.float32)
    one_row = jnp.broadcast_to(logits[0], logits.shape)
    keys = jax.random.split(jax.random.key(2), 64)
    steps, one = jnp.arange(64, dtype=jnp.int32) % 5, jnp.float32(1)
    tokens = np.asarray(chosen(logits, keys, steps, one, greedy=False)[0])
    alone = [int(chosen(logits[i : i + 1], keys[i : i + 1], steps[i : i + 1], one, greedy=False)[0][0]) for i in (0, 9)]
    assert alone == [tokens[0], tokens[9]]
    by_key = np.asarray(chosen(one_row, keys, jnp.zeros(64, jnp.int32), one, greedy=False)[0])
    by_step = np.asarray(
        chosen(one_row, jnp.broadcast_to(keys[0], 64), jnp.arange(64, dtype=jnp.int32), one, greedy=False)[0]
    )
    assert len(set(by_key)) > 30
    assert len(set(by_step)) > 30
