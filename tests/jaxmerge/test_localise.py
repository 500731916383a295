"""A mask learned by gradient: its limits are the models, it is never worse than its start, it finds what is planted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmerge


def squared(params, wanted):
    return sum(jnp.sum((params[name] - wanted[name]) ** 2) for name in wanted)


@pytest.fixture(scope="module")
def planted():
    """Five changes are wanted, each smaller than any other, and the others harm: the start takes the wrong ones."""
    draw = np.random.default_rng(0)
    good = {"a": np.zeros(12, bool), "b": np.zeros((4, 3), bool)}
    good["a"][[1, 4, 7]], good["b"][[0, 2], [1, 2]] = True, True
    base = {name: jnp.asarray(draw.normal(size=g.shape), jnp.float32) for name, g in good.items()}
    size = {name: np.where(g, 0.3, 1.0) + 0.2 * draw.random(g.shape) for name, g in good.items()}
    signs = {name: draw.choice([-1.0, 1.0], g.shape) for name, g in good.items()}
    tuned = {name: base[name] + jnp.asarray(signs[name] * size[name], jnp.float32) for name in good}
    wanted = {name: jnp.where(good[name], tuned[name], base[name]) for name in good}
    return base, tuned, wanted, good


def test_all_ones_are_the_tuned_model_and_zeros_the_base(planted):
    base, tuned, _, _ = planted
    for value, model in ((1.0, tuned), (0.0, base)):
        mask = jax.tree.map(lambda x, value=value: jnp.full_like(x, value), base)
        made = jaxmerge.grafting([tuned], base=base, mask=mask)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), made, model)
    full = jaxmerge.learn_mask(tuned, base, squared, [tuned], density=1.0, optimizer=optax.sgd(0.1), passes=1)
    assert (full.share, full.start_share) == (1.0, 1.0)
    assert full.loss == pytest.approx(0.0, abs=1e-9)


def test_planted_changes_are_found(planted):
    base, tuned, wanted, good = planted
    start = jaxmerge.graft_mask(tuned, base, density=0.25)
    assert not any(np.any((np.asarray(start[name]) > 0) & good[name]) for name in good)
    found = jaxmerge.learn_mask(tuned, base, squared, [wanted], density=0.25, optimizer=optax.adam(0.5))
    jax.tree.map(np.testing.assert_array_equal, found.mask, {name: g.astype(np.float32) for name, g in good.items()})
    assert found.loss == pytest.approx(0.0, abs=1e-9)
    assert (found.start_share, found.share) == (pytest.approx(6 / 24), pytest.approx(5 / 24))


def test_the_mask_is_the_best_of_all_masks():
    base, tuned = {"w": jnp.zeros(5)}, {"w": jnp.array([0.9, -0.2, 0.5, 0.3, -0.7])}
    mix = jnp.asarray(np.random.default_rng(1).normal(size=(8, 5)), jnp.float32) + 2 * jnp.eye(8, 5)

    def loss(params, target):
        return jnp.mean((mix @ params["w"] - target) ** 2)

    target = mix @ (tuned["w"] * jnp.array([1.0, 1.0, 0.0, 1.0, 0.0]))
    found = jaxmerge.learn_mask(tuned, base, loss, [target], density=0.4, optimizer=optax.adam(0.3), passes=60)
    every = [
        float(loss({"w": tuned["w"] * jnp.array(m, jnp.float32)}, target)) for m in itertools.product((0, 1), repeat=5)
    ]
    assert found.loss == pytest.approx(min(every), abs=1e-6)


@pytest.mark.parametrize("rate", [0.01, 1.0, 100.0])
def test_it_is_never_worse_than_the_start_on_its_batches(planted, rate):
    base, tuned, wanted, _ = planted
    batches = [wanted, jax.tree.map(lambda x: -x, wanted)]
    found = jaxmerge.learn_mask(tuned, base, squared, batches, density=0.5, optimizer=optax.sgd(rate), passes=3)
    mean = np.mean([float(squared(jaxmerge.grafting([tuned], base=base, mask=found.mask), b)) for b in batches])
    assert found.loss == pytest.approx(mean, rel=1e-5)
    assert found.loss <= found.start_loss


def test_a_penalty_drops_changes_that_do_not_matter(planted):
    base, tuned, wanted, good = planted
    only = {"a": wanted["a"]}  # b is not looked at
    kept, dropped = (
        jaxmerge.learn_mask(tuned, base, squared, [only], density=0.25, optimizer=optax.adam(0.5), penalty=penalty)
        for penalty in (0.0, 0.1)
    )
    assert float(jnp.sum(kept.mask["b"])) == 3.0
    assert float(jnp.sum(dropped.mask["b"])) == 0.0
    np.testing.assert_array_equal(np.asarray(dropped.mask["a"]) > 0, good["a"])


def test_dtypes_are_kept_and_mistakes_named(planted):
    base, tuned, wanted, _ = planted
    small_tuned, small_base = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree) for tree in (tuned, base))
    found = jaxmerge.learn_mask(
        small_tuned, small_base, lambda p, y: squared(jax.tree.map(lambda x: x.astype(jnp.float32), p), y), [wanted],
        density=0.25, optimizer=optax.adam(0.5), passes=2,
    )  # fmt: skip
    assert {leaf.dtype for leaf in jax.tree.leaves(found.mask)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="learn_mask: 0 batches and passes=20"):
        jaxmerge.learn_mask(tuned, base, squared, [], density=0.25, optimizer=optax.adam(0.5))
