"""Random rules: what the masks depend on, and what they do not; IMM against its expectation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.draws import uniform
from jax.sharding import NamedSharding, PartitionSpec

import jaxmerge

KEY = jax.random.key(11)


def ones(*names, shape=(64, 48)):
    return {name: jnp.ones(shape) for name in names}


def zeros(*names, shape=(64, 48)):
    return {name: jnp.zeros(shape) for name in names}


def masks(names=("org/a",), paths=("x/w", "y/w"), key=KEY, density=0.5):
    """The mask of each named model, read off by giving it alone a delta of one."""
    base, out = zeros(*paths), {}
    for name in names:
        models = [ones(*paths) if n == name else base for n in names]
        merged = jaxmerge.dare(models, base=base, key=key, names=names, density=density, rescale=None)
        out[name] = {path: np.asarray(leaf) > 0 for path, leaf in merged.items()}
    return out


def test_masks_depend_on_key_path_and_name_alone():
    start = masks(("org/a", "org/b"))
    again = masks(("org/b", "org/a"))
    alone = masks(("org/b",), paths=("y/w",))
    for name in ("org/a", "org/b"):
        for path in ("x/w", "y/w"):
            assert np.array_equal(start[name][path], again[name][path])
    assert np.array_equal(alone["org/b"]["y/w"], start["org/b"]["y/w"])
    for one, two in [
        (start["org/a"]["x/w"], start["org/b"]["x/w"]),
        (start["org/a"]["x/w"], start["org/a"]["y/w"]),
        (start["org/a"]["x/w"], masks(key=jax.random.key(12))["org/a"]["x/w"]),
    ]:
        assert 0.4 < (one == two).mean() < 0.6


def test_the_mask_is_the_documented_one():
    wanted = uniform(KEY, "x/w", "org/a", (64, 48)) < 0.5
    assert np.array_equal(masks()["org/a"]["x/w"], wanted)
    # The legacy form of a key is the same key.
    assert np.array_equal(masks(key=jax.random.PRNGKey(11))["org/a"]["x/w"], wanted)


@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec("y", "x"), PartitionSpec(None, ("x", "y"))])
def test_masks_do_not_depend_on_sharding(spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    place = lambda tree: jax.device_put(tree, NamedSharding(mesh, spec))  # noqa: E731
    run = lambda tuned, base: jaxmerge.dare([tuned], base=base, key=KEY, density=0.5)  # noqa: E731
    wanted = run(ones("w"), zeros("w"))["w"]
    for rule in (run, jax.jit(run)):
        merged = rule(place(ones("w")), place(zeros("w")))["w"]
        assert np.array_equal(merged, wanted)
        assert merged.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


def test_other_implementations_of_keys_are_refused():
    with pytest.raises(ValueError, match=r"key has the implementation .*rbg.*threefry2x32"):
        jaxmerge.dare([ones("w")], base=zeros("w"), key=jax.random.key(0, impl="rbg"), density=0.5)


@pytest.mark.parametrize(
    ("key", "found"), [(0, "int"), ("0", "str"), (np.int32(0), r"int32\[\]"), (jnp.ones(2), r"float32\[2\]")]
)
def test_what_is_no_key_is_refused(key, found):
    with pytest.raises(TypeError, match=rf"key is {found}, wanted a PRNG key; pass key=jax.random.key\(seed\)"):
        jaxmerge.dare([ones("w")], base=zeros("w"), key=key, density=0.5)
    with pytest.raises(ValueError, match=r"key has shape \(3,\), wanted one key"):
        jaxmerge.dare([ones("w")], base=zeros("w"), key=jax.random.split(KEY, 3), density=0.5)


def test_density_one_and_zero():
    tuned, base = ones("w"), zeros("w")
    for rescale in ("inverse", "l1", None):
        run = lambda d, r=rescale: jaxmerge.dare([tuned], base=base, key=KEY, density=d, rescale=r)["w"]  # noqa: E731
        assert np.array_equal(run(1.0), tuned["w"])
        assert np.array_equal(run(0.0), base["w"])
    with pytest.raises(ValueError, match="rescale='l2', wanted one of 'inverse', 'l1', None"):
        jaxmerge.dare([tuned], base=base, key=KEY, density=1.0, rescale="l2")


def test_rescaling_keeps_the_mean_or_the_norm():
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((64, 48))
    tuned, base = {"w": jnp.asarray(delta, jnp.float32)}, zeros("w")
    mask = masks(paths=("w",), density=0.7)["org/a"]["w"]
    run = lambda how: jaxmerge.dare([tuned], base=base, key=KEY, names=["org/a"], density=0.7, rescale=how)["w"]  # noqa: E731
    np.testing.assert_allclose(run("inverse"), delta * mask / 0.7, rtol=1e-5)
    np.testing.assert_allclose(run("l1"), delta * mask * np.abs(delta).sum() / np.abs(delta * mask).sum(), rtol=1e-5)
    np.testing.assert_allclose(run(None), delta * mask, rtol=1e-6)


def test_imm_without_drop_is_interpolation():
    rng = np.random.default_rng(0)
    base, tuned = ({"w": jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)} for _ in range(2))
    merged = jaxmerge.imm([tuned], base=base, alpha=0.3)["w"]
    np.testing.assert_allclose(merged, 0.7 * base["w"] + 0.3 * tuned["w"], rtol=1e-5, atol=1e-6)
    assert np.array_equal(jaxmerge.imm([tuned], base=base, alpha=0.0)["w"], base["w"])
    assert np.array_equal(jaxmerge.imm([tuned], base=base, alpha=1.0)["w"], tuned["w"])


@pytest.mark.parametrize("with_reference", [False, True])
def test_imm_with_drop_is_imm_in_expectation(with_reference):
    rng = np.random.default_rng(1)
    anchor, tuned, pretrained = (jnp.asarray(rng.standard_normal((4, 3)), jnp.float32) for _ in range(3))
    reference = {"w": pretrained} if with_reference else None

    @jax.jit
    @jax.vmap
    def draw(seed):
        key = jax.random.key(seed)
        return jaxmerge.imm([{"w": tuned}], base={"w": anchor}, alpha=0.5, drop=0.2, key=key, reference=reference)["w"]

    draws = np.asarray(draw(jnp.arange(20_000)), np.float64)
    wanted = 0.5 * np.asarray(anchor) + 0.5 * np.asarray(tuned)
    error = draws.std(0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - wanted) < 5 * error + 1e-6).all()
    values = len(np.unique(np.round(draws[:, 0, 0], 5)))
    assert values == (4 if with_reference else 2)  # kept or dropped, of one delta or of two


def test_imm_asks_for_what_it_needs():
    tuned, base = ones("w"), zeros("w")
    with pytest.raises(ValueError, match=r"imm: drop=0.2 draws random masks; pass key="):
        jaxmerge.imm([tuned], base=base, drop=0.2)
    for drop in (1.0, np.float32(1), jnp.float32(1)):
        with pytest.raises(ValueError, match=r"drop=1.0, wanted a probability in \[0, 1\)"):
            jaxmerge.imm([tuned], base=base, drop=drop, key=KEY)
    for drop in (0, 0.0, np.float32(0), np.array(0.0), jnp.float32(0)):
        assert float(jaxmerge.imm([tuned], base=base, alpha=0.25, drop=drop)["w"][0, 0]) == 0.25
    with pytest.raises(ValueError, match="reference has no leaf 'w'"):
        jaxmerge.imm([tuned], base=base, drop=0.2, key=KEY, reference=zeros("v"))


@pytest.mark.parametrize("drop", [0.0, 0.2])
def test_imm_takes_what_it_does_not_merge_from_the_anchor(drop):
    tuned, anchor, reference = ({"w": jnp.full(3, float(n)), "steps": jnp.int32(n), "name": str(n)} for n in (1, 2, 3))
    merged = jaxmerge.imm([tuned], base=anchor, drop=drop, key=KEY, reference=reference)
    assert (int(merged["steps"]), merged["name"]) == (2, "2")


def test_alpha_schedules():
    schedule = jaxmerge.alpha_schedule
    assert schedule(2, 3, 0.5) == 0.5
    assert schedule(2, 3, [0.1, [0.2, 0.4], 0.3]) == [0.2, 0.4]
    cosine = {"schedule": "cosine", "start": 0.8, "end": 0.2}
    assert [schedule(r, 3, cosine) for r in (1, 2, 3)] == pytest.approx([0.8, 0.5, 0.2])
    assert schedule(1, 1, cosine) == pytest.approx(0.8)
    assert schedule(1, 3, {"mlp": 0.5, "**": 0.1}) == {"mlp": 0.5, "**": 0.1}
    for spec, words in [
        ([0.1], "alpha has 1 entries for 3 rounds"),
        ("linear", "wanted a number, a list"),
        ({"schedule": "step", "start": 0, "end": 1}, "'step' is unknown"),
        ({"schedule": "linear", "start": 0}, "wanted exactly"),
    ]:
        with pytest.raises(ValueError, match=words):
            schedule(1, 3, spec)
    with pytest.raises(ValueError, match="round 0 is not in 1…3"):
        schedule(0, 3, 0.5)


def test_offload_is_a_no_op_on_one_memory():
    tree = {"w": jnp.ones(3), "step": 4}
    moved = jaxmerge.offload(tree)
    assert moved["w"] is tree["w"]
    assert jaxmerge.onload(moved)["step"] == 4


def test_an_anchor_in_host_memory_merges_onto_the_device():
    device = jax.devices()[0]
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        pytest.skip("no pinned_host memory here")
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    base = {"w": jax.device_put(jnp.zeros(4), host), "v": jax.device_put(jnp.zeros(4), host)}
    tuned = ones("w", "v", shape=(4,))
    for rule in (jaxmerge.imm, jaxmerge.masked(jaxmerge.imm, "w")):
        merged = rule([tuned], base=base, alpha=0.5)
        assert {leaf.sharding.memory_kind for leaf in merged.values()} == {"device"}
        assert float(merged["w"][0]) == 0.5
