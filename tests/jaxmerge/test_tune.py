"""Coefficient search: planted optima, resumption, one compilation, the guard, ExMe's identities."""

import doctest
import functools
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT
from helpers.searches import BASE, EXPO, MERGE, ONE, PATHS, PLANTED, SPACE, TWO, distance, formula, near, run

import jaxmerge
from jaxmerge import exme, strategies, tune
from jaxmerge.exme import exme_merge, exme_space, search_exme, staged
from jaxmerge.strategies import Float, Space, cma_es, coordinate, frank_wolfe, golden, gradient, grid, listed
from jaxmerge.tune import Compiled, Search, descend, judge_line, monotone, search_merge

COUNTS = {
    "grid": (functools.partial(grid, points=5), 125, 0.0),
    "coordinate": (functools.partial(coordinate, points=5, rounds=4), 46, 0.1),
    "golden": (functools.partial(golden, tolerance=0.01, rounds=4), 180, 0.02),
    "staged": (functools.partial(staged, along=functools.partial(golden, tolerance=0.01)), 50, 1.0),
    "cma_es": (functools.partial(cma_es, generations=40, seed=3), 280, 0.05),
}


@pytest.mark.parametrize("name", [name for name in COUNTS if name != "staged"])
def test_every_strategy_finds_a_planted_optimum(name):
    if name == "cma_es":
        pytest.importorskip("cmaes")
    strategy, most, error = COUNTS[name]
    target = MERGE(**PLANTED)
    result = search_merge(MERGE, near(target), SPACE, strategy=strategy)
    assert result.evaluations <= most
    assert result.evaluations == len(result.trials)
    assert result.score == max(trial["score"] for trial in result.trials)
    # β(1+α_1) and (1−β)(1+α_2) fix the model, three coefficients do not: a valley of equal optima.
    shares = [(c["beta"] * (1 + c["alpha_1"]), (1 - c["beta"]) * (1 + c["alpha_2"])) for c in (result.best, PLANTED)]
    assert shares[0] == pytest.approx(shares[1], abs=error)


def test_one_coefficient_by_golden_section():
    result = search_merge(EXPO, near(EXPO(alpha=0.37)), {"alpha": (-0.5, 1.5)}, strategy="golden")
    assert result.best["alpha"] == pytest.approx(0.37, abs=0.05)
    assert result.evaluations <= 11


def test_gradient_finds_a_planted_optimum():
    target = MERGE(**PLANTED)
    space = {"alpha_1": (-0.5, 1.5), "beta": (0.0, 1.0)}
    merge = lambda alpha_1, beta: MERGE(alpha_1=alpha_1, alpha_2=0.0, beta=beta)  # noqa: E731
    result = descend(merge, lambda params: distance(params, target), space)
    assert result.best["alpha_1"] == pytest.approx(0.5, abs=0.01)
    assert result.best["beta"] == pytest.approx(0.25, abs=0.01)
    assert result.score > -1e-4


def test_gradient_finds_an_alpha_a_layer():
    wanted = [0.9, -0.2, 0.4]
    target = EXPO(alpha=wanted)
    result = descend(EXPO, lambda p: distance(p, target), {"alpha": Float(-0.5, 1.5, size=3)})
    assert result.best["alpha"] == pytest.approx(wanted, abs=0.01)
    assert len(result.trials[0]["gradient"]["alpha"]) == 3


def quadratic(matrix, target):
    """A merge that gives its weights, and a loss of them, convex."""
    merge = lambda a, b, c: {"w": jnp.stack([a, b, c])}  # noqa: E731
    return merge, lambda params: jnp.sum(jnp.square(matrix @ (params["w"] - jnp.asarray(target)))) / 2


def test_frank_wolfe_finds_the_best_mix_and_bounds_what_is_left():
    space = dict.fromkeys("abc", Float(0.0, 1.0, start=0.5))
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3)), jnp.float32)
    merge, loss = quadratic(matrix, [0.2, 0.5, 0.1])  # a mix inside
    result = descend(merge, loss, space, strategy=functools.partial(frank_wolfe, steps=200))
    for trial in result.trials:
        assert sum(trial["coefficients"].values()) <= 1 + 1e-6
    bound = float(re.search("no mix gains more than (.*)", result.notes[-1])[1])
    assert -result.score <= bound <= 0.05  # the best there is scores 0
    assert -result.score < 0.01 * -result.trials[0]["score"]
    # Of three models of which one is best alone, and of three that only hurt, the search ends at a corner.
    for target, wanted in (([0.0, 3.0, 0.0], [0, 1, 0]), ([-1.0, -1.0, -1.0], [0, 0, 0])):
        merge, loss = quadratic(jnp.eye(3), target)
        result = descend(merge, loss, space, strategy="frank_wolfe")
        assert list(result.best.values()) == pytest.approx(wanted, abs=1e-6)
        assert result.evaluations == 2
        assert result.notes == ["frank_wolfe: if the score is concave in the weights, no mix gains more than 0"]


