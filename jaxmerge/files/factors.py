r"""A matrix as the product of two thin ones, $s\,BA$, and how large their rank is.

Small matrices are decomposed exactly. Large ones by a random projection with power iterations: Q an orthonormal
basis of (ΔΔᵀ)^q Δ Ω, then the decomposition of QᵀΔ, which is small. What the result explains of ‖Δ‖² is exact in
both cases: ‖Δ − Q(QᵀΔ)_r‖² = ‖Δ‖² − ‖(QᵀΔ)_r‖².

References:
  Eckart and Young, "The approximation of one matrix by another of lower rank", 1936
  Halko, Martinsson and Tropp, "Finding Structure with Randomness", https://arxiv.org/abs/0909.4061
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

EXACT = 512  # up to this smaller side, or where the rank is a quarter of it, decompose exactly
SPARE = 16  # columns of the projection beyond the rank
ITERATIONS = 8  # at most
SETTLED = 1e-4  # share of ‖Δ‖² that the last iteration may have added


@dataclasses.dataclass(frozen=True)
class Cut:
    """How many singular triples of a matrix are kept: the smallest number that one of these allows.

    rank: at most so many. explained: as few as hold this share of the squared norm. ratio: those whose value is at
    least this share of the largest.
    """

    rank: int | None = None
    explained: float | None = None
    ratio: float | None = None

    def __post_init__(self):
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ValueError(f"rank is {self.rank!r}, wanted a whole number from 1 on")
        for name, most in (("explained", self.explained), ("ratio", self.ratio)):
            is_number = isinstance(most, int | float) and not isinstance(most, bool)
            if most is not None and not (is_number and 0 < most <= 1):
                raise ValueError(f"{name} is {most!r}, wanted a share in (0, 1]")

    @property
    def varies(self) -> bool:
        """Whether matrices of one shape may get unlike ranks."""
        return self.explained is not None or self.ratio is not None

    def count(self, values: np.ndarray, square: float) -> int:
        """Return how many of the singular values, the largest first, are kept; one at least.

        Args:
          values: all of them, or the largest.
          square: the squared norm of the matrix.

        Example:
          >>> values = np.array([4.0, 2.0, 1.0])
          >>> [Cut(**{key: share}).count(values, 21.0) for key, share in (("explained", 0.9), ("ratio", 0.25))]
          [2, 3]
        """
        count = len(values) if self.rank is None else min(self.rank, len(values))
        if self.ratio is not None and len(values):
            count = min(count, int(np.sum(values >= self.ratio * values[0])))
        if self.explained is not None:
            held = np.cumsum(np.square(values, dtype=np.float64))
            # But for rounding: the share of all values is 1.
            count = min(count, int(np.sum(held < self.explained * square * (1 - 1e-7))) + 1)
        return max(count, 1)


def ranks_in_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the keys of adapter_config.json that say the ranks of modules: r, and rank_pattern where some differ.

    Example:
      >>> ranks_in_config({"layers.0.q": 4, "layers.0.k": 2})
      {'r': 4, 'rank_pattern': {'layers.0.k': 2}}
    """
    largest = max(ranks.values(), default=1)
    return {"r": largest, "rank_pattern": {module: rank for module, rank in ranks.items() if rank != largest}}


def factor(
    delta: np.ndarray, rank: int | None, scale: float = 1.0, cut: Cut | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Factor Δ [out, in] into A [rank, in] and B [out, rank] with scale·B·A ≈ Δ; float32.

    Args:
      delta: the matrix.
      rank: of the factors, None for what `cut` says. Columns beyond the smaller side of Δ are zero.
      scale: what the product is multiplied by when it is applied.
      cut: leaves out singular triples; the factors then have the rank that is left.

    Returns:
      A, B and {"explained", "method", "rank", "gain"}.
    """
    small = min(delta.shape)
    used = small if rank is None else min(rank, small)
    # Scaled, so that squares stay in float32's range.
    unit = float(np.abs(delta).max()) or 1.0
    delta = delta / np.float32(unit)
    square = float(np.vecdot(delta, delta).sum(dtype=np.float64))
    if small <= EXACT or 4 * used >= small:
        method, gain = "exact", 0.0
        u, s, v = (np.asarray(part) for part in np.linalg.svd(delta, full_matrices=False))
    else:
        method = "randomised"
        u, s, v, gain = _randomised(jnp.asarray(delta), used)
    if cut is not None:
        used = min(used, cut.count(s, square))
    stored = used if cut is not None or rank is None else rank
    s = s[:used]
    root = np.sqrt(s) * math.sqrt(unit / scale)
    a, b = np.zeros((stored, delta.shape[1]), np.float32), np.zeros((delta.shape[0], stored), np.float32)
    a[:used], b[:, :used] = root[:, None] * v[:used], u[:, :used] * root
    explained = min(float(np.sum(np.square(s, dtype=np.float64))) / square, 1.0) if square else 1.0
    return a, b, {"explained": explained, "method": method, "rank": used, "gain": gain}


def _randomised(delta: jax.Array, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Iterate until the energy in the first `rank` directions settles; (U, S, Vᵀ, last gain)."""
    total = float(jnp.vdot(delta, delta))
    sketch = jax.random.normal(jax.random.key(0), (delta.shape[1], rank + SPARE), delta.dtype)
    basis = _basis(delta, sketch)
    found = _project(delta, basis)
    energy, gain = float(jnp.sum(found.s[:rank] ** 2)), total
    for _ in range(ITERATIONS):
        basis = _basis(delta, found.other)
        found = _project(delta, basis)
        now = float(jnp.sum(found.s[:rank] ** 2))
        gain, energy = (now - energy) / total, now
        if gain < SETTLED:
            break
    u, v = _exactly(basis, found.u), _exactly(found.v, found.other.T)
    return np.asarray(u), np.asarray(found.s), np.asarray(v), max(gain, 0.0)


class _Projected(NamedTuple):
    """QᵀΔ = u·diag(s)·v·otherᵀ, with u and v square and small."""

    u: jax.Array
    s: jax.Array
    v: jax.Array
    other: jax.Array


# In float32 to the last digit also on devices whose products default to less.
_exactly = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _basis(delta: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.linalg.qr(_exactly(delta, other))[0]


@jax.jit
def _project(delta: jax.Array, basis: jax.Array) -> _Projected:
    other, r = jnp.linalg.qr(_exactly(delta.T, basis))
    u, s, v = jnp.linalg.svd(r.T)
    return _Projected(u, s, v, other)
