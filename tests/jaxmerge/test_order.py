"""Exact order statistics: against NumPy's stable sort, with ties, signs, dtypes, meshes, inside jit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxmerge
from jaxmerge import cut, order


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
    ks = [1, 10, 500, 1001]
    assert np.array_equal(order.kth_largest(jnp.asarray(x), jnp.uint32(ks)), np.sort(x)[[-k for k in ks]])


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


SHAPE = (48, 512)  # more elements than the sample has: the search has to search


def adversarial():
    """Data that mislead a search by interpolation, each of shape SHAPE."""
    rng = np.random.default_rng(6)
    normal = rng.standard_normal(SHAPE)
    n = normal.size
    middle = np.float32(1) + np.arange(n) * 2.0**-23  # consecutive floats: each has a pattern of its own
    return {
        "equal": np.full(SHAPE, 0.5),
        "zeros": np.zeros(SHAPE),
        "two values": np.where(normal > 0.8, 2.0, 1.0),
        "one apart": np.where(np.arange(n).reshape(SHAPE) == 777, np.nextafter(np.float32(1), 2), 1.0),
        "lognormal": np.exp(20 * normal),
        "all magnitudes": np.exp(170 * (rng.random(SHAPE) - 0.5)),
        "subnormal": normal * 1e-40,
        "a tiny part": np.where(rng.random(SHAPE) < 0.8, 1e-30 * normal, normal),
        "infinite": np.where(normal > 1, np.inf, normal),
        "NaN": np.where(normal > 1.5, np.nan, normal),
        "sorted": np.sort(normal.ravel()).reshape(SHAPE),
        "consecutive": middle.reshape(SHAPE),
        # Two crowds at the ends of the range of patterns, k between them.
        "far apart": np.where(rng.random(SHAPE) < 0.5, 2e-38, 3e38) * (1 + 1e-3 * rng.random(SHAPE)),
        "geometric": np.float32(2) ** -(np.arange(n) % 120).reshape(SHAPE),
    }


@jax.jit
def top_and_passes(x, k):
    found = cut.search(lambda stored: [cut.patterns(stored[0])], (x,), jnp.maximum(k, 1)[None])
    return order.top(x, k), found.passed


@pytest.mark.parametrize("kind", adversarial())
def test_top_whatever_the_data(kind):
    x = np.asarray(adversarial()[kind], np.float32)
    # NaN is the largest, and ranks by its bits as all do.
    magnitude = (x.view(np.uint32) & 0x7FFFFFFF).astype(np.int64)
    for k in (0, 1, 2, 100, x.size // 5, x.size // 2, x.size - 1, x.size):
        mask, passes = top_and_passes(jnp.asarray(x), jnp.uint32(k))
        assert np.array_equal(mask, wanted(magnitude, k)), k
        # ≤ log₄ 24,576 passes that leave out three quarters of the elements, 31 that halve 2³¹ patterns at least.
        assert passes <= 8 + 31, (k, int(passes))


def test_a_search_is_short_on_common_data():
    rng = np.random.default_rng(7)
    base = jnp.asarray(rng.standard_normal((256, 1024)) * 0.02, jnp.bfloat16)
    tuned = (base.astype(jnp.float32) + 2e-3 * rng.standard_normal(base.shape).astype(np.float32)).astype(jnp.bfloat16)
    for x in (tuned.astype(jnp.float32) - base.astype(jnp.float32), jnp.asarray(rng.standard_normal(base.shape))):
        assert top_and_passes(x.astype(jnp.float32), jnp.uint32(x.size // 5))[1] <= 8


def test_several_cuts_share_their_passes():
    rng = np.random.default_rng(8)
    *models, base = (jnp.asarray(rng.standard_normal(SHAPE), jnp.bfloat16) for _ in range(3))

    def deltas(stored):
        return [x.astype(jnp.float32) - stored[-1].astype(jnp.float32) for x in stored[:-1]]

    found = jax.jit(lambda stored, k: cut.cuts(deltas, stored, [[k, k + 7], [jnp.uint32(0)]]))(
        (*models, base), jnp.uint32(1000)
    )
    for x, cuts, ks in zip(deltas((*models, base)), found, [[1000, 1007], [0]], strict=True):
        for one, k in zip(cuts, ks, strict=True):
            assert np.array_equal(one.mask(x), wanted(np.abs(np.asarray(x)), k))


@pytest.mark.parametrize("shape", [(300, 3), (40, 5, 3, 3), (70_000,), (3, 70_000), (2, 3, 400), (1, 1), (0,)])
def test_top_of_any_shape(shape):
    x = np.round(np.abs(np.random.default_rng(9).standard_normal(shape)) * 8).astype(np.float32)
    for k in {0, x.size // 3, x.size}:
        assert np.array_equal(top(jnp.asarray(x), jnp.uint32(k)), wanted(x, k))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec("y", "x"), PartitionSpec(None, ("x", "y"))])
def test_on_a_mesh_without_gathering_it(spec, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    x = np.round(np.abs(np.random.default_rng(4).standard_normal((64, 4096))) * 4).astype(np.float32)
    placed = jax.device_put(jnp.asarray(x), NamedSharding(mesh, spec))
    k = jnp.uint32(50_000)
    assert np.array_equal(top(placed, k), wanted(x, 50_000))
    text = top.lower(placed, k).compile().as_text() or ""
    moved = re.findall(r"\w+\[([0-9,]+)\][^=]* (?:all-gather|all-to-all|collective-permute|all-reduce)\(", text)
    assert moved
    # A sample, a row, and the counts of rows: never a shard.
    assert max(np.prod([int(size) for size in sizes.split(",")]) for sizes in moved) <= max(cut.SAMPLE, x.shape[1])


@pytest.mark.parametrize("rule", ["ties", "breadcrumbs", "sce"])
def test_no_float32_copies_of_the_models_are_held(rule):
    shape = (512, 2048)
    leaf = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    coefficients = {"sce": {"select_topk": 0.2}}.get(rule, {"density": 0.2})

    def merge(models, base):
        return jaxmerge.rule(rule)([{"w": model} for model in models], base={"w": base}, **coefficients)

    analysis = jax.jit(merge).lower([leaf] * 3, leaf).compile().memory_analysis()
    stored = 2 * np.prod(shape)
    # The variances of SCE, which must not round anew in every pass, and the mask.
    assert analysis.temp_size_in_bytes <= (2.7 if rule == "sce" else 0.2) * stored


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
