"""Numbers of an experiment over its cells: intervals over seeds, frontiers, paired tests and their correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

Point = tuple[float, float]


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t over the values; a single value has no interval (NaN).

    Example:
      >>> [round(x, 3) for x in mean_interval([1.0, 2.0, 3.0])]
      [2.0, -0.484, 4.484]
    """
    found = np.asarray(values, np.float64)
    mean, n = float(found.mean()), len(found)
    if n < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, n - 1) * found.std(ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def hypervolume(points: Sequence[Point], reference: Point = (0.0, 0.0)) -> float:
    """Area that the points dominate beyond a reference, both axes better when higher.

    Example:
      >>> hypervolume([(1.0, 2.0), (2.0, 1.0), (0.5, 0.5)])
      3.0
    """
    left, lowest = [(x, y) for x, y in points if x > reference[0] and y > reference[1]], reference[1]
    area = 0.0
    for x, y in sorted(left, reverse=True):
        if y > lowest:
            area += (x - reference[0]) * (y - lowest)
            lowest = y
    return area


def gain(points: Sequence[Point], base: Point) -> float:
    """What points add to the area dominated by the base alone: 0 for a method that is better in nothing.

    Example:
      >>> round(gain([(0.6, 0.4)], (0.5, 0.5)), 3), gain([(0.4, 0.4)], (0.5, 0.5))
      (0.04, 0.0)
    """
    return hypervolume([base, *points]) - hypervolume([base])


def paired_t(differences: Sequence[float]) -> float:
    """Two-sided p-value of Student's paired test, that the differences have mean 0; NaN of fewer than two.

    A test of signs cannot be significant with five seeds: its smallest p is 2/2⁵.

    Example:
      >>> round(paired_t([1.0, 2.0, 3.0]), 4), paired_t([1.0, -1.0])
      (0.0742, 1.0)
    """
    d = np.asarray(differences, np.float64)
    if len(d) < 2:
        return math.nan
    if np.ptp(d) == 0:
        return float(d[0] == 0)
    t = d.mean() / (d.std(ddof=1) / math.sqrt(len(d)))
    return float(2 * stats.t.sf(abs(t), len(d) - 1))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number, step down.

    References:
      Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Example:
      >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
      {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    corrected, largest = {}, 0.0
    for rank, (name, value) in enumerate(sorted(p.items(), key=lambda item: (item[1], item[0]))):
        largest = max(largest, min(1.0, (len(p) - rank) * value))
        corrected[name] = largest
    return corrected
