r"""What a merge did to a tensor, summed up chunk by chunk while its numbers are at hand.

With the deltas :math:`\tau_i = \theta_i - \theta_r` from the reference (the base, else the first model):

  delta      [:math:`\|\tau_i\|`, …] of each model but the reference
  cosine     [[i, j, :math:`\cos(\tau_i, \tau_j)`], …], null where a delta is zero
  conflict   share of elements in which two deltas have opposite signs
  result     :math:`\|\theta - \theta_r\|` of the result θ as it is written
  changed    share of its elements that are unlike the reference's: what a sparse rule kept
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.tree import Array, wide

LANES = 4096  # partial sums side by side: a reduction to one number would run on one lane of one core


@functools.partial(jax.jit, static_argnames=("dtype",))
def sums(reference: Array, others: Sequence[Array], result: Array, count: Any, *, dtype: Any = None) -> list[Array]:
    r"""Return the sums over one chunk of [n] elements, of which the first `count` are real.

    In order: :math:`\tau_i \cdot \tau_j` for i ≤ j, conflicts, :math:`\|\theta - \theta_r\|^2`, changed. `dtype`: what
    floating inputs are cast to before they are merged.
    """
    wider = wide(result.dtype)
    lanes = min(LANES, reference.shape[0])
    rows = reference.shape[0] // lanes
    operands = [array.reshape(rows, lanes) for array in (reference, *others, result)]
    counted = jnp.arange(lanes)

    def widen(array: Array, row: Array) -> Array:
        part = jax.lax.dynamic_index_in_dim(array, row, keepdims=False)
        return (part if dtype is None else part.astype(dtype)).astype(wider)

    def step(row: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        from_, *models = (widen(array, row) for array in operands[:-1])
        deltas = [model - from_ for model in models]
        # The result is not padded with zeros as the inputs are: a rule may make anything of zeros.
        real = row * lanes + counted < count
        moved = jnp.where(real, operands[-1][row].astype(wider) - from_.astype(result.dtype).astype(wider), 0)
        terms = [a * b for a, b in itertools.combinations_with_replacement(deltas, 2)]
        if len(deltas) > 1:
            up = functools.reduce(jnp.logical_or, [delta > 0 for delta in deltas])
            down = functools.reduce(jnp.logical_or, [delta < 0 for delta in deltas])
            terms.append((up & down).astype(wider))
        terms += [moved * moved, (moved != 0).astype(wider)]
        return tuple(total + term for total, term in zip(totals, terms, strict=True))

    pairs = len(others) * (len(others) + 1) // 2
    zeros = (jnp.zeros(lanes, wider),) * (pairs + 2 + (len(others) > 1))
    return [total.sum() for total in jax.lax.fori_loop(0, rows, step, zeros)]


class Tally:
    """The sums of one tensor's chunks, in float64."""

    def __init__(self, models: int, size: int):
        self.models, self.size = models, size
        self.totals: np.ndarray | None = None

    def add(self, parts: Sequence[Array]) -> bool:
        """Add the sums of a chunk; False if one is not finite: then some element is not, or too large to square."""
        values = np.asarray([float(part) for part in parts])
        self.totals = values if self.totals is None else self.totals + values
        return bool(np.isfinite(values).all())

    def summary(self) -> dict[str, Any]:
        """Return the statistics as plain data; see the module's docstring."""
        if self.totals is None:
            return {}
        totals = iter(self.totals.tolist())
        products = {pair: next(totals) for pair in itertools.combinations_with_replacement(range(self.models), 2)}
        norms = [math.sqrt(products[i, i]) for i in range(self.models)]
        found: dict[str, Any] = {"delta": [round_off(norm) for norm in norms]}
        if self.models > 1:
            found["cosine"] = [
                [i, j, round_off(products[i, j] / (norms[i] * norms[j])) if norms[i] * norms[j] else None]
                for i, j in itertools.combinations(range(self.models), 2)
            ]
            found["conflict"] = round_off(next(totals) / self.size)
        return found | {"result": round_off(math.sqrt(next(totals))), "changed": round_off(next(totals) / self.size)}


def round_off(value: float) -> float:
    """Six significant digits: what float32 sums are good for, in little space."""
    return float(f"{value:.6g}")
