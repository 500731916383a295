"""The loss: exact whatever the chunks, its gradients those of the plain formula, the whole logits never there."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.models.branches import restart
from train.models.decoder import forward, init, logprobs
from train.models.loss import Compute, Head, loss_sums, nll_sum, unpacked_positions
from train.models.open import random_config

SIZES = {
    "vocab_size": 640, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
B, T = 4, 41


def config_of(**changes):
    return random_config(SIZES | changes)


def batch_of(vocabulary: int, seed: int = 0):
    random = np.random.default_rng(seed)
    return {
        "tokens": random.integers(0, vocabulary, (B, T), np.int32),
        "weights": (random.random((B, T)) * (random.random((B, T)) < 0.7)).astype(np.float32),
    }


def plain(config, params, batch, dtype):
    """The formula with all logits at once, by autodiff."""
    tokens = jnp.asarray(batch["tokens"])
    found = logprobs(forward(config, params, tokens[:, :-1], dtype=dtype), tokens[:, 1:])
    return -jnp.sum(found * batch["weights"][:, 1:])


def close(found, wanted, rtol):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = float(jnp.abs(b).max()) + 1e-12
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=rtol * scale)


@pytest.mark.parametrize(("tied", "dtype", "rtol"), [(True, "float32", 1e-5), (False, "bfloat16", 2e-2)])
def test_chunks_change_nothing(tied, dtype, rtol):
    """Chunks that do not divide the row, against all logits at once and autodiff."""
    config = config_of(tie_word_embeddings=tied)
    params, batch = init(config, jax.random.key(0)), batch_of(config.vocab_size)

    def chunked(params):
        return loss_sums(config, params, batch, Compute(dtype, logits_at_once=28))[0]

    loss, grads = jax.jit(jax.value_and_grad(chunked))(params)
    wanted, wanted_grads = jax.jit(jax.value_and_grad(lambda p: plain(config, p, batch, jnp.dtype(dtype))))(params)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5 if dtype == "float32" else 1e-2)
    assert float(jax.jit(chunked)(params)) == pytest.approx(float(loss), rel=1e-6)  # no gradient asked for
    close(grads, wanted_grads, rtol)


@pytest.mark.parametrize("at_once", [1, 6, 100])
def test_gradients_scale_and_reach_the_weights(at_once):
    """One position a chunk, a few, all at once. A factor arrives; by a weight, the gradient is a token's loss."""
    config = config_of()
    params, random = init(config, jax.random.key(0)), np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((2, 9, 16)), jnp.float32)
    labels, weights = jnp.asarray(random.integers(0, 640, (2, 9))), jnp.asarray(random.random((2, 9)), jnp.float32)
    head = Head(config, jnp.dtype(jnp.float32))

    def formula(matrix, hidden, weights):
        logits = hidden @ matrix.T
        each = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return 3.0 * jnp.sum(each * weights)

    def ours(matrix, hidden, weights):
        return 3.0 * nll_sum(head, at_once, matrix, hidden, labels, weights)

    arguments = (head.weight(params), hidden, weights)
    found, wanted = (jax.jit(jax.grad(f, (0, 1, 2)))(*arguments) for f in (ours, formula))
    close(found, wanted, 1e-5)


def test_the_whole_logits_are_never_there():
    """No float32 buffer of a row of logits a token in what XLA compiled, and less memory than they would need."""
    config = config_of()
    params, batch = init(config, jax.random.key(0)), batch_of(config.vocab_size)
    count, V = B * (T - 1), config.vocab_size
    whole = re.compile(rf"f32\[(?:{B},{T - 1},{V}|{B},{T},{V}|{count},{V}|{V},{count})\]")

    def compiled(at_once):
        def loss(params):
            return loss_sums(config, params, batch, Compute(logits_at_once=at_once))[0]

        return jax.jit(jax.value_and_grad(loss)).lower(params).compile()

    few, all_at_once = compiled(16), compiled(count)
    assert whole.search(all_at_once.as_text())
    assert not whole.search(few.as_text())
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (few, all_at_once)]
    assert sizes[1] - sizes[0] > 0.6 * count * V * 4


def test_a_cap_of_the_logits_is_part_of_the_loss():
    config = config_of()
    capped = dataclasses.replace(config, final_logit_softcapping=0.01)
    params, batch = init(config, jax.random.key(0)), batch_of(config.vocab_size)
    chunked = jax.jit(lambda c, p: loss_sums(c, p, batch, Compute(logits_at_once=20))[0], static_argnums=0)
    wanted = jax.jit(lambda p: plain(capped, p, batch, jnp.float32))(params)
    assert float(chunked(capped, params)) == pytest.approx(float(wanted), rel=1e-5)
    assert abs(float(chunked(config, params) - wanted)) > 1e-4 * float(wanted)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_computing_again_changes_nothing_and_keeps_less(remat):
    config = config_of(num_hidden_layers=2, vocab_size=64)
    params, batch = init(config, jax.random.key(0)), batch_of(config.vocab_size)

    def compiled(remat):
        def loss(params):
            return loss_sums(config, params, batch, Compute(remat=remat))[0]

        return jax.jit(jax.value_and_grad(loss)).lower(params).compile()

    programs = {how: compiled(how) for how in ("none", remat)}
    (loss, grads), (wanted, wanted_grads) = (programs[how](params) for how in (remat, "none"))
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    close(grads, wanted_grads, 1e-5)
    kept = {how: program.memory_analysis().temp_size_in_bytes for how, program in programs.items()}
    assert kept[remat] < kept["none"]


def test_positions():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 3]])
    assert restart(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    weights = jnp.asarray([[0.0, 0.5, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    assert unpacked_positions(weights).tolist() == [[0, 1, 2, 2, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]


def test_packed_rows_have_the_loss_of_their_sequences():
    config = config_of(vocab_size=64)
    params, random = init(config, jax.random.key(0)), np.random.default_rng(0)
    lengths = (11, 20, 9)
    sequences = [random.integers(0, 64, n, np.int32) for n in lengths]
    packed = {
        "tokens": np.concatenate(sequences)[None],
        "weights": np.concatenate([np.arange(n) > 0 for n in lengths]).astype(np.float32)[None],
        "segments": np.repeat(np.arange(3, dtype=np.int32) + 1, lengths)[None],
    }
    apart = [
        {"tokens": s[None], "weights": (np.arange(len(s)) > 0).astype(np.float32)[None]}
        for s in (np.pad(s, (0, 20 - len(s))) for s in sequences)
    ]
    for one, n in zip(apart, lengths, strict=True):
        one["weights"][:, n:] = 0
    sums = jax.jit(loss_sums, static_argnums=0)
    apart = [sums(config, params, one) for one in apart]
    loss, weight = sums(config, params, packed)
    assert float(weight) == sum(float(w) for _, w in apart)
    assert float(loss) == pytest.approx(sum(float(part) for part, _ in apart), rel=1e-5)
    mixed = sums(config, params, {name: x for name, x in packed.items() if name != "segments"})[0]
    assert abs(float(mixed) - float(loss)) > 1e-4 * float(loss)