def test_frank_wolfe_mixes_each_entry_of_lists_over_depth():
    target = EXPO(alpha=[0.9, 0.0, 0.3])
    strategy = functools.partial(frank_wolfe, steps=100)
    result = descend(EXPO, lambda p: distance(p, target), {"alpha": Float(0.0, 1.0, size=3)}, strategy=strategy)
    assert result.best["alpha"] == pytest.approx([0.9, 0.0, 0.3], abs=0.02)
    assert sum(result.best["alpha"]) > 1
    with pytest.raises(ValueError, match="'frank_wolfe': a trial without gradient; wanted descend"):
        search_merge(EXPO, near(ONE), {"alpha": (0.0, 1.0)}, strategy="frank_wolfe")


def test_gradient_agrees_with_differences_and_stays_in_bounds():
    target = EXPO(alpha=2.0)
    loss = lambda params: distance(params, target)  # noqa: E731
    result = descend(EXPO, loss, {"alpha": (-0.5, 1.0)})
    assert result.best["alpha"] == pytest.approx(1.0)
    assert all(-0.5 <= trial["coefficients"]["alpha"] <= 1.0 for trial in result.trials)
    first = result.trials[0]
    at, h = first["coefficients"]["alpha"], 1e-2
    numeric = -(loss(EXPO(alpha=at + h)) - loss(EXPO(alpha=at - h))) / (2 * h)
    assert first["gradient"]["alpha"] == pytest.approx(float(numeric), rel=1e-3)


