r"""What a merge did to a tensor, summed up chunk by chunk while its numbers are at hand.

With the deltas $\tau_i = \theta_i - \theta_r$ from the reference (the base, else the first model):

  delta      [$\|\tau_i\|$, …] of each model but the reference
  cosine     [[i, j, $\cos(\tau_i, \tau_j)$], …], null where a delta is zero
  conflict   share of elements in which two deltas have opposite signs
  result     $\|\theta - \theta_r\|$ of the result θ as it is written
  changed    share of its elements that are unlike the reference's: what a sparse rule kept
  sampled    share of the elements that all this was taken from: 1, or of large tensors an eighth

Of large tensors one run of 4096 elements in eight counts, scaled up: a norm is within some thousandths then, for an
eighth of what would be half the price of a merge. `jaxmerge inspect` takes all. Whether all is finite is asked of all.
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
STRIDE = 8
LARGE = 2**18  # elements of a chunk from which it is sampled


@functools.partial(jax.jit, static_argnames=("dtype",))
def sums(reference: Array, others: Sequence[Array], result: Array, count: Any, *, dtype: Any = None) -> list[Array]:
    r"""Return the sums over one chunk of [n] elements, of which the first `count` are real.

    In order: whether all is finite, the elements counted, $\tau_i \cdot \tau_j$ for i ≤ j, conflicts,
    $\|\theta - \theta_r\|^2$, changed. `dtype`: what floating inputs are cast to before they are merged.
    """
    wider = wide(result.dtype)
    n = reference.shape[0]
    lanes = min(LANES, n)
    rows, stride = n // lanes, STRIDE if n >= LARGE else 1
    operands = [array.reshape(rows, lanes) for array in (reference, *others, result)]
    counted = jnp.arange(lanes)

    def widen(array: Array, row: Array) -> Array:
        part = jax.lax.dynamic_index_in_dim(array, row, keepdims=False)
        return (part if dtype is None else part.astype(dtype)).astype(wider)

    def step(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        row = i * stride + i % stride  # the shift, lest a width that is a multiple of both is always met in one place
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
        terms = [real.astype(wider), *terms, moved * moved, (moved != 0).astype(wider)]
        return tuple(total + term for total, term in zip(totals, terms, strict=True))

    pairs = len(others) * (len(others) + 1) // 2
    zeros = (jnp.zeros(lanes, wider),) * (pairs + 3 + (len(others) > 1))
    whole = jnp.arange(n) < count
    finite = functools.reduce(jnp.logical_and, [jnp.isfinite(array) for array in (reference, *others)])
    finite = (finite & (jnp.isfinite(result) | ~whole)).all()
    return [finite, *(total.sum() for total in jax.lax.fori_loop(0, rows // stride, step, zeros))]


class Tally:
    """The sums of one tensor's chunks, in float64. Overflow of a square in float32 is inf, and no error."""

    def __init__(self, models: int, size: int):
        self.models, self.size = models, size
        self.totals: np.ndarray | None = None

    def add(self, parts: Sequence[Array]) -> bool:
        """Add the sums of a chunk; False if an element is not finite."""
        finite, *values = (float(part) for part in parts)
        found = np.asarray(values)
        self.totals = found if self.totals is None else self.totals + found
        return bool(finite)

    def summary(self) -> dict[str, Any]:
        """Return the statistics as plain data; see the module's docstring."""
        if self.totals is None:
            return {}
        counted, *rest = self.totals.tolist()
        totals, scale = iter(rest), self.size / max(counted, 1)
        products = {pair: next(totals) for pair in itertools.combinations_with_replacement(range(self.models), 2)}
        norms = [math.sqrt(products[i, i] * scale) for i in range(self.models)]
        found: dict[str, Any] = {"delta": [round_off(norm) for norm in norms]}
        if self.models > 1:
            found["cosine"] = [
                [i, j, round_off(products[i, j] * scale / (norms[i] * norms[j])) if norms[i] * norms[j] else None]
                for i, j in itertools.combinations(range(self.models), 2)
            ]
            found["conflict"] = round_off(next(totals) / max(counted, 1))
        found["result"] = round_off(math.sqrt(next(totals) * scale))
        found["changed"] = round_off(next(totals) / max(counted, 1))
        return found | {"sampled": round_off(counted / self.size)}


def round_off(value: float) -> float:
    """Six significant digits: what float32 sums are good for, in little space."""
    return float(f"{value:.6g}")
