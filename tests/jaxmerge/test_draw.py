"""Random numbers of masks: their definition, that pieces do not matter, and that they are as good as independent."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draws

from jaxmerge import draw

N = 2**18
PATHS = [f"model/layers/{i}/mlp/up_proj/weight" for i in range(12)]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def numbers():
    """Of neighbouring paths, and of two models of one path: [len(PATHS) + 1, N]."""
    words = [draws.words(KEY, path, "org/a") for path in PATHS] + [draws.words(KEY, PATHS[0], "org/b")]
    found = jax.jit(jax.vmap(lambda word: draw.scramble((word[0], word[1]), jnp.arange(N, dtype=jnp.uint32))))
    return np.asarray(found(jnp.asarray(words, jnp.uint32)))


def test_numbers_are_the_documented_ones(numbers):
    first, second = draws.words(KEY, PATHS[3], "org/a")
    assert np.array_equal(numbers[3], draws.bits(first, second, np.arange(N)))
    key = jax.random.fold_in(jax.random.key(2), 3)
    words = [int(word) for word in jax.random.key_data(key)]
    wanted = (draws.bits(*words, np.arange(35)) >> 8) / 2**24
    assert np.array_equal(draw.uniform(key, (5, 7)), wanted.reshape(5, 7))


def test_parts_that_cannot_be_counted_have_keys_of_their_own(monkeypatch):
    monkeypatch.setattr(draw, "COUNTED", 10)
    found = draw.uniform(KEY, (3, 2, 5))
    for part in range(3):
        assert np.array_equal(found[part], draw.uniform(jax.random.fold_in(KEY, part), (10,)).reshape(2, 5))


def score(one, other=None):
    """χ² of the top bits of numbers (and of others beside them) as a normal deviate: how far from all alike."""
    cells = one >> 24 if other is None else (one >> 27) << 5 | other >> 27
    count = 256 if other is None else 1024
    found, wanted = np.bincount(cells, minlength=count), len(cells) / count
    return (((found - wanted) ** 2).sum() / wanted - (count - 1)) / np.sqrt(2 * (count - 1))


def test_numbers_are_uniform_and_those_of_neighbours_models_and_paths_independent(numbers):
    scores = {"uniform": [score(row << shift & 0xFFFFFFFF) for row in numbers for shift in (0, 8, 16, 24)]}
    for lag in (1, 2, 7, 64, 2048, 5632):  # within rows, and from row to row of matrices that models have
        scores[f"lag {lag}"] = [score(row[:-lag], row[lag:]) for row in numbers]
    scores["paths"] = [score(a, b) for a, b in itertools.pairwise(numbers)]
    scores["models"] = [score(numbers[0], numbers[-1])]
    for what, found in scores.items():
        assert max(map(abs, found)) < 5, what
        assert abs(np.mean(found)) < 5 / np.sqrt(len(found)), what


@pytest.mark.parametrize("density", [0.02, 0.5, 0.9])
def test_masks_keep_their_share_in_every_row_and_column(numbers, density):
    kept = (numbers >> 8) / 2**24 < density
    for axis, shape in [(1, (-1, 2**9, 2**9)), (2, (-1, 2**9, 2**9)), ((1, 2), (-1, 2**9, 2**9))]:
        share = kept.reshape(shape).mean(axis=axis)
        sigma = np.sqrt(density * (1 - density) / (kept.size / share.size))
        z = (share - density) / sigma
        assert abs(z).max() < 5.5
        assert 0.9 < z.std() < 1.1 or z.size < 100