@pytest.mark.parametrize("name", COUNTS)
def test_resuming_from_any_prefix_continues_identically(name):
    if name == "cma_es":
        pytest.importorskip("cmaes")
    strategy = functools.partial(cma_es, generations=4) if name == "cma_es" else COUNTS[name][0]
    safe = [{"alpha_1": 0.0, "alpha_2": 0.0, "beta": 0.5}]
    whole = run(Search(SPACE, strategy, safe=safe))
    assert [trial["number"] for trial in whole.trials] == list(range(len(whole.trials)))
    for cut in {0, 1, 2, len(whole.trials) // 2, len(whole.trials) - 1, len(whole.trials)}:
        journal = json.loads(json.dumps(whole.trials[:cut]))
        assert run(Search(SPACE, strategy, safe=safe, trials=journal)) == whole


def test_a_gradient_search_resumes_without_measuring_again():
    loss = lambda params: distance(params, EXPO(alpha=0.3))  # noqa: E731
    strategy = functools.partial(gradient, steps=6)
    whole = descend(EXPO, loss, {"alpha": (0.0, 1.0)}, strategy=strategy)
    told = []
    again = descend(
        EXPO, loss, {"alpha": (0.0, 1.0)}, strategy=strategy,
        trials=json.loads(json.dumps(whole.trials[:4])), on_trial=told.append,
    )  # fmt: skip
    strip = lambda trials: [{k: v for k, v in t.items() if k != "seconds"} for t in trials]  # noqa: E731
    assert strip(again.trials) == strip(whole.trials)
    assert again.trials[4:] == told


def test_a_finished_search_measures_and_compiles_nothing():
    whole = search_merge(EXPO, near(ONE), {"alpha": (-0.5, 1.5)}, strategy="golden")

    def never(*_, **__):
        raise AssertionError

    again = search_merge(never, never, {"alpha": (-0.5, 1.5)}, strategy="golden", trials=whole.trials, on_trial=never)
    assert again == whole


def test_a_journal_of_another_search_is_refused():
    trials = run(Search(SPACE, "golden")).trials
    with pytest.raises(ValueError, match=r"trial 1 of the journal .* this search asks for .*begin a new journal"):
        Search(SPACE, "coordinate", trials=trials)
    once = functools.partial(listed, points=[(0.0, 0.0, 0.5)])
    with pytest.raises(ValueError, match="this search was over before"):
        Search(SPACE, once, trials=[*run(Search(SPACE, once)).trials, trials[1]])


class Compiles:
    count = 0


@jax.monitoring.register_event_duration_secs_listener
def _count(name, seconds, **_):
    Compiles.count += name == "/jax/core/compile/backend_compile_duration"


def test_one_trace_and_one_compilation_for_all_candidates():
    traces = 0

    def merge(**coefficients):
        nonlocal traces
        traces += 1
        return MERGE(**coefficients)

    target, seen = TWO, []

    def evaluate(params):
        seen.append(Compiles.count)
        return -float(np.square(np.asarray(params[PATHS[0]]) - np.asarray(target[PATHS[0]])).sum())

    before = Compiles.count
    result = search_merge(merge, evaluate, SPACE, strategy="grid")
    assert traces == 1
    assert result.evaluations == 125
    assert seen[0] - before == 1
    assert seen[-1] == seen[0]


def test_models_are_arguments_of_the_program_and_candidates_are_let_go():
    shape = (257, 3)
    big, base = jnp.ones(shape), jnp.zeros(shape)
    program = Compiled(lambda alpha: {"w": big + alpha * (big - base)}, {"alpha": (0.0, 1.0)})
    alive = []

    def evaluate(params):
        alive.append(sum(array.shape == shape for array in jax.live_arrays()))
        return -float(params["w"][0, 0])

    search_merge(program, evaluate, {"alpha": (0.0, 1.0)}, strategy="grid")
    assert set(alive) == {3}  # two models and one candidate
    assert [array.shape for array in program._held] == [shape, shape]


def test_the_program_is_the_rule():
    program = Compiled(MERGE, SPACE)
    for candidate in (PLANTED, {"alpha_1": -0.3, "alpha_2": 1.2, "beta": 1.0}):
        wanted, found = MERGE(**candidate), program(**candidate)
        assert all(np.allclose(found[p], wanted[p], rtol=1e-6, atol=1e-6) for p in PATHS)


def test_shardings_and_dtypes_are_kept():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.NamedSharding(mesh, jax.P("x"))
    one, two, base = (jax.device_put(jaxmerge.cast(t, jnp.bfloat16), place) for t in (ONE, TWO, BASE))
    merge = exme_merge([one, two], base)
    found = Compiled(merge, SPACE)(**PLANTED)
    wanted = MERGE(**PLANTED)
    for p in PATHS:
        assert found[p].dtype == jnp.bfloat16
        assert found[p].sharding.is_equivalent_to(place, 2)
        assert np.allclose(found[p].astype(jnp.float32), wanted[p], atol=0.05)
    target = merge(**PLANTED)
    result = search_merge(merge, near(target), SPACE, strategy="grid")
    assert result.score == 0.0
    loss = lambda params: distance(params, target)  # noqa: E731
    assert descend(merge, loss, SPACE).score > -1e-4
    assert result.trials == [t | {"seconds": s["seconds"]} for t, s in zip(
        search_merge(Compiled(merge, SPACE), near(target), SPACE, strategy="grid").trials, result.trials, strict=True
    )]  # fmt: skip


def test_leaves_that_are_no_arrays_are_handed_through():
    model = {"w": jnp.ones(3), "activation": jax.nn.relu, "name": "mlp", "steps": jnp.arange(2)}
    made = Compiled(lambda t: jaxmerge.interpolate([model, model], t=t), {"t": (0.0, 1.0)})(t=0.5)
    assert made["activation"] is jax.nn.relu
    assert made["name"] == "mlp"
    assert made["steps"].dtype == model["steps"].dtype


@pytest.mark.parametrize("name", COUNTS)
def test_bounds_hold_and_nothing_is_asked_twice(name):
    if name == "cma_es":
        pytest.importorskip("cmaes")
    space = Space(SPACE)
    for score in (formula, lambda c: c["alpha_1"] + c["beta"], lambda c: -c["alpha_2"]):
        result = run(Search(SPACE, COUNTS[name][0]), score)
        points = [space.flatten(trial["coefficients"]) for trial in result.trials]
        assert len(points) == len(set(points))
        one_hot = {(a, b, e) for a, b, e in points if name == "staged" and e in (0.0, 1.0)}
        assert all(space.contains(point) for point in set(points) - one_hot)


@pytest.mark.parametrize("strategy", ["grid", "coordinate", "golden"])
def test_ties_go_to_the_smaller_change(strategy):
    result = run(Search({"alpha": (-0.5, 1.5), "beta": Float(0, 1, start=0.5)}, strategy), lambda c: 0.25)
    assert result.best == {"alpha": 0.0, "beta": 0.5}
    plateau = run(Search({"alpha": (0.0, 1.0)}, strategy), lambda c: float(c["alpha"] > 0.2))
    assert plateau.best["alpha"] < 0.3


def test_the_guard_refuses_what_hurts():
    safe = [{"alpha": 0.0}]
    hurts = search_merge(EXPO, near(ONE), {"alpha": (0.2, 1.0)}, strategy="grid", safe=safe)
    assert hurts.best == {"alpha": 0.0}
    assert hurts.trials[0]["kind"] == "safe"
    assert re.search(r"not chosen: .*'alpha': 0.2.* hurts, score -0\.\d+ against -?0 of the safe", hurts.notes[0])
    flat = search_merge(EXPO, lambda params: 0.5, {"alpha": (0.2, 1.0)}, strategy="grid", safe=safe)
    assert flat.best == {"alpha": 0.0}
    assert "gains nothing" in flat.notes[0]
    helps = search_merge(EXPO, near(EXPO(alpha=0.6)), {"alpha": (0.2, 1.0)}, strategy="grid", safe=safe)
    assert helps.best["alpha"] == pytest.approx(0.6)
    assert not helps.notes


def test_what_cannot_be_judged_is_never_chosen():
    scores = iter([None, math.nan, -7.0, math.inf, None])
    result = run(Search({"alpha": (0.0, 1.0)}, "grid"), lambda c: next(scores))
    assert result.score == -7.0
    assert [trial["score"] for trial in result.trials] == [None, None, -7.0, None, None]
    assert "4 of 5 candidates could not be judged" in result.notes[0]
    with pytest.raises(ValueError, match="none of 5 candidates has a score"):
        run(Search({"alpha": (0.0, 1.0)}, "grid"), lambda c: None)
    partial = lambda c: None if c["alpha"] > 0.6 else c["alpha"]  # noqa: E731
    assert run(Search({"alpha": (0.0, 1.0)}, "golden"), partial).best["alpha"] == pytest.approx(0.6, abs=0.06)


def test_monotone_counts_every_fall_not_neighbours_alone():
    points = [0, 0.5, 1]
    assert judge_line(points, [0.1, 0.2, 0.2]).holds
    falls = judge_line(points, [0.3, 0.2, 0.4])
    assert not falls.holds
    assert "falls from 0.3 at 0 to 0.2 at 0.5" in falls.note
    assert "is monotone" in judge_line(points, [0.1, 0.2, 0.2]).note
    within = judge_line(points, [0.30, 0.29, 0.28], tolerance=0.02)
    assert within.holds
    assert "falls by 0.02 at most" in within.note
    assert not judge_line(points, [0.30, 0.285, 0.27], tolerance=0.02).holds  # each step is within, the sum is not
    assert not judge_line(points, [0.1, -math.inf, 0.2]).holds


def test_monotone_takes_its_tolerance_from_the_number_of_questions():
    p, q, n = 0.5, 0.4, 100
    shrunk = [(n * x + 1) / (n + 2) for x in (p, q)]
    epsilon = 1.64 * math.sqrt(sum(x * (1 - x) for x in shrunk) / n)
    assert p - q < epsilon
    assert judge_line([0, 1], [p, q], questions=n).holds
    assert not judge_line([0, 1], [p, q], questions=1000).holds
    with pytest.raises(ValueError, match=r"scores \[-2.3, -2.1\] with questions=64; wanted accuracies"):
        judge_line([0, 1], [-2.3, -2.1], questions=64)


def test_monotone_shares_the_program_of_the_search():
    traces = 0

    def merge(alpha):
        nonlocal traces
        traces += 1
        return EXPO(alpha=alpha)

    program, told = Compiled(merge, {"alpha": (0.0, 1.0)}), []
    line = lambda g: {"alpha": g - 1}  # noqa: E731
    verdict = monotone(program, near(ONE), line, on_trial=told.append)
    assert verdict.holds
    assert verdict.points == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert [trial["kind"] for trial in told] == ["line"] * 5
    search_merge(program, near(ONE), {"alpha": (0.0, 1.0)}, strategy="golden")
    assert traces == 1
    assert monotone(merge, lambda params: None, line, trials=told) == verdict
    assert not monotone(EXPO, near(BASE), line).holds
    beyond = Compiled(merge, {"alpha": (0.25, 1.5)})  # a search that begins beyond the line
    assert monotone(beyond, near(ONE), line).scores == pytest.approx(verdict.scores)
    deep = Compiled(EXPO, {"alpha": Float(0.25, 1.5, size=2)})
    assert monotone(deep, near(ONE), line, on_trial=told.append).scores == pytest.approx(verdict.scores)
    assert told[-1]["coefficients"] == {"alpha": [0.0, 0.0]}


def test_errors_name_what_was_found_and_wanted(monkeypatch):
    with pytest.raises(ValueError, match="the space is empty"):
        Search({}, "grid")
    with pytest.raises(ValueError, match=r"bounds \(1.0, 0.0\); wanted two finite"):
        Search({"alpha": (1.0, 0.0)}, "grid")
    with pytest.raises(ValueError, match=r"start=2 is outside the bounds \(0, 1\)"):
        Float(0, 1, start=2)
    with pytest.raises(KeyError, match="no strategy 'annealing'; there are grid, coordinate, golden"):
        Search(SPACE, "annealing")
    with pytest.raises(KeyError, match=r"coefficients \['beta'\], wanted exactly \['alpha'\]"):
        Compiled(EXPO, {"alpha": (0.0, 1.0)})(beta=0.3)
    with pytest.raises(ValueError, match=r"coefficient alpha has shape \(2,\), wanted \(\) or \(1,\)"):
        Compiled(EXPO, {"alpha": (0.0, 1.0)})(alpha=[0.3, 0.1])
    with pytest.raises(ValueError, match=r"grid: 1953125 candidates; wanted at most 4096.*'coordinate'"):
        Search({f"a{i}": (0.0, 1.0) for i in range(9)}, "grid")
    with pytest.raises(ValueError, match=r"grid: \{'alpha': 2.0\} is outside the bounds"):
        Search({"alpha": (0.0, 1.0)}, functools.partial(grid, points={"alpha": [0.5, 2.0]}))
    with pytest.raises(ValueError, match="golden: tolerance=0; wanted a share"):
        run(Search({"alpha": (0.0, 1.0)}, functools.partial(golden, tolerance=0)), lambda c: 0.0)
    with pytest.raises(TypeError, match=r"evaluate returned an array of shape \(3,\); wanted one number"):
        search_merge(EXPO, lambda params: np.zeros(3), {"alpha": (0.0, 1.0)})
    with pytest.raises(ValueError, match=r"'gradient': a trial without gradient; wanted descend"):
        search_merge(EXPO, near(ONE), {"alpha": (0.0, 1.0)}, strategy="gradient")
    with pytest.raises(KeyError, match=r"search_exme: space of \['alpha'\], wanted \['alpha_1', 'alpha_2', 'beta'\]"):
        search_exme([ONE, TWO], BASE, near(ONE), space=Space({"alpha": (0.0, 1.0)}))
    with pytest.raises(ValueError, match=r"alpha_1 in \(0.1, 1.0\); wanted bounds around 0"):
        search_exme([ONE, TWO], BASE, near(ONE), space=exme_space(2, alpha=(0.1, 1.0)))
    search = Search({"alpha": (0.0, 1.0)}, functools.partial(listed, points=[(0.5,)]))
    search.tell(1.0, 0.1)
    with pytest.raises(ValueError, match="the search is over"):
        search.tell(1.0, 0.1)
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(
        ImportError, match=r"needs the package cmaes, which is not here: .*pip install 'jaxmerge\[search\]'"
    ):
        Search(SPACE, "cma_es")


def test_docs():
    for module in (tune, strategies, exme):
        assert doctest.testmod(module).failed == 0
    text = (ROOT / "docs" / "library.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text.split("## Searching coefficients")[1], re.DOTALL)
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "docs/library.md", "exec"), scope)
    assert scope["result"].score >= max(trial["score"] for trial in scope["result"].trials if trial["kind"] == "safe")
    assert scope["result"].score > float(-scope["loss"](scope["models"][0]))
    assert scope["smooth"].score >= scope["smooth"].trials[0]["score"]
