"""What holds fine-tuning near the base: penalties against autodiff of their formulas, frozen leaves, early stops."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.learn.batches import to_rows
from train.learn.settings import Sft, Stay, Step
from train.learn.sft import fine_tune
from train.learn.stay import Anchor, held, pull
from train.log import UserError
from train.models.attention import visible
from train.models.config import ModelConfig
from train.models.decoder import bind, init
from train.models.loss import Compute, loss_sums
from train.resolve import build
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

TINY = build(
    ModelConfig,
    {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    },
    "model",
)  # fmt: skip


TWO_LAYERS = dataclasses.replace(TINY, num_hidden_layers=2)


def models(config=TINY):
    return init(config, jax.random.key(0)), init(config, jax.random.key(1))


def examples(count: int = 12) -> list[dict]:
    numbers = np.random.default_rng(0)
    return [{"tokens": numbers.integers(1, 32, 9).tolist(), "prompt_length": 4, "weight": 1.0} for _ in range(count)]


def tune(config: Sft, model: ModelConfig = TINY, **more):
    params, _ = models(model)
    return fine_tune(
        model, params, to_rows(examples(), config, 0, seed=0), config, mesh=make_mesh(Mesh()), seed=0, **more
    )


@pytest.mark.parametrize("at_once", [7, 1024])
def test_kl_is_that_of_the_whole_distributions_at_the_tokens_learnt(at_once):
    ours, base = models()
    tokens = jax.random.randint(jax.random.key(2), (3, 9), 1, 32)
    weights = jnp.zeros((3, 9)).at[:, 4:7].set(jnp.array([[1.0], [2.0], [0.5]]))
    batch, how = {"tokens": tokens, "weights": weights}, Compute(logits_at_once=at_once)

    def written_out(params):
        positions = jnp.broadcast_to(jnp.arange(8), (3, 8))

        def log_p(p):
            model = bind(TINY, p)
            hidden, _ = model(tokens[:, :-1], positions, visible(positions, None), dtype=jnp.float32)
            return jax.nn.log_softmax(model.head(hidden, jnp.float32))

        p, q = log_p(params), jax.lax.stop_gradient(log_p(base))
        nll = -jnp.take_along_axis(p, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(weights[:, 1:] * (nll + 0.3 * jnp.sum(jnp.exp(q) * (q - p), axis=-1)))

    def found_out(params):
        return loss_sums(TINY, params, batch, how, near=(base, 0.3))

    wanted, d_wanted = jax.jit(jax.value_and_grad(written_out))(ours)
    (found, weight), d_found = jax.jit(jax.value_and_grad(found_out, has_aux=True))(ours)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert weight == jnp.sum(weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-6), d_found, d_wanted)


def test_a_model_has_no_divergence_from_itself():
    ours, _ = models()
    batch = {"tokens": jnp.ones((2, 6), jnp.int32), "weights": jnp.ones((2, 6))}
    alone, near = jax.jit(lambda p: (loss_sums(TINY, p, batch)[0], loss_sums(TINY, p, batch, near=(p, 5.0))[0]))(ours)
    np.testing.assert_allclose(alone, near, rtol=1e-6)


def test_l2_pulls_by_its_gradient():
    ours, base = models()
    zero = jax.tree.map(jnp.zeros_like, ours)
    wanted = jax.grad(
        lambda p: 0.5 * 0.7 * sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (p, base)), strict=True))
    )(ours)
    found = pull(ours, Anchor(base, 0.7, 0.0), zero)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)


def test_a_strong_divergence_penalty_keeps_the_distributions_near():
    base, _ = models()
    settings = {"learning_rate": 1e-2, "epochs": 4, "batch": 4}
    rows = to_rows(examples(), Sft(**settings), 0, seed=0)
    batch = {"tokens": jnp.asarray(rows.tokens), "weights": jnp.asarray(rows.weights)}

    @jax.jit
    def divergence(params):
        (near, weight), (alone, _) = (loss_sums(TINY, params, batch, near=n) for n in ((base, 1.0), None))
        return (near - alone) / weight

    free, near = (float(divergence(tune(Sft(**settings, stay=Stay(kl=kl)))[0])) for kl in (0.0, 30.0))
    assert 0 < near < 0.2 * free


def test_a_strong_pull_keeps_the_weights_near_the_anchor():
    base, other = models()
    stay = {"l2": 30.0}

    def away(params, anchor):
        return float(sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (params, anchor)), strict=True)))

    free, _ = tune(Sft(learning_rate=1e-2, epochs=4, batch=4))
    near, _ = tune(Sft(learning_rate=1e-2, epochs=4, batch=4, stay=Stay(**stay)))
    assert away(near, base) < 0.7 * away(free, base)
    drawn, _ = tune(Sft(learning_rate=1e-2, epochs=4, batch=4, stay=Stay(**stay)), anchor=other)
    assert away(drawn, other) < away(near, other), "the anchor is what is named, not where the run starts"


def test_frozen_parameters_keep_their_bits_and_the_rest_moves():
    base, _ = models(TWO_LAYERS)
    config = Sft(
        learning_rate=1e-2, epochs=2, batch=4, stay=Stay(freeze=("model/layers/0", "embed_tokens")),
        step=Step(weight_decay=0.1),
    )  # fmt: skip
    tuned, _ = tune(config, TWO_LAYERS)
    kept = jax.tree.leaves(held(config.stay.freeze, base))
    for was, now, is_kept in zip(jax.tree.leaves(base), jax.tree.leaves(tuned), kept, strict=True):
        assert bool(jnp.all(was == now)) == is_kept
    assert 0 < sum(kept) < len(kept)


def test_a_run_stopped_early_is_the_beginning_of_the_whole_one():
    whole = tune(Sft(learning_rate=1e-2, epochs=4, batch=4))[1]
    early = tune(Sft(learning_rate=1e-2, epochs=4, batch=4, stay=Stay(stop_at=0.5)))[1]
    assert len(early) == len(whole) // 2 == 6
    assert [m["loss"] for m in early] == [m["loss"] for m in whole[:6]]
    assert [m["learning_rate"] for m in early] == [m["learning_rate"] for m in whole[:6]]


@pytest.mark.parametrize(
    ("stay", "said"),
    [
        ({"stop_at": 0.0}, "stop_at is 0.0; it must be above 0"),
        ({"l2": -1.0}, "l2"),
        ({"freeze": ["nowhere"]}, r"freeze: 'nowhere' matches none"),
        ({"freeze": ["**"]}, "freeze every parameter"),
    ],
)
def test_mistakes_are_named(stay, said):
    with pytest.raises(UserError, match=said):
        tune(build(Sft, {"batch": 4, "epochs": 1, "stay": stay}, "sft"))


def test_an_adapter_has_no_weights_to_hold():
    with pytest.raises(UserError, match=r"sft\.lora trains none of them"):
        build(Sft, {"stay": {"l2": 0.1}, "lora": {"rank": 2}}, "sft")


def test_a_frozen_head_s_gradient_is_not_computed():
    """The loss writes it down in any case; the compiler leaves it out of the program where nothing reads it."""
    ours, _ = models()
    batch, how = {"tokens": jnp.ones((4, 17), jnp.int32), "weights": jnp.ones((4, 17))}, Compute(logits_at_once=16)

    def flops(of):
        loss = lambda part: loss_sums(TINY, {**ours, **part}, batch, how)[0]  # noqa: E731
        return jax.jit(jax.grad(loss)).lower({k: ours[k] for k in of}).compile().cost_analysis()["flops"]

    product = 2 * 16 * 32 * 16  # of one chunk: a loop is counted once
    assert flops(("model", "lm_head")) - flops(("model",)) >= 0.9 * product
