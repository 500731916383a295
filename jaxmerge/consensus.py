r"""How the sparsified task vectors of several models become one.

A consensus is a function `(deltas, weights, *, normalize) -> array` of one leaf: N arrays (`Deltas`) and [N] weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from jaxmerge import passes
from jaxmerge.leaves import Operands
from jaxmerge.tree import Array, or_one


class Deltas(tuple[Array, ...]):
    """N arrays, and how they are made: a consensus that sums over them first can have them made again after.

    Held from one to the other they would take the memory of all models in float32.
    """

    make: Callable[[Operands], tuple[Array, ...]]
    operands: Operands

    def __new__(cls, make: Callable[[Operands], tuple[Array, ...]], operands: Operands) -> Deltas:
        deltas = super().__new__(cls, make(operands))
        deltas.make, deltas.operands = make, operands
        return deltas

    def after(self, *results: Array) -> Deltas:
        """Return the same arrays, computed anew once `results` are there."""
        return Deltas(self.make, self.operands.after(*results))


CANCELLED = 1e-6  # of Σ|w|: what is left of weights that sum to zero is rounding, in float32


def cancel(weights: Sequence[float]) -> bool:
    """Whether concrete weights sum to zero, but for rounding."""
    # By difference, for an infinite sum is no zero.
    return abs(sum(weights)) - CANCELLED * sum(map(abs, weights)) <= 0


def _sum(terms: list[Array]) -> Array:
    return sum(terms[1:], start=terms[0])


def weighted_sum(deltas: tuple[Array, ...], weights: Array, *, normalize: bool) -> Array:
    r"""Return $\sum_i w_i d_i$, divided by $\sum_i w_i$ if `normalize`.

    Weights that sum to zero, but for rounding, are divided by 1, as in mergekit.
    """
    total = _sum([w * d for w, d in zip(weights, deltas, strict=True)])
    if not normalize:
        return total
    divisor = weights.sum()
    return total / jnp.where(jnp.abs(divisor) <= CANCELLED * jnp.abs(weights).sum(), 1, divisor)


def _disjoint(
    deltas: tuple[Array, ...], weights: Array, votes: list[Array], normalize: bool, floor: float = 0.0
) -> Array:
    r"""Return $\sum_i M_i w_i d_i$ (over $\sum_i M_i w_i$), M where the vote has the elected sign."""
    # A tie elects plus; a trimmed element, zero, never agrees; NaN is outvoted by nobody, but seen.
    elected = jnp.where(_sum(votes) >= 0, 1.0, -1.0).astype(deltas[0].dtype)
    agree = [~(vote * elected <= 0) for vote in votes]
    total = _sum([jnp.where(m, w * d, 0) for m, w, d in zip(agree, weights, deltas, strict=True)])
    if not normalize:
        return total
    divisor = _sum([jnp.where(m, w, 0) for m, w in zip(agree, weights, strict=True)])
    return total / (jnp.maximum(divisor, floor) if floor else or_one(divisor))


def elect_sign(deltas: tuple[Array, ...], weights: Array, *, normalize: bool) -> Array:
    r"""Elect each element's sign by the weighted deltas; sum (or average) those that agree (mergekit's TIES).

    $s = \mathrm{sign}\sum_i w_i d_i$, $M_i = [\mathrm{sign}(w_i d_i) = s]$,
    $\sum_i M_i w_i d_i / \sum_i M_i w_i$.
    """
    return _disjoint(deltas, weights, [w * d for w, d in zip(weights, deltas, strict=True)], normalize)


def elect_sign_unweighted(deltas: tuple[Array, ...], weights: Array, *, normalize: bool) -> Array:
    """Elect each element's sign by the deltas themselves, whatever the weights (the TIES paper's)."""
    return _disjoint(deltas, weights, list(deltas), normalize)


def _energies(deltas: tuple[Array, ...]) -> Array:
    """Return mean(d²) of each, [N]."""
    return jnp.stack(passes.sums([jnp.square(d) for d in deltas])) / deltas[0].size


def elect_sign_by_energy(deltas: Deltas, weights: Array, *, normalize: bool) -> Array:
    r"""Weigh each model by its share of $\mathrm{mean}(d_i^2)$, then elect unweighted and average (SCE).

    Independent of the scale of the deltas: the shares are taken after dividing by the largest.
    """
    energy = _energies(deltas)
    deltas = deltas.after(energy)
    largest = jnp.max(energy)
    energy = energy / or_one(largest)
    return _disjoint(deltas, weights * energy / or_one(energy.sum()), list(deltas), normalize)


def elect_sign_by_energy_mergekit(deltas: Deltas, weights: Array, *, normalize: bool) -> Array:
    """As `elect_sign_by_energy` with mergekit's absolute floors: uniform weights under a total energy of 1e-6,
    and no divisor under 1e-6."""
    energy = _energies(deltas)
    deltas = deltas.after(energy)
    total = energy.sum()
    shares = jnp.where(total < 1e-6, 1 / len(deltas), energy / jnp.where(total < 1e-6, 1, total))
    return _disjoint(deltas, weights * shares, list(deltas), normalize, floor=1e-6)
