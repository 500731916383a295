"""Searches for coefficients with a planted optimum."""

import functools

import jax.numpy as jnp
import numpy as np

import jaxmerge
from jaxmerge.exme import exme_merge
from jaxmerge.strategies import Float

PATHS = ("model/layers/0/w", "model/layers/1/w", "model/layers/2/w", "lm_head/weight")
SPACE = {"alpha_1": (-0.5, 1.5), "alpha_2": (-0.5, 1.5), "beta": Float(0.0, 1.0, start=0.5)}
PLANTED = {"alpha_1": 0.5, "alpha_2": 0.0, "beta": 0.25}


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.standard_normal((8, 16)), dtype) for path in PATHS}


BASE, ONE, TWO = (tree(seed) for seed in range(3))
MERGE = exme_merge([ONE, TWO], BASE)
EXPO = functools.partial(jaxmerge.extrapolate, [ONE], base=BASE)


def distance(a, b):
    return sum(jnp.mean((a[path].astype(jnp.float32) - b[path].astype(jnp.float32)) ** 2) for path in PATHS)


def near(target):
    """A score whose one peak, 0, is the candidate `target`."""
    return lambda params: -float(distance(params, target))


def formula(c):
    """A search without models: as fast as it gets, for the strategies alone."""
    return -sum((x - w) ** 2 for x, w in zip(c.values(), PLANTED.values(), strict=True))


def run(search, score=formula, **more):
    while search.candidates:
        search.tell(score(search.candidates[0]), 0.5, **more)
    return search.result()
