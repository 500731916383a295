"""The statistics of experiments, against simulation and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from train.studies.stats import gain, holm, hypervolume, mean_interval, paired_t


def test_hypervolume_against_a_grid():
    rng = np.random.default_rng(0)
    found = [tuple(p) for p in rng.uniform(size=(6, 2))]
    axis = (np.arange(1000) + 0.5) / 1000
    covered = np.zeros((1000, 1000), bool)
    for x, y in found:
        covered |= (axis[:, None] < x) & (axis[None, :] < y)
    assert hypervolume(found) == pytest.approx(covered.mean(), abs=2e-3)
    assert gain([(0.9, 0.1), (0.1, 0.9)], (0.5, 0.5)) == pytest.approx(0.4 * 0.1 * 2)


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(1000):
        _, low, high = mean_interval(rng.normal(3.0, 1.0, size=5).tolist())
        inside += low <= 3.0 <= high
    assert 930 <= inside <= 970
    assert math.isnan(mean_interval([1.0])[1])


@pytest.mark.parametrize("n", [5, 20])
def test_p_values_are_uniform_where_nothing_differs(n):
    rng = np.random.default_rng(2)
    found = [paired_t(rng.normal(size=n).tolist()) for _ in range(400)]
    for level in (0.1, 0.5):
        assert abs(np.mean(np.array(found) <= level) - level) < 0.06


def test_p_values_of_what_does_not_vary():
    assert paired_t([0.0, 0.0]) == 1.0
    assert paired_t([2.0, 2.0]) == 0.0
    assert math.isnan(paired_t([1.0]))


def test_holm_never_lowers_and_keeps_the_order():
    p = {"a": 0.001, "b": 0.02, "c": 0.03, "d": 0.5}
    assert holm(p) == {"a": 0.004, "b": 0.06, "c": 0.06, "d": 0.5}
