"""Divergences of next-token distributions: NumPy's float64 formulas, finite differences, and their sum over a batch."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.learn.settings import Sft, Stay
from train.learn.stay import Anchor
from train.learn.step import init_state, make_step
from train.models.decoder import init
from train.models.divergence import DIVERGENCES
from train.models.loss import Compute, Head, at_targets, kl_sum, loss_sums
from train.models.open import random_config
from train.resolve import build
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

V = 7
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32,
}  # fmt: skip


def kl(a, b):
    return float((a * np.log(a / b)).sum())


def without(p, y):
    kept = np.delete(p, y)
    return kept / kept.sum()


FORMULAS = {
    "forward": lambda p, q, y: kl(q, p),
    "reverse": lambda p, q, y: kl(p, q),
    "skewed": lambda p, q, y: kl(q, 0.1 * q + 0.9 * p),
    "skewed_reverse": lambda p, q, y: kl(p, 0.1 * p + 0.9 * q),
    "masked": lambda p, q, y: kl(without(q, y), without(p, y)),
    "jsd": lambda p, q, y: 0.5 * kl(q, (p + q) / 2) + 0.5 * kl(p, (p + q) / 2),
}


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def case():
    random = np.random.default_rng(0)
    return random.normal(size=(5, V)), random.normal(size=(5, V)), random.integers(0, V, 5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_are_the_formulas(case, name):
    """The gradient by the logits of p, against central differences of the formula in float64."""
    z, z_0, labels = case
    q = softmax(z_0)

    def formula(z):
        return sum(FORMULAS[name](*rows) for rows in zip(softmax(z), q, labels, strict=True))

    wanted = np.zeros_like(z)
    for at in np.ndindex(*z.shape):
        step = np.zeros_like(z)
        step[at] = 1e-6
        wanted[at] = (formula(z + step) - formula(z - step)) / 2e-6
    with jax.enable_x64(True):
        found, slope = jax.value_and_grad(
            lambda z: jnp.sum(DIVERGENCES[name](jax.nn.log_softmax(z), jax.nn.log_softmax(z_0), jnp.asarray(labels)))
        )(jnp.asarray(z))
    np.testing.assert_allclose(found, formula(z), rtol=1e-9)
    np.testing.assert_allclose(slope, wanted, atol=1e-8)


def test_nothing_is_apart_from_itself_and_the_masked_one_does_not_see_the_label(case):
    z, z_0, labels = (jnp.asarray(x, "int32" if x.ndim == 1 else "float32") for x in case)
    p = jax.nn.log_softmax(z)
    for divergence in DIVERGENCES.values():
        np.testing.assert_allclose(divergence(p, p, labels), 0, atol=1e-6)
    masked = DIVERGENCES["masked"]
    # Even where the label is so likely that 1 − p_y is 0 in float32.
    raised = z + 40.0 * jax.nn.one_hot(labels, V)
    pairs = ((jax.nn.log_softmax(x), jax.nn.log_softmax(z_0), labels) for x in (z, raised))
    np.testing.assert_allclose(*(masked(*pair) for pair in pairs), rtol=1e-4)
    slope = jax.grad(lambda x: jnp.sum(masked(jax.nn.log_softmax(x), jax.nn.log_softmax(z_0), labels)))(raised)
    assert jnp.isfinite(slope).all()
    np.testing.assert_allclose(jnp.take_along_axis(slope, labels[:, None], -1), 0, atol=1e-6)


@pytest.mark.parametrize("name", ["skewed", "masked"])
def test_the_sum_over_a_batch_takes_a_teacher_of_another_width(name):
    config = random_config(SIZES)
    wider = random_config(SIZES | {"hidden_size": 24, "tie_word_embeddings": True})
    params, teacher = init(config, jax.random.key(0)), init(wider, jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(2), (3, 9), 0, 32)
    batch = {"tokens": tokens, "weights": jnp.arange(27.0).reshape(3, 9) % 4}
    how, head, theirs = Compute(), Head(config, jnp.dtype("float32")), Head(wider, jnp.dtype("float32"))

    def both(params):
        hidden, labels, weights = at_targets(config, params, batch, how)
        ours, other = (head.weight(params), hidden), (theirs.weight(teacher), at_targets(wider, teacher, batch, how)[0])
        found = kl_sum(head, 5, ours, other, labels, weights, DIVERGENCES[name], their_head=theirs)
        return found, (head(*ours), theirs(*other), labels, weights)

    found, (z, z_0, labels, weights) = jax.jit(both)(params)
    flat = (softmax(np.asarray(x, np.float64)).reshape(24, -1) for x in (z, z_0))
    wanted = [FORMULAS[name](p, q, int(y)) for p, q, y in zip(*flat, labels.ravel(), strict=True)]
    np.testing.assert_allclose(found, np.dot(weights.ravel(), wanted), rtol=1e-4)


def test_the_penalty_of_fine_tuning_takes_the_divergence_that_its_key_names():
    assert typing.get_args(typing.get_type_hints(Stay)["divergence"]) == tuple(DIVERGENCES)
    config = random_config(SIZES)
    params, small = init(config, jax.random.key(0)), init(config, jax.random.key(1))
    base = jax.tree.map(lambda p: 8 * p, small)  # far from uniform
    batch = {"tokens": jnp.arange(18).reshape(2, 9), "weights": jnp.ones((2, 9))}
    found = {}
    for name in ("forward", "masked"):
        settings = build(Sft, {"batch": 2, "stay": {"kl": 0.5, "divergence": name}}, "sft")
        state = init_state(settings, params, make_mesh(Mesh()))
        anchor = Anchor(base, np.float32(0), np.float32(0.5))
        found[name] = make_step(config, settings, "float32")(state, batch, np.float32(0), anchor=anchor)[1]["loss"]
        wanted = loss_sums(config, params, batch, near=(base, 0.5), divergence=DIVERGENCES[name])[0]
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5)
    assert abs(found["forward"] - found["masked"]) > 1e-2
