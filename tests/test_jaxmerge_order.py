"""Exact order statistics: against NumPy's stable sort, with ties, signs, dtypes, meshes, inside jit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge import order


def wanted(magnitude, k):
    """The k largest, ties to the lower flat index, by NumPy's stable sort."""
    mask = np.zeros(magnitude.size, bool)
    mask[np.argsort(-magnitude.ravel(), kind="stable")[:k]] = True
    return mask.reshape(magnitude.shape)


top = jax.jit(order.top)


@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros", "tiny", "huge"])
def test_top_is_the_stable_sort(kind):
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal((23, 17))).astype(np.float32)
    x = {
        "distinct": x,
        "ties": np.round(x * 2) / 2,
        "zeros": np.where(x < 1.2, 0, x),
        "tiny": x * np.float32(1e-40),  # subnormal
        "huge": np.where(x > 2, np.inf, x),
    }[kind].astype(np.float32)
    for k in (0, 1, 2, 7, 100, 390, 391):
        assert np.array_equal(top(jnp.asarray(x), jnp.uint32(k)), wanted(x, k)), k


def test_kth_largest():
    x = np.abs(np.random.default_rng(1).standard_normal(1001)).astype(np.float32)
    for k in (1, 10, 500, 1001):
        assert order.kth_largest(jnp.asarray(x), jnp.uint32(k)) == np.sort(x)[-k]


def test_shapes_and_signs():
    assert bool(order.top(jnp.float32(3.0), jnp.uint32(1)))
    assert not bool(order.top(jnp.float32(3.0), jnp.uint32(0)))
    assert np.array_equal(order.top(jnp.zeros((4, 1)), jnp.uint32(2))[:, 0], [True, True, False, False])
    assert np.array_equal(order.top(jnp.array([-0.0, 0.0, 1.0]), jnp.uint32(2)), [True, False, True])


def test_bfloat16_deltas_are_full_of_ties():
    x = np.abs(np.random.default_rng(2).standard_normal((64, 64)) * 1e-3)
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    assert len(np.unique(x)) < x.size / 4
    for k in (5, 819, 3000):
        assert np.array_equal(top(jnp.asarray(x), jnp.uint32(k)), wanted(x, k))


def test_float64():
    with jax.enable_x64(True):
        x = 1 + np.random.default_rng(3).random(200) * 1e-12
        assert np.array_equal(order.top(jnp.asarray(x), jnp.uint32(50)), wanted(x, 50))


@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec("y", "x"), PartitionSpec(None, ("x", "y"))])
def test_on_a_mesh_without_gathering_it(spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    x = np.round(np.abs(np.random.default_rng(4).standard_normal((16, 40))) * 4).astype(np.float32)
    placed = jax.device_put(jnp.asarray(x), NamedSharding(mesh, spec))
    assert np.array_equal(top(placed, jnp.uint32(100)), wanted(x, 100))
    text = top.lower(placed, jnp.uint32(100)).compile().as_text() or ""
    moved = re.findall(r"u32\[([0-9,]*)\][^=]* all-gather\(", text)
    # Only counts cross the mesh, one of each device.
    assert moved
    assert all(np.prod([int(size) for size in sizes.split(",") if size]) <= 8 for sizes in moved)
    assert not re.findall(r"(?:f32|pred)\[[0-9,]+\][^=]* all-(?:gather|to-all)\(", text)


def test_computed_magnitudes_are_computed_once():
    """The k-th largest of a sum is equal to one of the sum: compilers that round it anew each time lose it."""

    @jax.jit
    def chosen(a, b, c):
        mean = (a + b + c) / 3
        variance = (jnp.square(a - mean) + jnp.square(b - mean) + jnp.square(c - mean)) / 3
        return order.top(variance, jnp.uint32(7)).sum()

    for seed in range(50):
        a, b, c = jax.random.normal(jax.random.key(seed), (3, 4, 3))
        assert chosen(a, b, c) == 7


def test_ranks():
    x = np.round(np.random.default_rng(5).random((9, 11)) * 5).astype(np.float32)
    by_row = np.argsort(np.argsort(x, axis=-1, kind="stable"), axis=-1, kind="stable")
    assert np.array_equal(order.ranks(jnp.asarray(x)), by_row)


def test_counts_are_taken_in_float64():
    for density, n in [(0.29, 100), (0.7, 10), (0.1, 2**31 - 1), (1 / 3, 3), (0.2, 16_777_217)]:
        assert order.share(density, n, name="density") == int(density * n)
    assert order.share(0.001, 10, name="density", least=1) == 1
    assert order.share(0.0, 10, name="density", least=1) == 0
    assert order.share(1.0, 2**32 - 1, name="density") == 2**32 - 1
    with pytest.raises(ValueError, match=r"density=1.5, wanted a share in \[0, 1\]"):
        order.share(1.5, 10, name="density")
    traced = jax.jit(lambda d: order.share(d, 100, name="density", least=1))
    assert [int(traced(d)) for d in (0.0, 0.001, 0.255, 1.0)] == [0, 1, 25, 100]


def test_shares_of_counts_do_not_overflow():
    for share in (0.1, 0.25, 1 / 3, 0.999, 1.0, 0.0):
        ratio = order.fraction(share, 1, name="select_topk")
        for count in (0, 1, 10, 99, 65_536, 2**31, 2**32 - 1):
            exact = int(ratio[0]) * count // int(ratio[1])
            assert int(order.share_of(jnp.asarray(ratio), jnp.uint32(count))) == exact
