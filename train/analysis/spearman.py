"""Rank correlation, and how often chance alone gives as much of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

EXACT = 8
"""Up to so many layers all orders are tried: 8! = 40,320."""
DRAWS = 20_000
SLACK = 1e-9
"""Correlations closer than this are equal: what rounding tells apart is a tie."""


@dataclasses.dataclass(frozen=True)
class Correlation:
    """ρ with its two-sided p-value and the number of permutations behind it; NaN where one side does not vary."""

    rho: float
    p: float
    permutations: int
    exact: bool


def average_ranks(values: Sequence[float]) -> np.ndarray:
    """Rank values from 1; equal ones share the mean of the ranks they take up.

    Example:
      >>> average_ranks([10.0, 30.0, 10.0]).tolist()
      [1.5, 3.0, 1.5]
    """
    array = np.asarray(values, np.float64)
    _, which, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    r"""Return Spearman's :math:`\rho`: the correlation of average ranks; NaN where a side does not vary.

    Example:
      >>> spearman([1, 2, 3], [10, 20, 15])
      0.5
    """
    x, y = _standard(a), _standard(b)
    return float(np.clip(np.round(x @ y, 12), -1, 1)) if x is not None and y is not None else math.nan


def _standard(values: Sequence[float]) -> np.ndarray | None:
    """Ranks, centred and of length 1."""
    ranks = average_ranks(values)
    centred = ranks - ranks.mean()
    length = math.sqrt(centred @ centred)
    return centred / length if length else None


def permutation_test(a: Sequence[float], b: Sequence[float], *, seed: int = 0, draws: int = DRAWS) -> Correlation:
    r"""Test :math:`\rho(a, b)` against all orders of b: were layers shuffled, how often :math:`|\rho_\pi| \ge |\rho|`?

    Up to `EXACT` values every permutation is tried, and p is their share. Beyond, `draws` random ones are, and
    :math:`p = (1 + \#\{|\rho_\pi| \ge |\rho|\}) / (1 + draws)`, which is never 0 and never too small on average.

    Args:
      a, b: values of n layers each, n ≥ 2.
      seed: of the draws.

    References:
      Phipson and Smyth, "Permutation p-values should never be zero", 2010, https://arxiv.org/abs/1603.05766.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"found {len(a)} and {len(b)} values; wanted as many in both, two or more")
    x, y, n = _standard(a), _standard(b), len(a)
    exact = n <= EXACT
    if x is None or y is None:
        return Correlation(math.nan, math.nan, 0, exact)
    if exact:
        orders = np.array(list(itertools.permutations(range(n))))
    else:
        generator = np.random.Generator(np.random.Philox(key=[seed, 0x5BEA]))
        orders = generator.permuted(np.tile(np.arange(n), (draws, 1)), axis=1)
    rho = float(x @ y)
    count = int(np.count_nonzero(np.abs(y[orders] @ x) >= abs(rho) - SLACK))
    p = count / len(orders) if exact else (1 + count) / (1 + len(orders))
    return Correlation(spearman(a, b), p, len(orders), exact)
