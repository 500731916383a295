"""Parity with mergekit 0.1.5 in float32, all of its methods; random ones with our masks put in its hands.

Run by hand or in CI on Python 3.11 with the extra `oracle`:
`pytest -m oracle tests/jaxmerge/test_oracle.py`.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.draws import uniform

import jaxmerge
from jaxmerge.selection import divergence

pytestmark = pytest.mark.oracle
SHAPES = {"layers/0/w": (37, 53), "layers/0/b": (64,), "layers/1/w": (12, 9), "column/w": (7, 1)}
KEY = jax.random.key(3)
NAMES = ["org/one", "org/two", "org/three"]
W = [0.5, -0.3, 0.9]


def models(count, scale=0.02):
    """A base and `count` models near it, float32, with deltas a tenth of the weights."""
    rng = np.random.default_rng(0)
    base = {p: rng.standard_normal(s).astype(np.float32) * scale for p, s in SHAPES.items()}
    tuned = [
        {p: (b + rng.standard_normal(b.shape) * scale / 10).astype(np.float32) for p, b in base.items()}
        for _ in range(count)
    ]
    return base, tuned


def oracle(method, tensors, base_index=None, **parameters):
    torch = pytest.importorskip("torch")
    merge_methods = pytest.importorskip("mergekit.merge_methods")
    given = [torch.from_numpy(np.array(t)) for t in tensors]
    return merge_methods.merge_tensors(given, method, parameters=parameters, base_index=base_index).numpy()


# method, rule, our coefficients, its parameters, inputs, how the base is used
# "delta": base= and its base_index 0; "input": the base is our first model; "none": no base.
CASES = [
    ("linear", "average", {"weights": W}, {"weight": W}, 3, "none"),
    ("linear", "average", {"weights": W, "normalize": False}, {"weight": W, "normalize": False}, 3, "none"),
    ("slerp", "slerp", {"t": 0.3}, {"t": 0.3}, 1, "input"),
    ("nuslerp", "nuslerp", {"weights": [1.0, 3.0]}, {"weight": [1.0, 3.0]}, 2, "none"),
    ("nuslerp", "nuslerp", {"weights": [1.0, 3.0]}, {"weight": [1.0, 3.0]}, 2, "delta"),
    ("nuslerp", "nuslerp", {"flatten": False}, {"weight": 1.0, "nuslerp_flatten": False}, 2, "delta"),
    (
        "nuslerp",
        "nuslerp",
        {"flatten": False, "row_wise": True},
        {"weight": 1.0, "nuslerp_flatten": False, "nuslerp_row_wise": True},
        2,
        "delta",
    ),
    ("multislerp", "multislerp", {"weights": [0.2, 0.5, 0.9]}, {"weight": [0.2, 0.5, 0.9]}, 3, "none"),
    ("multislerp", "multislerp", {"weights": [0.2, 0.5, 0.9]}, {"weight": [0.2, 0.5, 0.9]}, 3, "delta"),
    (
        "multislerp",
        "multislerp",
        {"weights": [0.2, 0.5, 0.9], "normalize": False},
        {"weight": [0.2, 0.5, 0.9], "normalize_weights": False},
        3,
        "delta",
    ),
    ("karcher", "karcher", {}, {}, 3, "none"),
    ("karcher", "karcher", {"max_iter": 2}, {"max_iter": 2}, 3, "none"),
    ("task_arithmetic", "task_arithmetic", {"weights": W, "scale": 0.7}, {"weight": W, "lambda": 0.7}, 3, "delta"),
    (
        "task_arithmetic",
        "task_arithmetic",
        {"weights": W, "normalize": True},
        {"weight": W, "normalize": True},
        3,
        "delta",
    ),
    *(
        ("ties", "ties", {"weights": W, "density": d, **ours}, {"weight": W, "density": d, **its}, 3, "delta")
        for d, (ours, its) in itertools.product(
            [0.2, [0.5, 0.001, 1.0], 0.0],
            [
                ({}, {}),
                ({"normalize": False, "scale": 0.5}, {"normalize": False, "lambda": 0.5}),
                ({"rescale": "l1"}, {"rescale": True}),
            ],
        )
    ),
    *(
        (m, m, {"weights": W, "density": d, "gamma": g}, {"weight": W, "density": d, "gamma": g}, 3, "delta")
        for m in ("breadcrumbs", "breadcrumbs_ties")
        for d, g in [(0.6, 0.01), (0.9, 0.3), (1.0, 0.2), (0.3, 0.0)]
    ),
    ("model_stock", "model_stock", {}, {}, 3, "delta"),
    ("model_stock", "model_stock", {"compat": "mergekit"}, {}, 3, "delta"),
    ("model_stock", "model_stock", {"filter_wise": True, "compat": "mergekit"}, {"filter_wise": True}, 3, "delta"),
    *(("sce", "sce", {"select_topk": d}, {"select_topk": d}, 3, "delta") for d in (1.0, 0.5, 0.1, 0.0)),
    ("nearswap", "nearswap", {"t": 0.001}, {"t": 0.001}, 1, "delta"),
    ("ram", "ram", {"epsilon": 2e-3}, {"epsilon": 2e-3}, 3, "delta"),
    ("ramplus_tl", "ramplus_tl", {"epsilon": 2e-3}, {"epsilon": 2e-3}, 3, "delta"),
    (
        "ramplus_tl",
        "ramplus_tl",
        {"epsilon": 2e-3, "r": 0.5, "alpha": 0.4},
        {"epsilon": 2e-3, "r": 0.5, "alpha": 0.4},
        3,
        "delta",
    ),
    ("passthrough", "passthrough", {"scale": 0.7}, {"scale": 0.7}, 1, "none"),
]


def run(rule, base, tuned, use, **coefficients):
    to_jax = lambda t: {p: jnp.asarray(v) for p, v in t.items()}  # noqa: E731
    inputs = [to_jax(t) for t in ([base, *tuned] if use == "input" else tuned)]
    more = {"base": to_jax(base)} if use == "delta" else {}
    return jaxmerge.rule(rule)(inputs, **more, **coefficients)


def same(found, wanted, path, size):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=2e-6, atol=2e-6 * size, err_msg=path)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{'-'.join(map(str, c[2].values()))}-{c[5]}")
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_parity(case, scale):
    method, rule, ours, its, count, use = case
    base, tuned = models(count, scale)
    merged = run(rule, base, tuned, use, **ours)
    for path in SHAPES:
        tensors = [t[path] for t in tuned] if use == "none" else [base[path], *(t[path] for t in tuned)]
        wanted = oracle(method, tensors, None if use == "none" else 0, **its)
        same(merged[path], wanted, path, scale)


RANDOM = [
    ("dare_linear", "dare", {"density": [0.3, 0.6, 0.9], "weights": W}, {}),
    ("dare_ties", "dare_ties", {"density": [0.3, 0.6, 0.9], "weights": W}, {}),
    ("dare_ties", "dare_ties", {"density": 0.5, "weights": W, "rescale": None}, {"rescale": False}),
    ("della", "della", {"density": [0.3, 0.6, 0.7], "epsilon": 0.2, "weights": W}, {}),
    ("della_linear", "della_linear", {"density": [0.3, 0.6, 0.7], "epsilon": 0.2, "weights": W}, {}),
]


@pytest.mark.parametrize("case", RANDOM, ids=lambda c: f"{c[0]}-{c[2].get('rescale', 'l1')}")
def test_random_methods_with_our_masks(case, monkeypatch):
    torch = pytest.importorskip("torch")
    method, rule, ours, its = case
    base, tuned = models(3, 1.0)
    merged = run(rule, base, tuned, "delta", key=KEY, names=NAMES, **{"rescale": "l1", **ours})
    for path, shape in SHAPES.items():
        if rule.startswith("della") and shape[-1] == 1:
            continue  # mergekit divides 0 by 0 there
        draws = iter([uniform(KEY, path, name, shape) for name in NAMES])

        def bernoulli(p, draws=draws):
            draw = torch.from_numpy(np.array(next(draws))).reshape(p.shape)
            return (draw < p).to(p.dtype)

        monkeypatch.setattr(torch, "bernoulli", bernoulli)
        parameters = {"weight": W, "density": ours["density"], **its}
        parameters |= {"epsilon": ours["epsilon"]} if "epsilon" in ours else {}
        tensors = [base[path], *(t[path] for t in tuned)]
        wanted = oracle(method, tensors, 0, **parameters)
        same(merged[path], wanted, path, 1.0)


def test_defaults_are_its_defaults():
    """What a recipe leaves out means there what it means here: the table of METHODS."""
    pytest.importorskip("torch")
    merge_methods = pytest.importorskip("mergekit.merge_methods")
    from jaxmerge.files.methods import IGNORED, METHODS, REQUIRED

    specs = [method.spec for method in merge_methods.registered_methods()]
    assert not {spec.name for spec in specs} - set(METHODS), "every method of mergekit's has a row"
    for spec in specs:
        method = METHODS[spec.name]
        for parameter in spec.parameters:
            if parameter.name in (*IGNORED, *method.unused):
                continue
            default = method.parameters[parameter.name][1]
            if parameter.required:
                assert default is REQUIRED, (spec.name, parameter.name)
            elif parameter.default is not None:
                assert default == parameter.default, (spec.name, parameter.name)
        scopes = {parameter.name: parameter.scope.value for parameter in spec.parameters}
        theirs = [name for name in method.parameters if name in scopes]  # ties has an option of ours beside them
        assert all((scopes[name] != "shared") == (name in method.each) for name in theirs), spec.name


def test_arcee_fusion_against_float64():
    """mergekit's float32 selects rounding noise: compare with its formula in float64, by Jaccard index."""
    base, tuned = models(1, 0.02)
    merged = run("arcee_fusion", base, tuned, "delta")
    for path, shape in SHAPES.items():
        if len(shape) < 2 or shape[-1] == 1:
            continue
        b, x = base[path].astype(np.float64), tuned[0][path].astype(np.float64)
        wanted = oracle("arcee_fusion", [b, x], 0)
        taken, its = np.asarray(merged[path]) != base[path], wanted != b
        assert (taken & its).sum() / max((taken | its).sum(), 1) >= 0.99, path


def test_divergence_against_float64():
    rng = np.random.default_rng(0)
    b = rng.standard_normal((20, 50))
    for size in (1e-4, 1e-2, 1.0):
        x = b + size * rng.standard_normal(b.shape)
        x32, b32 = np.float32(x), np.float32(b)
        log = lambda v: v - np.log(np.exp(v).sum(-1, keepdims=True))  # noqa: E731
        p, q = log(x32.astype(np.float64)), log(b32.astype(np.float64))
        wanted = (np.exp(p) * (p - q)).sum(-1, keepdims=True)
        np.testing.assert_allclose(divergence(jnp.asarray(x32), jnp.asarray(b32)), wanted, rtol=2e-3)
