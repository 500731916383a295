"""`donate=True`: every rule may write its result over its first model, and never over what somebody else holds."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.coefficients import COEFFICIENTS, statistics

import jaxmerge
from jaxmerge import RULES

NAMES = list({id(function): name for name, function in reversed(RULES.items())}.values())[::-1]
# Of each kind of arithmetic one rule, and all with FULL=1: each is compiled once more to be written over a model.
KINDS = ["interpolate", "average", "extrapolate", "slerp", "ties", "dare", "della", "model_stock"]


def tree(seed):
    """One leaf to merge, of the contract's small shape, and what is passed through."""
    return {"lm_head": {"weight": jax.random.normal(jax.random.key(seed), (4, 3))}, "step": jnp.int32(seed)}


@pytest.mark.parametrize("name", NAMES if os.environ.get("FULL") else KINDS)
def test_every_rule_gives_the_same_over_its_first_model(name):
    needs = RULES[name].needs
    count = needs.most if needs.most is not None else max(needs.least, 3)

    def run(**more):
        models, base = [tree(i + 1) for i in range(count)], tree(0)
        keywords = COEFFICIENTS[name][0] | statistics(name, models, base) | more
        keywords |= {"base": base} if needs.base != "none" else {}
        if needs.key != "none":
            keywords |= {"key": jax.random.key(7), "names": [f"org/{i}" for i in range(count)]}
        place = models[0]["lm_head"]["weight"].unsafe_buffer_pointer()
        merged = RULES[name](models, **keywords)
        return merged, merged["lm_head"]["weight"].unsafe_buffer_pointer() == place, models, base

    merged, over, (first, *others), base = run(donate=True)
    assert over
    assert first["lm_head"]["weight"].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((first["step"], others, base)))
    wanted, over, (first, *_), _ = run()
    assert not over
    assert not first["lm_head"]["weight"].is_deleted()
    np.testing.assert_allclose(merged["lm_head"]["weight"], wanted["lm_head"]["weight"], rtol=1e-6, atol=1e-6)


def test_what_somebody_else_holds_is_kept():
    a, b = (tree(seed)["lm_head"]["weight"] for seed in (1, 2))
    tied = {"embed": a, "head": a}
    merged = jaxmerge.interpolate([tied, {"embed": b, "head": b}], t=0.25, donate=True)
    assert np.array_equal(merged["embed"], merged["head"])
    same = jaxmerge.linear([{"w": a}, {"w": a}], donate=True)
    np.testing.assert_allclose(same["w"], a, rtol=1e-6)
    moved = jaxmerge.extrapolate([{"w": a}], base={"w": a}, alpha=0.5, donate=True)
    assert np.array_equal(moved["w"], a)
    numpy = {"w": np.ones(3, np.float32)}
    jaxmerge.interpolate([numpy, {"w": np.zeros(3, np.float32)}], t=0.5, donate=True)
    assert np.array_equal(numpy["w"], np.ones(3))
    jitted = jax.jit(lambda a, b: jaxmerge.interpolate([a, b], t=0.5, donate=True))
    np.testing.assert_allclose(jitted(a, b), (a + b) / 2, rtol=1e-6)
    assert not any(x.is_deleted() for x in (a, b))


def test_masked_rules_and_errors():
    first, second = ({"mlp": jnp.full(3, v), "norm": jnp.full(3, v)} for v in (1.0, 3.0))
    merged = jaxmerge.masked(jaxmerge.interpolate, "mlp", otherwise="first")([first, second], t=0.5, donate=True)
    assert (float(merged["mlp"][0]), float(merged["norm"][0])) == (2.0, 1.0)
    assert first["mlp"].is_deleted()
    assert not first["norm"].is_deleted()
    with pytest.raises(ValueError, match="interpolate needs"):
        jaxmerge.interpolate([second], donate=True)
    jaxmerge.interpolate([second, merged], t=0.5)  # and what is donated is so for one call
    assert not second["mlp"].is_deleted()
