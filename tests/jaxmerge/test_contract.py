"""The contract every rule keeps (style.md 14): table-driven over RULES, on one device and on meshes of eight."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.coefficients import COEFFICIENTS, EACH, MASKING, TOLERANCE, statistics
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxmerge
from jaxmerge import RULES, leafwise, tree

SHAPES = {
    "model": {
        "embed_tokens": {"weight": (13, 6)},
        "layers": {str(l): {"mlp": {"weight": (16, 8)}, "norm": {"weight": (8,)}} for l in range(3)},
        "column": {"weight": (5, 1)},
        "scalar": (),
    },
    "lm_head": {"weight": (16, 8)},
}
# One shape is one compilation: of two leaves where one will not do, and of more where their paths are the law.
SMALL = {"layers": {"0": {"w": (4, 3)}}, "lm_head": {"weight": (4, 3)}}
TINY = {"model": {"layers": {str(l): {"mlp": {"weight": (4, 3)}} for l in range(3)}}, "lm_head": {"weight": (4, 3)}}


# The names that are a second name for the same function need no second run.
NAMES = list({id(function): name for name, function in reversed(RULES.items())}.values())[::-1]


def is_shape(x):
    return isinstance(x, tuple)


def params(seed, dtype=jnp.float32, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s), dtype), shapes, is_leaf=is_shape)


def count_of(name):
    needs = RULES[name].needs
    return needs.most if needs.most is not None else max(needs.least, 3)


def call(name, models, base, coefficients=None, **more):
    needs = RULES[name].needs
    keywords = dict(COEFFICIENTS[name][0] if coefficients is None else coefficients)
    keywords |= {"base": base} if needs.base != "none" else {}
    keywords |= {"key": jax.random.key(7), "names": names(len(models))} if needs.key != "none" else {}
    if isinstance(models, list) and models and isinstance(models[0], dict) and "lm_head" in models[0]:
        keywords |= statistics(name, models, base)
    return RULES[name](models, **{**keywords, **more})


def names(count):
    return [f"org/model-{i}" for i in range(count)]


def inputs(name, **kw):
    return [params(i + 1, **kw) for i in range(count_of(name))], params(0, **kw)


def equal(a, b):
    return all(
        np.array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def close(a, b, ulps=4):
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        size = max(np.abs(y).max(initial=0), 1.0)
        assert np.abs(x - y).max(initial=0) <= ulps * size * 2.0**-23, path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("name", NAMES)
def test_structure_dtype_and_shape_are_kept(name, dtype):
    models, base = inputs(name, dtype=jnp.dtype(dtype), shapes=SMALL)
    run = lambda m, b: call(name, m, b)  # noqa: E731
    # All are computed in float32 and rounded once: that the narrowest can be is seen by computing it, and what float16
    # gives is known without.
    merged = jax.eval_shape(run, models, base) if dtype == "float16" else run(models, base)
    assert jax.tree.structure(merged) == jax.tree.structure(models[0])
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(models[0]), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)


@pytest.mark.parametrize("name", NAMES)
def test_other_leaves_pass_through(name):
    models, base = inputs(name, shapes=TINY)
    extra = {"step": jnp.int32(3), "key": jax.random.key(3), "act": jax.nn.relu, "flag": True, "none": None}
    merged = call(name, [m | extra for m in models], base | extra | {"step": jnp.int32(9)})
    assert int(merged["step"]) == (9 if RULES[name].needs.base != "none" else 3)
    assert merged["act"] is jax.nn.relu
    assert merged["key"].dtype == jax.random.key(0).dtype


@pytest.mark.parametrize("name", NAMES)
def test_merging_x_with_x_is_x(name):
    models, _ = inputs(name)
    x = models[0]
    # Weights that sum to one; no delta at all where there is a base.
    close(call(name, [x] * len(models), x), x, ulps=TOLERANCE.get(name, 4))


@pytest.mark.parametrize("name", [n for n in NAMES if RULES[n].needs.symmetric])
def test_order_of_models_does_not_matter(name):
    models, base = inputs(name, shapes=TINY)
    coefficients = COEFFICIENTS[name][0]
    turned = {k: v[::-1] if isinstance(v, list) else v for k, v in coefficients.items()}
    more = {"names": names(len(models))[::-1]} if RULES[name].needs.key != "none" else {}
    more |= {k: v[::-1] for k, v in statistics(name, models, base).items() if isinstance(v, list)}
    one, two = call(name, models[::-1], base, turned, **more), call(name, models, base, coefficients)
    close(one, two, ulps=TOLERANCE.get(name, 4))


@pytest.mark.parametrize("name", NAMES)
def test_jit_equals_eager_and_compiles_once(name):
    models, base = inputs(name, shapes=SMALL)
    traces = []

    @jax.jit
    def run(models, base, coefficients):
        traces.append(1)
        return call(name, models, base, coefficients)

    one, two = COEFFICIENTS[name]
    close(run(models, base, one), call(name, models, base, one), ulps=TOLERANCE.get(name, 4))
    close(run(models, base, two), call(name, models, base, two), ulps=TOLERANCE.get(name, 4))
    assert len(traces) == 1
    before = leafwise.__globals__["_run"]._cache_size()
    call(name, models, base, two)
    assert leafwise.__globals__["_run"]._cache_size() == before  # eager calls share compilations too


@pytest.mark.parametrize("name", NAMES)
def test_no_nan_at_zero_delta(name):
    models, _ = inputs(name)
    zero = jax.tree.map(jnp.zeros_like, models[0])
    for base in (models[0], zero):
        merged = call(name, [base] * len(models), base)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(merged))


@pytest.mark.parametrize("name", NAMES)
def test_eval_shape_vmap_and_grad(name):
    models, base = inputs(name, shapes=TINY)
    shapes = jax.eval_shape(lambda m, b: call(name, m, b), models, base)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), models[0])

    if not COEFFICIENTS[name][0]:
        return
    grid = jax.tree.map(lambda *v: jnp.asarray(v, jnp.float32), *COEFFICIENTS[name])
    merged = jax.vmap(lambda c: call(name, models, base, c))(grid)
    for i, coefficients in enumerate(COEFFICIENTS[name]):
        one = call(name, models, base, jax.tree.map(jnp.float32, coefficients))
        close(jax.tree.map(lambda leaf, i=i: leaf[i], merged), one, ulps=TOLERANCE.get(name, 4))


@pytest.mark.parametrize("name", [n for n in NAMES if set(COEFFICIENTS[n][0]) - MASKING])
def test_gradients_are_finite_differences(name):
    with jax.enable_x64(True):
        models, base = inputs(name, dtype=jnp.float64, shapes=SMALL)

        @jax.jit
        @jax.value_and_grad
        def loss(coefficients):
            merged = call(name, models, base, coefficients)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(merged))

        start = jax.tree.map(jnp.float64, COEFFICIENTS[name][0])
        _, slopes = loss(start)
        step = 1e-6
        for path, slope in jax.tree_util.tree_flatten_with_path(slopes)[0]:
            if path[0].key in MASKING:
                continue

            def shift(by, path=path):
                return jax.tree_util.tree_map_with_path(lambda p, v: v + by * (p == path), start)

            difference = (loss(shift(step))[0] - loss(shift(-step))[0]) / (2 * step)
            assert float(slope) == pytest.approx(float(difference), rel=1e-4, abs=1e-6), path


MESHES = {
    "8": ((8,), ("x",), AxisType.Auto),
    "4x2": ((4, 2), ("x", "y"), AxisType.Auto),
    "4x2-explicit": ((4, 2), ("x", "y"), AxisType.Explicit),
}
MESHED = {"norm": (8,), "lm_head": {"weight": (16, 8)}}
# Every rule is held on eight devices in a row; on two axes, where programs take longest to compile, one rule of each
# kind of arithmetic, and every rule with FULL=1: elementwise, norms and angles, iterations, selection by size alone
# and with signs, by chance, by variance, over all models, solves.
KINDS = ["average", "slerp", "karcher", "breadcrumbs", "ties", "dare", "sce", "model_stock", "arcee_fusion", "regmean"]
MESHED_CASES = [
    (name, mesh) for name in NAMES for mesh in MESHES if mesh == "8" or name in KINDS or os.environ.get("FULL")
]


def shard(tree, mesh):
    """Shard every axis that divides, the first mesh axis first."""

    def place(leaf):
        axes = [(n, mesh.shape[n]) for n in mesh.axis_names]
        spec = []
        for size in leaf.shape:
            fit = next((i for i, (_, width) in enumerate(axes) if size % width == 0), None)
            spec.append(None if fit is None else axes.pop(fit)[0])
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, tree)


@pytest.mark.parametrize(("name", "mesh"), MESHED_CASES)
def test_sharded_equals_unsharded_and_keeps_sharding(name, mesh):
    sizes, axes, kind = MESHES[mesh]
    grid = jax.make_mesh(sizes, axes, axis_types=(kind,) * len(axes))
    models, base = inputs(name, shapes=MESHED)
    placed, placed_base = [shard(m, grid) for m in models], shard(base, grid)
    run = lambda m, b: call(name, m, b)  # noqa: E731
    merged = (jax.jit(run) if mesh == "4x2" else run)(placed, placed_base)
    # 4: XLA contracts a·b + c into one rounding or two as the loops fall.
    close(merged, run(models, base), ulps=TOLERANCE.get(name, 4))
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(placed[0]), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize("name", NAMES)
def test_uneven_shards_inside_jit(name):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    models, base = inputs(name, shapes={"lm_head": {"weight": (13, 6)}})

    @jax.jit
    def run(models, base):
        # 13 rows over 8 devices: a constraint pads them, where an array at rest must divide.
        def rows(leaf):
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec("x")))

        return call(name, jax.tree.map(rows, models), jax.tree.map(rows, base))

    close(run(models, base), call(name, models, base), ulps=TOLERANCE.get(name, 4))


@pytest.mark.parametrize("name", NAMES)
def test_stacked_equals_unstacked(name):
    models, base = inputs(name)
    coefficients = dict(COEFFICIENTS[name][0])
    for key, value in coefficients.items():  # a gradient over depth, and a pattern of one layer
        if key in EACH or (key == "epsilon" and name.startswith("della")):
            values = value if isinstance(value, list) else [value] * len(models)
            coefficients[key] = [{"layers/1": 0.25, "**": [v, v + 0.2]} for v in values]
        else:
            coefficients[key] = {"layers/1": 0.25, "**": [value, value + 0.2]}

    def stack(tree):
        layers = [tree["model"]["layers"][str(l)] for l in range(3)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        return {**tree, "model": {**tree["model"], "layers": stacked}}

    one = call(name, models, base, coefficients)
    two = call(name, [stack(m) for m in models], stack(base), coefficients, stacked=("model/layers",))
    close(two, stack(one), ulps=TOLERANCE.get(name, 4))


@pytest.mark.parametrize("name", NAMES)
def test_products_are_of_float32_on_every_device(name):
    """Where nothing is said, GPUs multiply float32 in TF32 and TPUs in bfloat16."""
    models, base = inputs(name, shapes=TINY)
    program = jax.jit(lambda m, b: call(name, m, b)).lower(models, base).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line] == []
    has_products = name == "regmean" or RULES[name].__module__ == "jaxmerge.spectral"
    assert bool(products) == has_products  # elsewhere inner products are sums


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_what_the_cpu_gives(name):
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU, this is {jax.default_backend()}")
    models, base = inputs(name, shapes=TINY)
    found = jax.jit(lambda m, b: call(name, m, b))(models, base)
    with jax.default_device(jax.devices("cpu")[0]):
        models, base = inputs(name, shapes=TINY)
        wanted = jax.jit(lambda m, b: call(name, m, b))(models, base)
    assert {leaf.device.platform for leaf in jax.tree.leaves(found)} == {"gpu"}
    close(found, wanted, ulps=4 * TOLERANCE.get(name, 4))  # roots, sines and quotients differ in their last places


@pytest.mark.parametrize("name", NAMES)
def test_errors_name_the_leaf(name):
    models, base = inputs(name, shapes=TINY)
    needs = RULES[name].needs

    def broken(change):
        wrong = jax.tree.map(lambda x: x, models[-1])
        change(wrong)
        if len(models) > 1:
            return [*models[:-1], wrong], base
        return models, wrong

    def drop(tree):
        del tree["model"]["layers"]["1"]["mlp"]["weight"]

    def reshape(tree):
        tree["model"]["layers"]["1"]["mlp"]["weight"] = jnp.zeros((4, 9))

    def integers(tree):
        tree["model"]["layers"]["1"]["mlp"]["weight"] = jnp.zeros((4, 3), jnp.int32)

    def add(tree):
        tree["model"]["layers"]["1"]["mlp"]["bias"] = jnp.zeros((6,))

    for change, words in [
        (drop, "has no leaf 'model/layers/1/mlp/weight'"),
        (reshape, r"leaf 'model/layers/1/mlp/weight' of .* has shape \(4, 9\), wanted \(4, 3\)"),
        (integers, r"leaf 'model/layers/1/mlp/weight' of .* is int32\[4,3\], wanted float32\[4,3\]"),
        (add, "has a leaf 'model/layers/1/mlp/bias' that models"),
    ]:
        if len(models) == 1 and needs.base == "none":
            break  # one tree: nothing to differ from
        with pytest.raises(ValueError, match=words):
            call(name, *broken(change))
    with pytest.raises(TypeError, match="must be a sequence of pytrees, found dict"):
        call(name, models[0], base, names=None)
    with pytest.raises(ValueError, match=f"{name} needs .*; found 0 models"):
        call(name, [], base)
    if needs.base == "required":
        with pytest.raises(ValueError, match="pass base="):
            call(name, models, None)
    if needs.key != "none":
        with pytest.raises(ValueError, match=r"pass key=jax.random.key"):
            call(name, models, base, key=None)
        with pytest.raises(ValueError, match="names="):
            call(name, models, base, names=["a"] * 5)
    with pytest.raises(TypeError, match="no_such_coefficient"):
        call(name, models, base, no_such_coefficient=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_leaves_the_rest_alone(name):
    models, base = inputs(name, shapes=TINY)
    otherwise = "base" if RULES[name].needs.base == "required" else "first"
    run = jaxmerge.masked(RULES[name], "layers/1", otherwise=otherwise)
    keywords: dict[str, Any] = dict(COEFFICIENTS[name][0]) | statistics(name, models, base)
    keywords |= {"base": base} if RULES[name].needs.base != "none" else {}
    keywords |= {"key": jax.random.key(7), "names": names(len(models))} if RULES[name].needs.key != "none" else {}
    merged = tree.named_leaves(run(models, **keywords))
    full = tree.named_leaves(call(name, models, base))
    other = tree.named_leaves(base if otherwise == "base" else models[0])
    for path, leaf in merged.items():
        assert equal(leaf, full[path] if "layers/1/" in path else other[path]), path


def test_lookup_lists_the_rules():
    with pytest.raises(KeyError, match=r"no rule 'tie'; did you mean 'ties'\? there are interpolate, average"):
        jaxmerge.rule("tie")
    assert jaxmerge.rule("imm") is jaxmerge.imm


def test_importing_the_library_imports_jax_alone():
    code = (
        "import sys, jaxmerge\n"
        "bad = {'flax', 'orbax', 'transformers', 'safetensors', 'yaml', 'optax', 'torch', 'jaxmerge.files'}\n"
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
