"""Numbers of an experiment over its cells: intervals over seeds, frontiers, paired tests and their correction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Point = tuple[float, float]


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t over the values; a single value has no interval (NaN).

    Example:
      >>> [round(x, 3) for x in mean_interval([1.0, 2.0, 3.0])]
      [2.0, -0.484, 4.484]
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
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
    found: Any = stats.ttest_1samp(d, 0.0)  # its type does not show its fields
    return float(found.pvalue)


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


EXACT = 8
"""Up to so many layers all orders are tried: 8! = 40,320."""
DRAWS = 20_000


@dataclasses.dataclass(frozen=True)
class Correlation:
    """ρ with its two-sided p-value and the number of permutations behind it; NaN where one side does not vary."""

    rho: float
    p: float
    permutations: int
    exact: bool


def permutation_test(a: Sequence[float], b: Sequence[float], *, seed: int = 0, draws: int = DRAWS) -> Correlation:
    r"""Test Spearman's $\rho(a, b)$ against the orders of b: how often is $|\rho_\pi| \ge |\rho|$?

    Up to `EXACT` values every permutation is tried, and p is their share. Beyond, `draws` random ones are, and
    $p = (1 + \#\{|\rho_\pi| \ge |\rho|\}) / (1 + draws)$, which is never 0 and never too small on average.

    Args:
      a, b: values of n layers each, n ≥ 2.
      seed: of the draws.

    Example:
      >>> permutation_test([1.0, 2.0, 3.0], [10.0, 20.0, 15.0]).rho
      0.5

    References:
      Phipson and Smyth, "Permutation p-values should never be zero", 2010, https://arxiv.org/abs/1603.05766.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"found {len(a)} and {len(b)} values; wanted as many in both, two or more")
    exact = len(a) <= EXACT
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(math.nan, math.nan, 0, exact)
    x, y = (stats.zscore(stats.rankdata(values)) for values in (a, b))
    tried = math.factorial(len(a)) if exact else draws
    found = stats.permutation_test(
        (y,), lambda order, axis: np.abs(np.mean(order * x, axis=axis)), permutation_type="pairings",
        alternative="greater", n_resamples=tried if exact else draws, vectorized=True,
        rng=np.random.Generator(np.random.Philox(key=[seed, 0x5BEA])),
    )  # fmt: skip
    rho: Any = stats.spearmanr(a, b)  # its type does not show its fields
    return Correlation(float(rho.statistic), float(found.pvalue), tried, exact)
