"""Numbers of an experiment over its cells: intervals over seeds, frontiers, paired tests and their correction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

Point = tuple[float, float]
EXACT = 16
"""Pairs up to which all sign flips are tried; above, this many thousand drawn ones."""


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


def sign_flip(differences: Sequence[float], *, draws: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of a paired permutation test: the signs of the differences are exchangeable.

    All 2ⁿ sign patterns for n ≤ 16, else drawn ones (never 0: the observed pattern counts).

    Example:
      >>> sign_flip([1.0, 2.0, 3.0]), sign_flip([1.0, -1.0])
      (0.25, 1.0)
    """
    d = np.asarray(differences, np.float64)
    seen = abs(d.sum()) - 1e-12
    if len(d) <= EXACT:
        signs = np.array(list(itertools.product((1, -1), repeat=len(d))))
        return float(np.mean(np.abs(signs @ d) >= seen))
    signs = np.random.default_rng(seed).choice((1, -1), size=(draws, len(d)))
    return float((1 + np.sum(np.abs(signs @ d) >= seen)) / (1 + draws))


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
