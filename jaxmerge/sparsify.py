r"""Sparsifiers of task vectors, and the rescaling that makes up for what they drop.

A sparsifier is a leaf function `(Operands, **coefficients) -> keep` with the values of its coefficients. It decides
which elements stay; `keep(Operands) -> [(kept, keep probability or None), …]` gives them, one a model. It may be
called again with the same operands, read again: see `jaxmerge.consensus.Deltas`. The constructors here (`trim(0.2)`,
`drop(0.5)`, …) make one for `jaxmerge.delta_rule`; left out, a value is asked for when the rule is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import cut, host, order, passes
from jaxmerge.draw import uniform
from jaxmerge.leaves import Aside, Convert, Operands
from jaxmerge.tree import Array
from jaxmerge.where import Coefficient, PerModel

RESCALES = ("inverse", "l1", None)
RANKED = 2**20  # elements whose ranks are sorted out at once
REQUIRED: Any = "required"
Kept = tuple[Array, Array | None]
Keep = Callable[[Operands], list[Kept]]


@dataclass(frozen=True)
class Sparsifier:
    """A leaf function, its coefficients' values, and how a value becomes what the function gets."""

    name: str
    leaf: Callable[..., Keep]
    coefficients: Mapping[str, Any]  # one value for all models, or a sequence with one a model
    convert: Mapping[str, Convert] = field(default_factory=dict)
    shared: tuple[str, ...] = ()  # coefficients with one value for all models together
    random: bool = False
    aside: Aside | None = None  # of `leafwise`: what it needs that a CPU's host computes faster


def _deltas(x: Operands) -> Callable[[tuple[Array, ...]], tuple[Array, ...]]:
    """Deltas as a function of the stored weights, for passes that compute them anew."""
    return lambda stored: x.reread(stored).deltas


def keep_all(x: Operands) -> list[Kept]:
    """Keep what there is: a rule without a sparsifier."""
    return [(d, None) for d in x.deltas]


def _trim(x: Operands, *, density: Array) -> Keep:
    cuts = cut.cuts(_deltas(x), x.stored, [[k] for k in density])

    def keep(x: Operands) -> list[Kept]:
        return [(jnp.where(largest.mask(d), d, 0), None) for d, (largest,) in zip(x.deltas, cuts, strict=True)]

    return keep


def trim(density: PerModel = REQUIRED) -> Sparsifier:
    r"""Keep the k = max(1, ⌊density·n⌋) elements of largest magnitude, ties by flat position (TIES)."""
    count = functools.partial(order.at_least_one, name="density")
    return Sparsifier("trim", _trim, {"density": density}, {"density": count})


def _two_sided_trim(x: Operands, *, density: Array, gamma: Array) -> Keep:
    # Fewer outliers go where density + gamma > 1: exactly k elements are kept.
    outliers = jnp.minimum(gamma, np.uint32(x.models[0].size) - density)
    cuts = cut.cuts(_deltas(x), x.stored, list(zip(outliers + density, outliers, strict=True)))

    def keep(x: Operands) -> list[Kept]:
        return [
            (jnp.where(largest.mask(d) & ~outlying.mask(d), d, 0), None)
            for d, (largest, outlying) in zip(x.deltas, cuts, strict=True)
        ]

    return keep


def two_sided_trim(density: PerModel = REQUIRED, gamma: PerModel = 0.01) -> Sparsifier:
    r"""Drop the ⌊gamma·n⌋ largest magnitudes, then keep the ⌊density·n⌋ largest of the rest (breadcrumbs)."""
    convert = {name: functools.partial(order.share, name=name) for name in ("density", "gamma")}
    return Sparsifier("two_sided_trim", _two_sided_trim, {"density": density, "gamma": gamma}, convert)


def bernoulli(delta: Array, key: Array, density: Array) -> Array:
    r"""Keep each element with probability `density` (1 − p), independently; set the others to zero.

    The draw for flat element j is a function of (key, j) alone, so it is the same on every mesh.
    """
    # In float32 for every dtype: the same mask for the same leaf in another precision.
    return jnp.where(uniform(key, delta.shape) < density.astype(jnp.float32), delta, 0)


def _drop(x: Operands, *, density: Array) -> Keep:
    def keep(x: Operands) -> list[Kept]:
        assert x.keys is not None
        return [(bernoulli(d, key, p), p) for d, key, p in zip(x.deltas, x.keys, density, strict=True)]

    return keep


def drop(density: PerModel = REQUIRED) -> Sparsifier:
    """Keep each element with probability `density`, at random (DARE)."""
    chance = functools.partial(order.probability, name="density")
    return Sparsifier("drop", _drop, {"density": density}, {"density": chance}, random=True)


