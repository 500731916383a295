"""How many directions a change of weights has: the spectrum of each matrix's delta."""

from __future__ import annotations

from typing import Any

import numpy as np

import jaxmerge

from ..models.decoder import Params
from ..models.stacked import unstack_layers
from .change import in_order, kind_of


def singular_values(matrix: np.ndarray) -> np.ndarray:
    """Return the singular values of [m, n], largest first, float64: roots of the smaller Gram matrix's eigenvalues.

    Values below about 1e-8 of the largest are noise; they carry no share of any measure here.
    """
    matrix = np.asarray(matrix, np.float64)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))


def effective_rank(values: np.ndarray) -> float:
    r"""Return $\exp(-\sum_i p_i \ln p_i)$, $p_i = \sigma_i / \sum_j \sigma_j$; 0 of a zero matrix.

    Example:
      >>> effective_rank(np.array([2.0, 2.0, 0.0]))
      2.0

    References:
      Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    whole = values.sum()
    if not whole:
        return 0.0
    p = values[values > 0] / whole
    return float(np.exp(-(p * np.log(p)).sum()))


def stable_rank(values: np.ndarray) -> float:
    r"""Return $\|\Delta\|_F^2 / \|\Delta\|_2^2 = \sum_i \sigma_i^2 / \sigma_1^2$; 0 of a zero matrix.

    Example:
      >>> stable_rank(np.array([2.0, 2.0, 1.0]))
      2.25
    """
    return float((values**2).sum() / values.max() ** 2) if values.max() else 0.0


def ranks(tuned: Params, base: Params) -> dict[str, dict[str, Any]]:
    """Measure the delta of every matrix, averaged over the matrices of a kind.

    Returns:
      kind → effective and stable (means), full (mean of min(m, n)), matrices (how many).
    """
    found: dict[str, list[tuple[float, float, int]]] = {}
    for path, delta in jaxmerge.task_vector(unstack_layers(tuned), unstack_layers(base)).items():
        if delta.ndim == 2:
            values = singular_values(np.asarray(delta))
            found.setdefault(kind_of(path), []).append((effective_rank(values), stable_rank(values), len(values)))
    table = {}
    for kind in in_order(list(found)):
        effective, stable, full = (float(np.mean(column)) for column in zip(*found[kind], strict=True))
        table[kind] = {"effective": effective, "stable": stable, "full": full, "matrices": len(found[kind])}
    return table
