r"""Rules whose coefficients the task vectors tell: by the angle between them, and by their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp

from jaxmerge import passes
from jaxmerge.consensus import weighted_sum
from jaxmerge.contract import check_compat, requires
from jaxmerge.leaves import Operands, leafwise
from jaxmerge.spherical import gram
from jaxmerge.tree import Array, PyTree
from jaxmerge.where import Coefficient, PerModel


def _model_stock(x: Operands, *, filter_wise: bool, floor: float) -> Array:
    x = x.after()
    assert x.base is not None
    count, deltas = len(x.models), x.deltas
    if filter_wise and x.base.ndim:
        products = jnp.stack([jnp.stack([jnp.sum(a * b, axis=-1, keepdims=True) for b in deltas]) for a in deltas])
    else:
        products = gram(deltas)
    cosines = []
    for i in range(count):
        for j in range(i + 1, count):
            square_a, square_b = products[i, i], products[j, j]
            moved = (square_a != 0) & (square_b != 0)
            # The roots apart: their squares multiplied would leave float32's range for small deltas.
            product = jnp.sqrt(jnp.where(moved, square_a, 1)) * jnp.sqrt(jnp.where(moved, square_b, 1))
            product = jnp.maximum(product, floor) if floor else product
            cosines.append(jnp.where(moved, jnp.clip(products[i, j] / product, -1, 1), 0))
    cosine = sum(cosines[1:], start=cosines[0]) / len(cosines)
    divisor = 1 + (count - 1) * cosine
    # Deltas that cancel: no finite estimate, keep the base.
    singular = jnp.abs(divisor) < 1e-6
    t = jnp.where(singular, 0, count * cosine / jnp.where(singular, 1, divisor))
    x = x.after(t)
    assert x.base is not None
    return x.base + t * (sum(x.deltas[1:], start=x.deltas[0]) / count)


@requires(least=2, base="required", symmetric=True)
def model_stock(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    filter_wise: bool = False,
    compat: Literal["mergekit"] | None = None,
) -> PyTree:
    r"""Go from the base towards the mean as far as the task vectors agree: $\theta_b + t\,\bar\tau$.

    $t = N c / (1 + (N-1) c)$ with c the mean cosine between pairs of task vectors, of each tensor.

    Args:
      models: N ≥ 2 tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      filter_wise: one cosine for each row (last axis) in place of one for the tensor.
      compat: "mergekit" puts a floor of 1e-6 under the product of norms, so that the result depends on the
        scale of the deltas.

    Example:
      >>> one, two = {"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([2.0, 0.0])}
      >>> model_stock([one, two], base={"w": jnp.zeros(2)})
      {'w': Array([2., 0.], dtype=float32)}

    References:
      Jang et al., "Model Stock", https://arxiv.org/abs/2403.19522
    """
    check_compat(compat)
    options = {"filter_wise": bool(filter_wise), "floor": 1e-6 if compat else 0.0}
    return leafwise(_model_stock, models, base=base, stacked=stacked, options=options)


def _norm_aware(x: Operands, *, weights: Array, scale: Array) -> Array:
    x = x.after()
    squares = jnp.stack(passes.sums([jnp.square(delta) for delta in x.deltas]))
    moved = squares > 0
    shares = jnp.where(moved, weights / jnp.sqrt(jnp.where(moved, squares, 1)), 0)
    x = x.after(shares)
    assert x.base is not None
    return x.base + scale * weighted_sum(x.deltas, shares, normalize=True)


@requires(base="required", symmetric=True)
def norm_aware(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
) -> PyTree:
    r"""Weigh each change by its inverse length: $\theta_b + \lambda\sum_i c_i\tau_i / \sum_i c_i$.

    $c_i = w_i/\|\tau_i\|$ with the length in each tensor. A model that did not change a tensor has no part in it: its
    weight would be infinite, and would take away what the others learned there.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: w, one a model or one for all. Where the c sum to zero, the sum is undivided.
      scale: λ.

    Example:
      >>> one, two = {"w": jnp.array([4.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
      >>> print(norm_aware([one, two], base={"w": jnp.zeros(2)})["w"].round(3))
      [0.8 0.8]

    References:
      Si et al., "NAN", https://arxiv.org/abs/2505.16148 (norm-aware coefficients)
    """
    return leafwise(_norm_aware, models, base=base, stacked=stacked, shared={"scale": scale}, each={"weights": weights})
