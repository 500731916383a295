"""Each rule beyond the linear ones against an independent NumPy float64 formula, and the edge laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.draws import uniform

import jaxmerge
from jaxmerge import RULES
from jaxmerge.leaves import dtypes

KEY = jax.random.key(5)
NAMES = ["a", "b", "c"]
W = np.array([0.5, -0.3, 0.9])


def arrays(shape=(11, 7), count=3):
    rng = np.random.default_rng(0)
    base = rng.standard_normal(shape).astype(np.float32)
    return base, [(base + 0.3 * rng.standard_normal(shape)).astype(np.float32) for _ in range(count)]


def run(rule, models, base=None, **coefficients):
    function = RULES[rule] if isinstance(rule, str) else rule
    more = {} if base is None else {"base": {"w": jnp.asarray(base)}}
    return np.asarray(function([{"w": jnp.asarray(m)} for m in models], **more, **coefficients)["w"], np.float64)


def check(found, wanted, tol=3e-6):
    np.testing.assert_allclose(found, wanted, rtol=tol, atol=tol)


def deltas(base, models):
    return [m.astype(np.float64) - base.astype(np.float64) for m in models]


def trimmed(d, k, skip=0):
    order = np.argsort(-np.abs(d).ravel(), kind="stable")
    kept = np.zeros(d.size)
    kept[order[skip : skip + k]] = 1
    return d * kept.reshape(d.shape)


def elected(ds, w, normalize, votes=None):
    votes = [wi * d for wi, d in zip(w, ds, strict=True)] if votes is None else votes
    sign = np.where(sum(votes) >= 0, 1, -1)
    agree = [np.sign(v) == sign for v in votes]
    total = sum(m * wi * d for m, wi, d in zip(agree, w, ds, strict=True))
    count = sum(m * wi for m, wi in zip(agree, w, strict=True))
    return total / np.where(count == 0, 1, count) if normalize else total


def test_ties():
    base, models = arrays()
    kept = [trimmed(d, int(0.4 * 77)) for d in deltas(base, models)]
    check(run("ties", models, base, weights=W, density=0.4), base + elected(kept, W, True))
    check(
        run("ties", models, base, weights=W, density=0.4, normalize=False, scale=0.5),
        base + 0.5 * elected(kept, W, False),
    )
    paper = jaxmerge.delta_rule(jaxmerge.trim(0.4), None, jaxmerge.elect_sign_unweighted, normalize=True)
    check(run(paper, models, base, weights=W), base + elected(kept, W, True, votes=kept))
    found = run("ties", models, base, weights=W, density=0.4, weighted_election=False)
    check(found, base + elected(kept, W, True, votes=kept))


@pytest.mark.parametrize(("density", "gamma"), [(0.6, 0.1), (0.9, 0.3), (0.0, 0.1), (1.0, 0.5)])
def test_breadcrumbs(density, gamma):
    base, models = arrays()
    k, g = int(density * 77), int(gamma * 77)
    kept = [trimmed(d, k, min(g, 77 - k)) for d in deltas(base, models)]
    check(run("breadcrumbs", models, base, weights=W, density=density, gamma=gamma),
          base + sum(w * d for w, d in zip(W, kept, strict=True)))  # fmt: skip
    check(
        run("breadcrumbs_ties", models, base, weights=W, density=density, gamma=gamma), base + elected(kept, W, False)
    )


@pytest.mark.parametrize("how", ["inverse", "l1", None])
def test_dare_and_della(how):
    base, models = arrays()
    for rule, is_della in [("dare", False), ("dare_ties", False), ("della_linear", True), ("della", True)]:
        kept = []
        for name, d in zip(NAMES, deltas(base, models), strict=True):
            rank = np.argsort(np.argsort(np.abs(d), axis=-1), axis=-1)
            p = 0.6 - 0.2 + 2 * 0.2 * rank / 6 if is_della else np.full(d.shape, 0.6)
            masked = d * (uniform(KEY, "w", name, d.shape) < p)
            factor = {"inverse": 1 / p, "l1": np.abs(d).sum() / np.abs(masked).sum(), None: 1.0}[how]
            kept.append(masked * factor)
        more = {"epsilon": 0.2} if is_della else {}
        found = run(rule, models, base, key=KEY, names=NAMES, density=0.6, weights=W, rescale=how, **more)
        wanted = sum(w * d for w, d in zip(W, kept, strict=True))
        if rule in ("dare_ties", "della"):
            wanted = elected(kept, W, normalize=rule == "della")
        check(found, base + wanted, tol=2e-5)


def test_sce():
    base, models = arrays()
    ds = deltas(base, models)
    variance = np.var(ds, axis=0)
    chosen = trimmed(variance, int(0.3 * 77)) > 0
    kept = [d * chosen for d in ds]
    energy = np.array([np.mean(d**2) for d in kept])
    wanted = base + elected(kept, energy / energy.sum(), True, votes=kept)
    check(run("sce", models, base, select_topk=0.3), wanted)
    # Free of the deltas' scale: a thousandth of the deltas gives a thousandth of the change.
    small = [base * 0 + np.float32(1e-4) * d.astype(np.float32) for d in ds]
    check(run("sce", small, base * 0, select_topk=0.3) * 1e4, wanted - base, tol=1e-4)


def test_model_stock():
    base, models = arrays()
    ds = deltas(base, models)
    pairs = [(0, 1), (0, 2), (1, 2)]

    def go(axis):
        norm = lambda d: np.sqrt((d * d).sum(axis, keepdims=True))  # noqa: E731
        c = np.mean([(ds[i] * ds[j]).sum(axis, keepdims=True) / norm(ds[i]) / norm(ds[j]) for i, j in pairs], axis=0)
        t = 3 * c / (1 + 2 * c)
        return t * np.mean(models, axis=0) + (1 - t) * base

    check(run("model_stock", models, base), go(None), tol=1e-5)
    check(run("model_stock", models, base, filter_wise=True), go(-1), tol=1e-4)
    small = [np.float32(1e-5) * d.astype(np.float32) for d in ds]
    check(run("model_stock", small, base * 0, filter_wise=True) * 1e5, go(-1) - base, tol=1e-4)


def test_norm_aware():
    base, models = arrays()
    ds, w = deltas(base, [models[0], base + 5 * (models[1] - base), models[2]]), abs(W)
    tuned = [models[0], base + 5 * (models[1] - base), models[2]]
    c = w / [np.linalg.norm(d) for d in ds]
    wanted = sum(ci * d for ci, d in zip(c / c.sum(), ds, strict=True))
    check(run("norm_aware", tuned, base, weights=w, scale=0.5), base + 0.5 * wanted)
    check(run("norm_aware", tuned[:1], base), tuned[0])
    # A model that changed nothing has no part, where its inverse length would be all of the weight.
    check(run("norm_aware", [*tuned, base], base, weights=[*w, 1.0]), base + wanted)
    # Free of the deltas' scale, where their squares are near the end of float32's range.
    tiny = [np.float32(1e-17) * d.astype(np.float32) for d in ds]
    check(run("norm_aware", tiny, base * 0, weights=w) * 1e17, wanted, tol=1e-5)


def test_tatr():
    base, models = arrays((40, 25))
    ds = deltas(base, models)
    rng = np.random.default_rng(3)
    given = [rng.random(base.shape).astype(np.float32) for _ in models]

    def wanted(gradients, region, w):
        pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
        omega = sum(np.abs(gradients[i]) * np.abs(w[j] * ds[j]) for i, j in pairs)
        kept = omega < np.sort(omega.ravel())[int(region * omega.size)]
        assert kept.sum() == int(region * omega.size)
        return kept * sum(wi * d for wi, d in zip(w, ds, strict=True))

    for region in (0.99, 0.4):
        check(run("tatr", models, base, region=region), base + wanted(ds, region, np.ones(3)))
        found = run("tatr", models, base, region=region, weights=W, scale=0.5)
        check(found, base + 0.5 * wanted(ds, region, W))
        trees = [{"w": jnp.asarray(g)} for g in given]
        found = run("tatr", models, base, region=region, weights=W, gradients=trees)
        check(found, base + wanted(given, region, W))
    check(run("tatr", models, base, region=1.0), base + sum(ds))
    with pytest.raises(ValueError, match="gradients must be a list with one entry a model, 3; found 2 entries"):
        run("tatr", models, base, gradients=trees[:2])
    with pytest.raises(ValueError, match=r"region=1\.5, wanted a share"):
        run("tatr", models, base, region=1.5)


def test_tatr_keeps_what_disturbs_no_other_task():
    """Where fewer elements than one in a hundred were changed by several tasks, a plain quantile keeps nothing."""
    base, (one, two, _) = arrays()
    left, right = np.where(np.arange(7) < 3, one, base), np.where(np.arange(7) < 3, base, two)
    check(run("tatr", [left, right], base, region=0.5), base + sum(deltas(base, [left, right])))
    check(run("tatr", [one], base, region=0.0), one)
    broken = np.where(np.arange(7) == 2, np.nan, one)
    assert np.isnan(run("tatr", [broken, two], base, region=0.0)[:, 2]).all()


def test_tatr_masks_the_same_elements_on_a_mesh_and_in_a_jit():
    """Of so many elements, neighbours in rank are a rounding apart."""
    base, models = arrays((512, 1024), 4)
    place = jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x"))
    rule = lambda m, b: jaxmerge.tatr(m, base=b, region=0.5, scale=0.5)  # noqa: E731
    trees, start = [{"w": jnp.asarray(m)} for m in models], {"w": jnp.asarray(base)}
    one = rule(trees, start)["w"]
    for found in (jax.jit(rule)(trees, start), rule(jax.device_put(trees, place), jax.device_put(start, place))):
        assert np.array_equal(np.asarray(found["w"]) == base, np.asarray(one) == base)


def slerp(t, a, b, axis=None):
    unit = lambda v: v / np.sqrt((v * v).sum(axis, keepdims=True))  # noqa: E731
    omega = np.arccos((unit(a) * unit(b)).sum(axis, keepdims=True))
    return (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)


def test_slerp_and_nuslerp():
    base, (a, b, _) = arrays()
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    check(run("slerp", [a, b], t=0.3), slerp(0.3, a64, b64))
    check(run("slerp", [a, a], t=0.3), a)
    check(run("slerp", [a, -a], t=0.25), 0.5 * a)  # opposite: linear
    check(run("slerp", [a * 0, b], t=0.25), np.sin(np.pi / 8) * b)  # no direction: orthogonal, as in mergekit
    check(run("nuslerp", [a, b], weights=[1, 3]), slerp(0.75, a64, b64))
    da, db = deltas(base, [a, b])
    check(run("nuslerp", [a, b], base, weights=[1, 3]), base + slerp(0.75, da, db))
    check(run("nuslerp", [a, b], base, flatten=False), base + slerp(0.5, da, db, -1), tol=1e-5)
    check(run("nuslerp", [a, b], base, flatten=False, row_wise=True), base + slerp(0.5, da, db, 0), tol=1e-5)


def test_multislerp_and_karcher():
    base, models = arrays()
    ds, w = deltas(base, models), np.array([0.2, 0.3, 0.5])
    norms = [np.linalg.norm(d) for d in ds]
    units = [d / n for d, n in zip(ds, norms, strict=True)]
    m = sum(w[i] * u for i, u in enumerate(units))
    m /= np.linalg.norm(m)
    v = sum(w[i] * (u - (u * m).sum() * m) for i, u in enumerate(units))
    size = np.linalg.norm(v)
    wanted = (m * np.cos(size) + v * np.sin(size) / size) * (w @ norms)
    check(run("multislerp", models, base, weights=w), base + wanted, tol=1e-5)
    opposite = run("multislerp", [models[0], -models[0]], weights=1.0)
    check(opposite, models[0] * 0)  # balanced directions: the linear mean, no NaN
    mean = run("karcher", models)
    # At the Karcher mean the tangents cancel, and its length is the mean length.
    check(np.linalg.norm(mean), np.mean([np.linalg.norm(x) for x in models]), tol=1e-5)
    point = mean / np.linalg.norm(mean)
    tangents = []
    for x in models:
        u = x.astype(np.float64) / np.linalg.norm(x)
        cosine = (point * u).sum()
        tangents.append(np.arccos(cosine) / np.sqrt(1 - cosine**2) * (u - cosine * point))
    assert np.linalg.norm(sum(tangents)) < 1e-4
    check(run("karcher", [models[0], models[0] * 0]), models[0] / 2)  # zero: counted in the length alone


def test_nearswap_ram_and_passthrough():
    base, models = arrays()
    (d, *_) = ds = deltas(base, models)
    check(run("nearswap", models[:1], base, t=0.1), base + np.clip(0.1 / np.maximum(np.abs(d), 1e-6), 0, 1) * d)
    changed = np.abs(ds) > 0.2
    count = changed.sum(0)
    mean = (np.array(ds) * changed).sum(0) / np.maximum(count, 1)
    check(run("ram", models, base, epsilon=0.2), base + mean)
    boosted = np.zeros_like(base, np.float64)
    for delta, mine in zip(ds, changed, strict=True):
        shared, unique = (mine & (count > 1)).sum(), (mine & (count == 1)).sum()
        boost = 1 + 0.5 * np.clip(shared / unique, 0, 0.4)
        boosted += np.where(mine, delta * np.where(count > 1, 1 / np.maximum(count, 1), boost), 0)
    check(run("ramplus_tl", models, base, epsilon=0.2, r=0.5, alpha=0.4), base + boosted)
    check(run("passthrough", models[:1], scale=0.5), 0.5 * models[0])


def test_arcee_fusion():
    base, (x, *_) = arrays((40, 60))
    b64, x64 = base.astype(np.float64), x.astype(np.float64)
    log = lambda v: v - np.log(np.exp(v).sum(-1, keepdims=True))  # noqa: E731
    kl = (np.exp(log(x64)) * (log(x64) - log(b64))).sum(-1, keepdims=True)
    importance = np.sort((np.abs(x64 - b64) * kl).ravel())
    first, median, third = (importance[int(q * (importance.size - 1))] for q in (0.25, 0.5, 0.75))
    taken = np.abs(x64 - b64) * kl >= median + 1.5 * (third - first)
    found = run("arcee_fusion", [x], base) != base
    assert (found & taken).sum() / (found | taken).sum() >= 0.99


def test_fisher_regmean_and_grafting():
    base, models = arrays()
    rng = np.random.default_rng(1)
    fishers = [rng.random(base.shape).astype(np.float32) for _ in models]
    wanted = sum(w * f * m for w, f, m in zip(abs(W), fishers, models, strict=True))
    wanted = wanted / sum(w * f for w, f in zip(abs(W), fishers, strict=True))
    trees = [{"w": jnp.asarray(f)} for f in fishers]
    check(run("fisher", models, fishers=trees, weights=abs(W), floor=0.0), wanted)
    check(run("fisher", models, fishers=[{"w": jnp.zeros_like(t["w"])} for t in trees]), np.mean(models, axis=0))
    with pytest.raises(ValueError, match="fishers must be a list with one entry a model, 3; found 2 entries"):
        run("fisher", models, fishers=trees[:2])
    with pytest.raises(ValueError, match=r"leaf 'w' of statistics\[1\] has shape"):
        run("fisher", models, fishers=[trees[0], {"w": jnp.ones(3)}, trees[2]])

    inputs = rng.standard_normal((3, 50, 7))
    grams = [{"w": jnp.asarray(x.T @ x, jnp.float32)} for x in inputs]
    damped = [0.9 * x.T @ x + 0.1 * np.diag(np.diag(x.T @ x)) for x in inputs]
    wanted = sum(m @ g for m, g in zip(models, damped, strict=True)) @ np.linalg.inv(sum(damped))
    check(run("regmean", models, grams=grams), wanted, tol=1e-4)
    with pytest.raises(ValueError, match=r"grams\[1\] of leaf 'w' has shape \(2, 2\), wanted \(7, 7\)"):
        run("regmean", models, grams=[grams[0], {"w": jnp.ones((2, 2))}, grams[2]])
    with pytest.raises(ValueError, match="grams name 'x', which is no leaf"):
        run("regmean", models, grams=[{"x": jnp.ones((7, 7))}] * 3)

    with pytest.raises(ValueError, match="no pattern of damping matches leaf 'w'"):
        run("regmean", models, grams=[{}] * 3, damping={"mlp": 0.3})
    with pytest.raises(ValueError, match=r"has shape \(7, 7\), wanted a 2-D leaf, not stacked"):
        run("regmean", models, grams=grams, stacked=("w",))

    mask = {"w": jnp.asarray(fishers[0])}
    check(run("grafting", models[:1], base, mask=mask), base + fishers[0] * deltas(base, models)[0])
    start = jaxmerge.graft_mask({"w": jnp.asarray(models[0])}, {"w": jnp.asarray(base)}, density=0.25)["w"]
    assert np.array_equal(start, trimmed(deltas(base, models)[0], 19) != 0)


def test_regmean_goes_by_the_engine():
    """Dtypes of the caller, host memory and sharding: for leaves with a Gram matrix and without."""
    _, models = arrays((8, 4))
    trees = [{"w": jnp.asarray(m), "v": jnp.asarray(m)} for m in models]
    gram = [{"w": jnp.asarray(m.T @ m)} for m in models]
    wanted = jaxmerge.regmean(trees, grams=gram)
    with pytest.raises(ValueError, match="damping: the pattern 'w' decides for no leaf"):
        jaxmerge.regmean(trees, grams=gram, damping={"**": 0.1, "w": 0.3})
    with dtypes(out=jnp.bfloat16):
        merged = jaxmerge.regmean(trees, grams=gram)
    assert {leaf.dtype.name for leaf in merged.values()} == {"bfloat16"}
    place = jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x"))
    if "pinned_host" in {memory.kind for memory in jax.devices()[0].addressable_memories()}:
        merged = jaxmerge.regmean(jax.device_put(trees, place.with_memory_kind("pinned_host")), grams=gram)
        for path, leaf in merged.items():
            assert leaf.sharding.is_equivalent_to(place, 2), path
            assert leaf.sharding.memory_kind == "device"
            check(leaf, wanted[path], tol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
@pytest.mark.parametrize("rule", sorted(set(RULES) - {"regmean", "dare_linear"}))
def test_empty_leaves(rule, shape):
    needs, size = RULES[rule].needs, jnp.zeros(shape)
    more = {
        "extrapolate": {"alpha": 0.5}, "extrapolation_merge": {"alphas": 0.5}, "nearswap": {"t": 0.5},
        "fisher": {"fishers": [{"w": size, "v": jnp.ones(2)}] * 2}, "grafting": {"mask": {"w": size, "v": jnp.ones(2)}},
    }.get(rule, {})  # fmt: skip
    more |= {} if needs.base == "none" else {"base": {"w": size, "v": jnp.zeros(2)}}
    more |= {} if needs.key == "none" else {"key": KEY}
    more |= {"density": 0.5} if rule in DELTA[:-1] else {}
    models = [{"w": size, "v": jnp.ones(2)}] * (needs.most or 2)
    assert RULES[rule](models, **more)["w"].shape == shape


DELTA = ["ties", "dare", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce"]


@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (3, 4)])
@pytest.mark.parametrize("rule", DELTA)
def test_edges_of_the_delta_family(rule, shape):
    base, models = arrays(shape)
    more = {"key": KEY, "names": NAMES} if RULES[rule].needs.key != "none" else {}
    share = "select_topk" if rule == "sce" else "density"
    full = run(rule, models, base, **{share: 1.0}, **more)
    elects = rule in ("ties", "dare_ties", "della", "breadcrumbs_ties")
    consensus = jaxmerge.elect_sign if elects else jaxmerge.weighted_sum
    consensus = jaxmerge.elect_sign_by_energy if rule == "sce" else consensus
    dense = jaxmerge.delta_rule(None, None, consensus, normalize=rule in ("ties", "della", "sce"))
    check(full, run(dense, models, base))  # density 1 keeps everything
    check(run(rule, models, base, **{share: 0.0}, **more), base)  # density 0 nothing
    half = run(rule, models, base, **{share: 0.5}, **more)
    assert np.isfinite(half).all()
    assert np.array_equal(run(rule, [base] * 3, base, **{share: 0.5}, **more), base)  # zero deltas


# The others choose elements, and the broken one need not be among the chosen.
TAKE_ALL = [r for r in RULES if r not in ("regmean", "arcee_fusion", "sce") and RULES[r].needs.key == "none"]


@pytest.mark.parametrize("rule", TAKE_ALL)
def test_nan_and_infinity_stay_visible(rule):
    """A rule hides no NaN: what came in broken goes out broken, for `check_finite` to name."""
    coefficients = {
        "extrapolate": {"alpha": 0.5}, "extrapolation_merge": {"alphas": 0.5}, "nearswap": {"t": 0.5},
        "ties": {"density": 0.5}, "breadcrumbs": {"density": 1.0}, "breadcrumbs_ties": {"density": 1.0},
    }.get(rule, {})  # fmt: skip
    base, models = arrays()
    count = RULES[rule].needs.most or 3
    models = models[:count]
    models[0][2, 3] = np.nan
    if rule == "fisher":
        coefficients = {"fishers": [{"w": jnp.ones_like(m)} for m in models]}
    if rule == "grafting":
        coefficients = {"mask": {"w": jnp.ones_like(models[0])}}
    found = run(rule, models, base if RULES[rule].needs.base == "required" else None, **coefficients)
    assert not np.isfinite(found[2, 3])


def test_a_rule_nobody_named_yet():
    base, models = arrays()
    rule = jaxmerge.delta_rule(jaxmerge.trim(0.2), "l1", jaxmerge.elect_sign, name="mine")
    kept = [trimmed(d, int(0.2 * 77)) for d in deltas(base, models)]
    kept = [k * np.abs(d).sum() / np.abs(k).sum() for k, d in zip(kept, deltas(base, models), strict=True)]
    check(run(rule, models, base, weights=W), base + elected(kept, W, False), tol=1e-5)
    assert str(rule.needs) == "≥1 models, base"
    with pytest.raises(
        TypeError, match=r"mine\(\) has no coefficient 'densty'; did you mean 'density'\? it takes density"
    ):
        run(rule, models, base, densty=0.2)
    with pytest.raises(TypeError, match=r"ties\(\) needs density="):
        run("ties", models, base)
    with pytest.raises(ValueError, match="rescale='inverse' divides by a keep probability"):
        jaxmerge.delta_rule(jaxmerge.trim(0.2), "inverse")
    with pytest.raises(ValueError, match="compat='mergkit', wanted None or 'mergekit'"):
        run("sce", models, base, compat="mergkit")
