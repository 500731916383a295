"""ExMe: its identities through the compiled program, and its own search."""

import functools
import json

import jax
import numpy as np
import pytest
from helpers.searches import BASE, EXPO, MERGE, ONE, PATHS, PLANTED, SPACE, TWO, near

import jaxmerge
from jaxmerge.exme import exme_merge, exme_safe, exme_space, exme_weights, search_exme
from jaxmerge.strategies import golden, listed
from jaxmerge.tune import Compiled


def test_identities_of_exme_through_the_program():
    program = Compiled(MERGE, SPACE)
    beta = 0.3
    still = program(alpha_1=0.0, alpha_2=0.0, beta=beta)
    assert all(np.allclose(still[p], beta * ONE[p] + (1 - beta) * TWO[p], atol=1e-6) for p in PATHS)
    twins = Compiled(exme_merge([ONE, ONE], BASE), SPACE)(alpha_1=0.4, alpha_2=0.4, beta=beta)
    assert all(np.allclose(twins[p], EXPO(alpha=0.4)[p], atol=1e-6) for p in PATHS)
    found = program(**PLANTED)
    b, one, two = PLANTED["beta"], PLANTED["alpha_1"], PLANTED["alpha_2"]
    for p in PATHS:
        tau_1, tau_2 = ONE[p] - BASE[p], TWO[p] - BASE[p]
        wanted = BASE[p] + b * (1 + one) * tau_1 + (1 - b) * (1 + two) * tau_2
        assert np.allclose(found[p], wanted, atol=1e-5)
    alone = program(alpha_1=0.0, alpha_2=0.7, beta=1.0)
    assert all(np.array_equal(alone[p], ONE[p]) for p in PATHS)


def test_exme_of_three_and_of_depth():
    space = exme_space(3, size=2)
    assert list(space.floats) == ["alpha_1", "alpha_2", "alpha_3", "beta_1", "beta_2"]
    start = space.pack(space.start)
    assert exme_weights([start["beta_1"], start["beta_2"]]) == pytest.approx([1 / 3] * 3)
    assert [exme_weights([c["beta_1"], c["beta_2"]]) for c in exme_safe(space)[:3]] == np.eye(3).tolist()
    merged = Compiled(exme_merge([ONE, TWO, BASE], BASE), space)(**start)
    assert all(np.allclose(merged[p], (ONE[p] + TWO[p] + BASE[p]) / 3, atol=1e-6) for p in PATHS)
    deep = Compiled(exme_merge([ONE], BASE), exme_space(1, size=2))(alpha_1=[0.0, 1.0])
    assert np.allclose(deep[PATHS[1]], EXPO(alpha=0.5)[PATHS[1]], atol=1e-6)


def test_exme_search_finds_the_planted_merge_and_resumes():
    planted = {"alpha_1": 0.6, "alpha_2": 0.3, "beta": 0.7}
    evaluate = near(MERGE(**planted))
    strategy = functools.partial(golden, rounds=3, tolerance=0.02)
    whole = search_exme([ONE, TWO], BASE, evaluate, strategy=strategy, tolerance=10.0)
    assert whole.score > -1e-3
    assert [t["kind"] for t in whole.trials[:3]] == ["safe"] * 3
    assert sum(t["kind"] == "line" for t in whole.trials) == 7  # 2 × 5, the ends measured as safe, the base once
    again = search_exme(
        [ONE, TWO], BASE, evaluate, strategy=strategy, tolerance=10.0, trials=json.loads(json.dumps(whole.trials[:20]))
    )
    assert again.best == whole.best
    assert again.evaluations == whole.evaluations
    first = search_exme([ONE, TWO], BASE, evaluate, tolerance=10.0)
    plain = max(t["score"] for t in first.trials if t["kind"] == "safe")
    assert first.score > plain
    stages = [t["coefficients"] for t in first.trials if t["kind"] == "staged"]
    assert stages[0]["beta"] == 1.0  # α_1 with checkpoint 1 alone


def test_exme_search_cuts_an_alpha_whose_line_falls():
    result = search_exme([ONE, TWO], BASE, near(BASE))  # training hurt: every step away from the base is worse
    assert all("alpha_" in note for note in result.notes[:2])
    assert "searched up to 0 only" in result.notes[0]
    assert max(t["coefficients"]["alpha_1"] for t in result.trials) == 0.0
    assert result.score >= max(t["score"] for t in result.trials if t["kind"] == "safe")


def test_exme_search_never_chooses_worse_than_a_checkpoint():
    result = search_exme([ONE, TWO], BASE, near(TWO), space=exme_space(2, alpha=(0.0, 1.0)), strategy="coordinate")
    assert result.best["beta"] == 0.0
    assert result.score == 0.0
    assert any("not chosen" in note for note in result.notes)


def test_exme_search_tells_the_collinear_trap():
    half = jaxmerge.interpolate([BASE, ONE], t=0.5)
    listed_once = functools.partial(listed, points=[(0.0, 0.0, 0.5)])
    result = search_exme([ONE, half], BASE, near(ONE), strategy=listed_once)
    assert "checkpoints 1 and 2 have cosine 1.0000: they lie on one line" in result.notes[0]
    assert not any("cosine" in n for n in search_exme([ONE, TWO], BASE, near(ONE), strategy=listed_once).notes)
    one, half, base = (tree | {"activation": jax.nn.relu, "name": "mlp"} for tree in (ONE, half, BASE))
    assert search_exme([one, half], base, near(ONE), strategy=listed_once).notes == result.notes
