r"""Sparsifiers of task vectors, and the rescaling that makes up for what they drop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.leafwise import Operands, leafwise, requires
from jaxmerge.tree import Array, PyTree

RESCALES = ("inverse", "l1", None)


def drop(delta: Array, key: Array, density: Array) -> Array:
    r"""Keep each element with probability `density` (1 − p), independently; set the others to zero.

    The draw for flat element j is a function of (key, j) alone, so it is the same on every mesh.
    """
    return jnp.where(jax.random.uniform(key, delta.shape, jnp.float32) < density, delta, 0)


def rescale(kept: Array, delta: Array, density: Array, how: str | None) -> Array:
    r"""Make up for dropped elements.

    "inverse": divide by the keep probability, so that the expectation is delta (the paper's).
    "l1": multiply by :math:`\|\delta\|_1 / \|\mathrm{kept}\|_1` of the tensor (mergekit's).
    None: leave as is. Where nothing is kept the result is zero.
    """
    if how is None:
        return kept
    if how == "inverse":
        return kept / jnp.where(density > 0, density, 1)
    before, after = jnp.abs(delta).sum(), jnp.abs(kept).sum()
    return kept * jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 1)


def check_rescale(how: Any) -> None:
    """Raise if `how` is no way of rescaling."""
    if how not in RESCALES:
        raise ValueError(f"rescale={how!r}, wanted one of {', '.join(map(repr, RESCALES))}")


def _dare(x: Operands, *, density: Array, weights: Array, scale: Array, how: str | None) -> Array:
    assert x.base is not None
    assert x.keys is not None
    total = jnp.zeros_like(x.base)
    for i, delta in enumerate(x.deltas):
        kept = drop(delta, x.keys[i], density[i])
        total = total + weights[i] * rescale(kept, delta, density[i], how)
    return x.base + scale * total


@requires(base="required", key="required", symmetric=True)
def dare(
    models: Sequence[PyTree],
    *,
    base=None,
    key=None,
    names=None,
    stacked=(),
    density: Any,
    weights: Any = 1.0,
    scale: Any = 1.0,
    rescale: str | None = "inverse",
) -> PyTree:
    r"""Drop and rescale (DARE): :math:`\theta_b + \lambda \sum_i w_i\, m_i \odot \tau_i / q_i`, m ~ Bernoulli(q).

    In expectation this is task arithmetic.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key: PRNG key; the mask of a leaf depends on it, the leaf's path and the model's name, nothing else.
      names: N distinct names of the models; by default their positions, so that order matters.
      stacked: containers whose leaves have a leading layer axis.
      density: q = 1 − p, the keep probability, one a model or one for all; 1 keeps all.
      weights: w, one a model or one for all.
      scale: λ.
      rescale: "inverse" (the paper's, 1/q), "l1" (keep the tensor's L1 norm: mergekit's), or None.

    Returns:
      Parameters with the structure, shapes, dtypes and shardings of the first model.

    Example:
      >>> tuned, base = {"w": jnp.array([3.0, 5.0])}, {"w": jnp.array([1.0, 1.0])}
      >>> dare([tuned], base=base, key=jax.random.key(0), density=1.0)
      {'w': Array([3., 5.], dtype=float32)}

    References:
      Yu et al., "Language Models are Super Mario", https://arxiv.org/abs/2311.03099
    """
    check_rescale(rescale)
    return leafwise(
        _dare,
        models,
        base=base,
        key=key,
        names=names,
        stacked=stacked,
        shared={"scale": scale},
        each={"density": density, "weights": weights},
        options={"how": rescale},
    )