def _ranks(x: Operands, model: int) -> Array:
    """Ranks of the magnitudes of one model's deltas within their rows: two bytes an element where they do."""
    shape = x.models[0].shape

    def ranks(stored: tuple[Array, ...]) -> Array:
        found = order.ranks(jnp.abs(x.reread(stored).deltas[model]))
        return found.astype(jnp.uint16 if shape[-1] <= 2**16 else jnp.uint32)

    if not x.on_one_device:
        return ranks(x.stored)
    # A sort holds five arrays of its own: of a block of rows, not of the leaf.
    rows = tuple(array.reshape(-1, shape[-1]) for array in x.stored)
    return jax.lax.map(ranks, rows, batch_size=max(1, RANKED // shape[-1])).reshape(shape)


def _rank_drop(x: Operands, *, density: Array, epsilon: Array) -> Keep:
    columns = x.models[0].shape[-1] if x.models[0].ndim else 1
    ranks = x.aside or ([_ranks(x, i) for i in range(len(x.models))] if columns > 1 else ())

    def keep(x: Operands) -> list[Kept]:
        assert x.keys is not None
        kept: list[Kept] = []
        for i, d in enumerate(x.deltas):
            # In [0, 1] over the row, ½ where a row has one element.
            rank = ranks[i].astype(d.dtype) / (columns - 1) if columns > 1 else 0.5
            p = jnp.clip(density[i] + epsilon[i] * (2 * rank - 1), 0, 1)
            # Density 0 and 1 mean what they say, whatever epsilon.
            p = jnp.where(density[i] <= 0, 0, jnp.where(density[i] >= 1, 1, p))
            kept.append((bernoulli(d, x.keys[i], p), p))
        return kept

    return keep


def check_room(density: float, epsilon: float, of: str = "") -> None:
    """Raise unless the keep probabilities density ± ε of DELLA lie in (0, 1); `of` says whose they are."""
    if 0 < density < 1 and not (epsilon < density and density + epsilon < 1):
        room = min(density, 1 - density)
        raise ValueError(
            f"{of}density {density} with epsilon {epsilon} gives keep probabilities from {density - epsilon:.4g} to "
            f"{density + epsilon:.4g}, wanted in (0, 1): choose an epsilon below {room:.4g}, or another density"
        )


def _pairs(density: PerModel, epsilon: PerModel) -> list[tuple[float, float]]:
    """Density and ε of each model, where both are plain numbers."""
    many = [value for value in (density, epsilon) if isinstance(value, list | tuple)]
    count = max(map(len, many), default=1)
    spread = [list(v) if isinstance(v, list | tuple) else [v] * count for v in (density, epsilon)]
    return [(d, e) for d, e in zip(*spread, strict=False) if isinstance(d, int | float) and isinstance(e, int | float)]


def rank_drop(density: PerModel = REQUIRED, epsilon: PerModel = 0.15) -> Sparsifier:
    r"""Keep at random, larger magnitudes of a row more likely: p from density − ε to density + ε by rank (DELLA).

    A row is the last axis. Density 0 and 1 mean what they say, whatever ε; between them density ± ε must lie in (0, 1),
    else density would not be the mean of p. Numbers are held to that; where either depends on the leaf, p is cut.

    Raises:
      ValueError: a density ± ε outside (0, 1).
    """
    for one, far in _pairs(density, epsilon):
        check_room(one, far)
    chance = functools.partial(order.probability, name="density")
    return Sparsifier(
        "rank_drop",
        _rank_drop,
        {"density": density, "epsilon": epsilon},
        {"density": chance},
        random=True,
        aside=host.ranks,
    )


def _variance_select(x: Operands, *, select_topk: Array) -> Keep:
    deltas = x.after().deltas  # not held for what is kept of them
    mean = sum(deltas[1:], start=deltas[0]) / len(deltas)
    # The one array of the leaf's size that is held: squares and sums round as the compiler contracts them.
    variance = jax.lax.optimization_barrier(
        sum((jnp.square(d - mean) for d in deltas), start=jnp.zeros_like(mean)) / len(deltas)
    )
    (nonzero,) = passes.sums([(variance > 0).astype(jnp.uint32)])
    ((most,),) = cut.cuts(lambda stored: stored, (variance,), [[order.share_of(select_topk, nonzero)]])

    def keep(x: Operands) -> list[Kept]:
        chosen = most.mask(variance) | (select_topk[0] >= select_topk[1])  # 1 keeps all, also where the models agree
        return [(jnp.where(chosen, d, 0), None) for d in x.deltas]

    return keep


def variance_select(select_topk: Coefficient = REQUIRED) -> Sparsifier:
    r"""Keep the ⌊select_topk·m⌋ elements of largest variance over the models, m those of nonzero variance (SCE)."""
    ratio = functools.partial(order.fraction, name="select_topk")
    return Sparsifier(
        "variance_select",
        _variance_select,
        {"select_topk": select_topk},
        {"select_topk": ratio},
        shared=("select_topk",),
    )


def expected(kept: Array, probability: Array | None) -> Array:
    """Divide by the keep probability, so that the expectation is the delta; zero where nothing is kept ("inverse")."""
    assert probability is not None
    return kept / jnp.where(probability > 0, probability, 1)


def l1_factors(kept: Sequence[Array], deltas: Sequence[Array]) -> list[Array]:
    r"""Return $\|\delta\|_1 / \|\mathrm{kept}\|_1$ of each tensor, 1 where nothing is kept ("l1", mergekit's)."""
    # In one pass over all models, for each would read the base again.
    totals = passes.sums([jnp.abs(array) for array in (*deltas, *kept)])
    pairs = zip(totals[: len(deltas)], totals[len(deltas) :], strict=True)
    return [jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 1) for before, after in pairs]


def check_rescale(how: Any, sparsifier: Sparsifier | None) -> None:
    """Raise if `how` is no way of rescaling what `sparsifier` keeps."""
    if how not in RESCALES:
        raise ValueError(f"rescale={how!r}, wanted one of {', '.join(map(repr, RESCALES))}")
    if how == "inverse" and (sparsifier is None or not sparsifier.random):
        raise ValueError(
            "rescale='inverse' divides by a keep probability, which only random sparsifiers have; use 'l1'"
        )
