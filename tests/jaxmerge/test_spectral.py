"""Rules past mergekit against formulas in float64: singular values and vectors, and choices element by element."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.goldens import make_spectral

import jaxmerge
from jaxmerge import RULES

SHAPES = [(12, 7), (7, 12), (6, 6)]
W = [0.7, 1.2, 0.5]
SPECTRAL = ["tsvm", "iso_c", "iso_cts", "wudi", "svc", "opcm"]


def models(shape=(12, 7), count=3, rank=None):
    rng = np.random.default_rng(1)
    base = rng.standard_normal(shape).astype(np.float32)
    if rank is None:
        changes = [0.3 * rng.standard_normal(shape) for _ in range(count)]
    else:
        changes = [rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1])) for _ in range(count)]
    return base, [(base + change).astype(np.float32) for change in changes]


def run(rule, base, tuned, **coefficients):
    found = RULES[rule]([{"w": jnp.asarray(m)} for m in tuned], base={"w": jnp.asarray(base)}, **coefficients)
    return np.asarray(found["w"], np.float64)


def deltas(base, tuned, weights=None):
    weights = [1.0] * len(tuned) if weights is None else weights
    return [w * (m.astype(np.float64) - base.astype(np.float64)) for w, m in zip(weights, tuned, strict=True)]


def svd(matrix):
    return np.linalg.svd(matrix, full_matrices=False)


def nearest(matrix):
    u, _, v = svd(matrix)
    return u @ v


def tsvm(ds):
    k = max(1, min(ds[0].shape) // len(ds))
    parts = [svd(d) for d in ds]
    u = nearest(np.hstack([p[0][:, :k] for p in parts]))
    v = nearest(np.vstack([p[2][:k] for p in parts]))
    return u @ np.diag(np.concatenate([p[1][:k] for p in parts])) @ v


def iso_c(ds):
    u, s, v = svd(sum(ds))
    return s.mean() * u @ v


def iso_cts(ds, common=0.8):
    r = min(ds[0].shape)
    own = round((r - int(r * common)) / len(ds))
    u, s, v = (x[..., : r - own * len(ds)] if i < 2 else x[: r - own * len(ds)] for i, x in enumerate(svd(sum(ds))))
    rest = [svd(d - u @ (u.T @ d)) for d in ds]
    left = nearest(np.hstack([*(p[0][:, :own] for p in rest), u]))
    right = nearest(np.vstack([*(p[2][:own] for p in rest), v]))
    return np.concatenate([*(p[1][:own] for p in rest), s]).mean() * left @ right


def interference(tau, ds):
    return sum(np.sum(((tau - d) @ d.T) ** 2) / np.sum(d * d) for d in ds)


def wudi(ds):
    """The minimiser nearest to the sum, by least squares on the objective itself."""
    stacked = np.hstack([d.T / np.linalg.norm(d) for d in ds])
    wanted = np.hstack([(d - sum(ds)) @ d.T / np.linalg.norm(d) for d in ds])
    return sum(ds) + np.linalg.lstsq(stacked.T, wanted.T, rcond=1e-9)[0].T


def svc(ds, alpha=1.0):
    u, s, _ = svd(sum(ds))
    total = np.zeros_like(ds[0])
    for k in range(len(s)):
        a = u[:, k] @ sum(ds)
        ratios = [max(alpha, a @ (u[:, k] @ d) / np.sum((u[:, k] @ d) ** 2)) for d in ds]
        total += len(ds) / sum(ratios) * np.outer(u[:, k], a)
    return total


def opcm(ds, alpha=0.5):
    merged, length = ds[0], 1.0
    for t in range(1, len(ds)):
        u, s, v = np.linalg.svd(merged)  # whole: the paper's bases of the complements too
        lead = int(np.sum(np.cumsum(s) <= alpha * s.sum()))
        inner = u.T @ ds[t] @ v.T
        inner[:lead, :lead] = 0
        np.fill_diagonal(inner, 0)
        merged = length * merged + u @ inner @ v
        length = np.linalg.norm(merged) / np.mean([np.linalg.norm(d) for d in ds[: t + 1]])
        merged = merged / length
    return merged


FORMULAS = {"tsvm": tsvm, "iso_c": iso_c, "iso_cts": iso_cts, "wudi": wudi, "svc": svc, "opcm": opcm}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", SPECTRAL)
def test_a_matrix_is_its_formula(rule, shape):
    base, tuned = models(shape)
    change = FORMULAS[rule](deltas(base, tuned, W))
    tolerance = 2e-3 if rule == "wudi" and shape == (6, 6) else 2e-4
    np.testing.assert_allclose(run(rule, base, tuned, weights=W, scale=0.8), base + 0.8 * change, atol=tolerance)


@pytest.mark.parametrize("rule", SPECTRAL)
def test_what_is_no_matrix_takes_the_mean(rule):
    base, tuned = models((9,))
    np.testing.assert_allclose(run(rule, base, tuned), base + np.mean(deltas(base, tuned), axis=0), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_wudi_has_the_least_interference(shape):
    base, tuned = models(shape)
    ds = deltas(base, tuned)
    least = interference(run("wudi", base, tuned) - base, ds)
    assert least <= interference(wudi(ds), ds) * (1 + 1e-3) + 1e-6
    for other in (sum(ds), np.mean(ds, axis=0), tsvm(ds), np.zeros_like(ds[0])):
        assert least <= interference(other, ds) + 1e-6


def test_one_model_is_itself_where_the_rule_keeps_all_of_it():
    base, (tuned,) = models(count=1)
    for rule in ("tsvm", "wudi", "svc", "opcm"):
        np.testing.assert_allclose(run(rule, base, [tuned]), tuned, atol=2e-5)


def test_the_same_change_in_every_model_is_one_change_to_svc_and_orthogonal_ones_are_summed():
    base, (tuned,) = models(count=1)
    np.testing.assert_allclose(run("svc", base, [tuned] * 4), tuned, atol=2e-5)
    change = np.zeros((2, 4, 6), np.float32)
    change[0, 0, 1], change[1, 2, 3] = 2.0, 3.0
    for rule in ("svc", "tsvm", "wudi"):
        zero = np.zeros((4, 6), np.float32)
        np.testing.assert_allclose(run(rule, zero, list(change)), change.sum(0), atol=2e-5)


def test_directions_of_rounding_noise_stay_where_they_are():
    """Of the sum of low-rank changes Iso-C lifts those it has alone."""
    base, tuned = models((40, 30), count=2, rank=3)
    found = run("iso_c", base, tuned) - base
    values = np.linalg.svd(found)[1]
    np.testing.assert_allclose(values[:6], values[0], rtol=1e-3)
    assert values[6] < 1e-3 * values[0]
    mean = np.linalg.svd(sum(deltas(base, tuned)))[1][:6].mean()
    np.testing.assert_allclose(values[0], mean, rtol=1e-3)
    lifted = np.linalg.svd(run("iso_c", base, tuned, tolerance=0.0) - base)[1]
    assert lifted[29] > 0.9 * lifted[0]  # the paper's rule lifts all thirty


@pytest.mark.parametrize("rule", SPECTRAL)
def test_the_gradient_is_that_of_differences_where_singular_values_differ(rule):
    base, tuned = models((5, 4))

    def loss(weights):
        merged = RULES[rule]([{"w": jnp.asarray(m)} for m in tuned], base={"w": jnp.asarray(base)}, weights=weights)
        return jnp.sum(jnp.sin(jnp.arange(20.0)).reshape(5, 4) * merged["w"])

    w = jnp.asarray(W)
    gradient = np.asarray(jax.grad(loss)(w), np.float64)
    step = 2e-3
    for i in range(3):
        moved = [float(loss(w.at[i].add(sign * step))) for sign in (1, -1)]
        np.testing.assert_allclose(gradient[i], (moved[0] - moved[1]) / (2 * step), rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize("rule", [*(rule for rule in SPECTRAL if rule != "wudi"), "magmax", "consensus_ta"])
def test_a_rule_is_what_fusion_bench_makes(rule):
    """Its WUDI stops far from the minimum: what is compared there is the objective, above."""
    base, changes = make_spectral.inputs()
    wanted = np.load(pathlib.Path(make_spectral.__file__).with_name("spectral.npz"))[rule]
    found = run(rule, base, [base + change for change in changes], scale=0.5 if rule == "magmax" else 1.0)
    np.testing.assert_allclose(found - base, wanted, atol=1e-5)


def test_magmax_and_consensus():
    base, tuned = models()
    ds = np.array(deltas(base, tuned, W))
    chosen = np.take_along_axis(ds, np.abs(ds).argmax(0)[None], 0)[0]
    np.testing.assert_allclose(run("magmax", base, tuned, weights=W, scale=0.5), base + 0.5 * chosen, atol=1e-6)
    total = ds.sum(0)
    for share, least in ((0.4, 2), (0.7, 1), (0.2, 3)):
        kept = (np.abs(ds) > share * np.abs(total - ds)).sum(0) >= least
        found = run("consensus_ta", base, tuned, weights=W, share=share, least=least)
        np.testing.assert_allclose(found, base + kept * total, atol=1e-6)
        assert 0 < kept.sum() < kept.size


def test_the_order_of_models_matters_to_opcm_alone():
    base, tuned = models()
    for rule in SPECTRAL:
        swapped = np.abs(run(rule, base, tuned) - run(rule, base, tuned[::-1])).max()
        assert (swapped > 1e-2) == (rule == "opcm")
        assert RULES[rule].needs.symmetric == (rule != "opcm")


def test_a_share_that_is_none_is_refused():
    base, tuned = models()
    with pytest.raises(ValueError, match=r"iso_cts: common is 1\.5, wanted a share"):
        run("iso_cts", base, tuned, common=1.5)
    assert jaxmerge.tsvm is RULES["tsvm"]
