"""Each linear rule against an independent NumPy float64 formula, and the identities of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge

PATHS = ("model/layers/0/w", "model/layers/1/w", "lm_head/weight")


def tree(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal((7, 5)) for path in PATHS}


def to_jax(t):
    return {path: jnp.asarray(leaf, jnp.float32) for path, leaf in t.items()}


def check(merged, formula, rtol=1e-6):
    for path in PATHS:
        np.testing.assert_allclose(np.asarray(merged[path], np.float64), formula(path), rtol=rtol, atol=2e-6)


A, B, C, BASE = (tree(i) for i in range(4))
a, b, c, base = (to_jax(t) for t in (A, B, C, BASE))


@pytest.mark.parametrize("t", [-0.5, 0.0, 0.25, 0.75, 1.0, 1.5])
def test_interpolate(t):
    check(jaxmerge.interpolate([a, b], t=t), lambda p: (1 - t) * A[p] + t * B[p])


def test_interpolate_is_exact_at_the_ends_and_between_equals():
    for t, wanted in ((0.0, a), (1.0, b)):
        merged = jaxmerge.interpolate([a, b], t=t)
        assert all(np.array_equal(merged[p], wanted[p]) for p in PATHS)
    for t in np.linspace(-1, 2, 13):
        merged = jaxmerge.interpolate([a, a], t=float(t))
        assert all(np.array_equal(merged[p], a[p]) for p in PATHS)


def test_average():
    check(jaxmerge.average([a, b, c]), lambda p: (A[p] + B[p] + C[p]) / 3)
    w = [0.5, -0.2, 2.0]
    total = lambda p: w[0] * A[p] + w[1] * B[p] + w[2] * C[p]  # noqa: E731
    check(jaxmerge.average([a, b, c], weights=w), lambda p: total(p) / sum(w))
    check(jaxmerge.average([a, b, c], weights=w, normalize=False), total)


DIVIDED = {
    "average": {},
    "multislerp": {},
    "extrapolation_merge": {"base": base, "alphas": 0.1},
    "fisher": {"fishers": [a, b, c]},
}


@pytest.mark.parametrize("rule", DIVIDED)
@pytest.mark.parametrize(
    ("weights", "leaf"),
    [
        ([0.1, 0.2, -0.3], "lm_head/weight"),  # in float64 5.6e-17 is left
        (np.array([0.1, 0.2, -0.3], np.float32), "lm_head/weight"),
        (jnp.array([0.7, -0.4, -0.3]), "lm_head/weight"),  # in float32 −3e-8
        ([{"**": 1}, {"**": -1}, 0], "lm_head/weight"),
        ([[1, 1], [-1, -1], 0], "lm_head/weight"),
        ([[1, 1], [1, -1], 0], "model/layers/1/w"),
        (0.0, "lm_head/weight"),
    ],
)
def test_weights_that_sum_to_zero_at_a_leaf(rule, weights, leaf):
    with pytest.raises(ValueError, match=f"{rule}: weights .* sum to zero at leaf '{leaf}'.*change a weight"):
        jaxmerge.RULES[rule]([a, b, c], weights=weights, **DIVIDED[rule])


def test_weights_that_nearly_sum_to_zero_are_taken():
    check(jaxmerge.average([a, b], weights=[1e-9, 1e-9]), lambda p: (A[p] + B[p]) / 2)
    check(jaxmerge.average([a, b], weights=[1, -0.99]), lambda p: 100 * A[p] - 99 * B[p], rtol=1e-4)
    weights = jnp.array([1.0, 3.0])
    closed = jax.jit(lambda models: jaxmerge.average(models, weights=weights))([a, b])
    check(closed, lambda p: (A[p] + 3 * B[p]) / 4)
    stack = {"layers": {"w": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match="at leaf 'layers/1/w'"):
        jaxmerge.average([stack, stack], weights=[[1, 1], [1, -1]], stacked=("layers",))
    only = jaxmerge.masked(jaxmerge.average, "layers/0", "first")([a, b], weights=[[1, 1], [1, -1]])
    assert np.array_equal(only[PATHS[1]], a[PATHS[1]])  # where nothing is merged nothing is divided


def test_weights_that_sum_to_zero():
    with pytest.raises(ValueError, match=r"average: weights \[1.0, -1.0\] sum to zero.*normalize=False"):
        jaxmerge.average([a, b], weights=[1.0, -1.0])
    with pytest.raises(ValueError, match=r"extrapolation_merge: weights .* sum to zero"):
        jaxmerge.extrapolation_merge([a, b], base=base, alphas=0.1, weights=np.array([1.0, -1.0]))
    check(jaxmerge.average([a, b], weights=[1.0, -1.0], normalize=False), lambda p: A[p] - B[p])
    traced = jax.jit(lambda w: jaxmerge.average([a, b], weights=w))(jnp.array([1.0, -1.0]))
    assert not np.isfinite(traced[PATHS[0]]).any()  # inside jit nobody can look: it shows as non-finite


def test_task_arithmetic():
    w = [0.5, -0.2, 2.0]
    delta = lambda p: sum(wi * (t[p] - BASE[p]) for wi, t in zip(w, (A, B, C), strict=True))  # noqa: E731
    run = lambda **k: jaxmerge.task_arithmetic([a, b, c], base=base, weights=w, **k)  # noqa: E731
    check(run(), lambda p: BASE[p] + delta(p))
    check(run(scale=0.3, normalize=True), lambda p: BASE[p] + 0.3 * delta(p) / sum(w))
    for balanced in ([0.1, 0.2, -0.3], [0.7, -0.4, -0.3], 0.0):  # divided by 1, as in mergekit
        one, two = (
            jaxmerge.task_arithmetic([a, b, c], base=base, weights=balanced, normalize=n) for n in (True, False)
        )
        assert all(np.array_equal(one[p], two[p]) for p in PATHS)
        dense = jaxmerge.delta_rule(normalize=True)([a, b, c], base=base, weights=balanced)
        assert all(np.array_equal(one[p], dense[p]) for p in PATHS)
    zero = jaxmerge.task_arithmetic([base, base], base=base, weights=3.0)
    assert all(np.array_equal(zero[p], base[p]) for p in PATHS)


def test_extrapolate():
    check(jaxmerge.extrapolate([a], base=base, alpha=0.4), lambda p: A[p] + 0.4 * (A[p] - BASE[p]))
    still = jaxmerge.extrapolate([a], base=base, alpha=0.0)
    assert all(np.array_equal(still[p], a[p]) for p in PATHS)
    check(jaxmerge.extrapolate([a], base=base, alpha=-1.0), lambda p: BASE[p])


def test_extrapolation_merge():
    beta, one, two = 0.3, 0.5, -0.2
    merged = jaxmerge.extrapolation_merge([a, b], base=base, alphas=[one, two], weights=[beta, 1 - beta])
    tau_1, tau_2 = ({p: t[p] - BASE[p] for p in PATHS} for t in (A, B))
    # methods.md 3: θ = θ_b + β(1+α_1)τ_1 + (1−β)(1+α_2)τ_2
    check(merged, lambda p: BASE[p] + beta * (1 + one) * tau_1[p] + (1 - beta) * (1 + two) * tau_2[p])
    # α = 0 is checkpoint interpolation
    still = jaxmerge.extrapolation_merge([a, b], base=base, alphas=0.0, weights=[beta, 1 - beta])
    check(still, lambda p: beta * A[p] + (1 - beta) * B[p])
    # θ_1 = θ_2 is ExPO
    twin = jaxmerge.extrapolation_merge([a, a], base=base, alphas=0.5, weights=[beta, 1 - beta])
    check(twin, lambda p: A[p] + 0.5 * (A[p] - BASE[p]))


def test_collinear_tells_the_trap():
    half = jaxmerge.interpolate([base, a], t=0.5)
    cosines = np.asarray(jaxmerge.collinear([a, half, b, base], base=base))
    assert cosines[0, 1] == pytest.approx(1.0, abs=1e-5)
    assert abs(cosines[0, 2]) < 0.9
    assert not cosines[3].any()  # a model equal to the base
    flat = lambda t: np.concatenate([(t[p] - BASE[p]).ravel() for p in PATHS])  # noqa: E731
    x, y = flat(A), flat(B)
    assert cosines[0, 2] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)


def test_coefficients_by_path_and_depth():
    merged = jaxmerge.interpolate([a, b], t={"lm_head": 0.1, "layers": [0.2, 0.8]})
    wanted = {"model/layers/0/w": 0.2, "model/layers/1/w": 0.8, "lm_head/weight": 0.1}
    check(merged, lambda p: (1 - wanted[p]) * A[p] + wanted[p] * B[p])
    merged = jaxmerge.average([a, b], weights=[[0.0, 1.0], 1.0])  # a list inside a list is a gradient
    wanted = {"model/layers/0/w": 0.0, "model/layers/1/w": 0.5, "lm_head/weight": 0.0}
    check(merged, lambda p: wanted[p] * A[p] + (1 - wanted[p]) * B[p])


def test_mixed_precision_keeps_the_first_models_dtype():
    anchor = jaxmerge.cast(base, jnp.bfloat16)
    merged = jaxmerge.interpolate([a, anchor], t=0.5)
    assert merged[PATHS[0]].dtype == jnp.float32
    rounded = {p: np.asarray(anchor[p], np.float64) for p in PATHS}
    check(merged, lambda p: 0.5 * A[p] + 0.5 * rounded[p])
    one = jaxmerge.average([jaxmerge.cast(a, jnp.bfloat16), jaxmerge.cast(b, jnp.bfloat16)])[PATHS[0]]
    x, y = (np.asarray(jnp.asarray(t[PATHS[0]], jnp.bfloat16), np.float32) for t in (A, B))
    assert np.array_equal(one, jnp.asarray((x + y) / 2, jnp.bfloat16))  # float32 inside, one rounding


def test_float64_is_merged_in_float64():
    with jax.enable_x64(True):
        x, y = jnp.asarray(A[PATHS[0]]), jnp.asarray(B[PATHS[0]])
        merged = jaxmerge.interpolate([{"w": x}, {"w": y}], t=0.3)["w"]
        assert merged.dtype == jnp.float64
        np.testing.assert_allclose(merged, 0.7 * A[PATHS[0]] + 0.3 * B[PATHS[0]], rtol=1e-14)


def test_bad_coefficients():
    with pytest.raises(ValueError, match="weights has 3 entries, wanted 2"):
        jaxmerge.average([a, b], weights=[1, 2, 3])
    with pytest.raises(ValueError, match="no pattern of t matches leaf 'lm_head/weight'"):
        jaxmerge.interpolate([a, b], t={"layers": 0.5})
    with pytest.raises(TypeError, match="t='half' is not a number"):
        jaxmerge.interpolate([a, b], t="half")
    with pytest.raises(TypeError, match="alpha=None is not a number"):
        jaxmerge.extrapolate([a], base=base, alpha=None)
