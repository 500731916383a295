"""Ranks by NumPy on the host: those of the compiled rule, in every element, and used where they may be."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxmerge
from jaxmerge import host, order

KEY = jax.random.key(3)
MESH = jax.make_mesh((4, 2), ("x", "y"))


def arrays(shape, dtype, scale=0.02):
    """Two models and their base; their deltas tie by the dozen in 16 bits."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(shape) * scale
    return *((base + 0.1 * scale * rng.standard_normal(shape)).astype(dtype) for _ in range(2)), base.astype(dtype)


@pytest.mark.parametrize("scale", [0.02, 1e-38])  # 1e-38: half of the numbers and all deltas are subnormal
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float16])
def test_ranks_are_those_of_the_compiled_rule(dtype, scale):
    *models, base = arrays((6, 1000), dtype, scale)
    wanted = jax.jit(lambda model, base: order.ranks(jnp.abs(model.astype(jnp.float32) - base.astype(jnp.float32))))
    for found, model in zip(host.ranks(models, base, np.float32), models, strict=True):
        assert found.dtype == np.uint16
        assert np.array_equal(found, wanted(model, base))


def test_infinities_and_blocks_of_rows_and_long_rows(monkeypatch):
    model, _, base = arrays((7, 3, 40), np.float32)
    model[0, 0, :3] = np.nan, np.inf, -np.inf
    wanted = np.asarray(order.ranks(jnp.abs(model - base)))
    monkeypatch.setattr(host, "BLOCK", 100)
    with np.errstate(invalid="ignore"):
        assert np.array_equal(host.ranks([model], base)[0], wanted)
    (found,) = host.ranks([np.arange(70_000, dtype=np.float32)], np.zeros(70_000, np.float32))
    assert found.dtype == np.uint32
    assert np.array_equal(found, np.arange(70_000))


def test_what_is_not_for_numpy_is_left_to_the_rule(monkeypatch):
    model, _, base = arrays((3, 4), np.float32)
    assert host.ranks([model], base, ml_dtypes.bfloat16) == ()  # a cast that rounds
    assert host.ranks([model.astype(np.float64)], base.astype(np.float64)) == ()
    assert host.ranks([model[:, :1]], base[:, :1]) == host.ranks([model[0, 0]], base[0, 0]) == ()
    monkeypatch.setattr(host, "LONGEST", 3)
    assert host.ranks([model], base) == ()


@pytest.mark.parametrize("how", ["l1", "inverse"])
def test_della_is_the_same_with_them_and_without(how, monkeypatch):
    """In memory and in NumPy's arrays with them; inside `jit` and on a mesh without; stacked layers either way."""
    *models, base = ({"layers": {"w": x.reshape(4, 6, 250)}} for x in arrays((4, 1500), ml_dtypes.bfloat16))
    used = []
    monkeypatch.setattr(host, "_rank_block", lambda *given, real=host._rank_block: used.append(1) or real(*given))

    def run(models, base):
        return jaxmerge.della(
            models, base=base, key=KEY, density=0.5, rescale=how, weights=[0.4, 0.9], stacked=("layers",)
        )["layers"]["w"]

    found = run(models, base)
    assert used
    assert np.array_equal(run(*jax.tree.map(jnp.asarray, (models, base))), found)
    used.clear()
    place = jax.NamedSharding(MESH, jax.P(None, "y"))
    for rule, where in [(jax.jit(run), (models, base)), (run, jax.device_put((models, base), place))]:
        merged = np.asarray(rule(*where))
        assert np.array_equal(merged == base["layers"]["w"], found == base["layers"]["w"])  # the masks
        np.testing.assert_allclose(merged.astype(np.float32), np.asarray(found, np.float32), rtol=2**-7)
    assert not used
