r"""Linear rules: every result is a weighted sum of the inputs, $\theta = \sum_i c_i \theta_i$."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxmerge import measure
from jaxmerge.consensus import cancel, weighted_sum
from jaxmerge.contract import requires
from jaxmerge.leaves import Operands, leafwise
from jaxmerge.tree import Array, PyTree, is_concrete
from jaxmerge.where import Coefficient, PerModel


def _interpolate(x: Operands, *, t: Array) -> Array:
    a, b = x.models
    # From the nearer end, so that t = 0 gives a, t = 1 gives b and a = b gives a, each exactly.
    return jnp.where(t < 0.5, a + t * (b - a), b - (1 - t) * (b - a))


@requires(least=2, most=2, elementwise=True)
def interpolate(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    t: Coefficient = 0.5,
) -> PyTree:
    r"""Move from the first model to the second: $(1-t)\,\theta_a + t\,\theta_b$.

    Args:
      models: [a, b].
      base, key, names: not used.
      stacked: containers whose leaves have a leading layer axis (see `jaxmerge.where`).
      t: 0 gives a, 1 gives b, exactly; outside [0, 1] extrapolates. A number, a list over depth, or a dict
        pattern → value.

    Returns:
      Parameters with the structure, shapes, dtypes and shardings of a.

    Example:
      >>> interpolate([{"w": jnp.array([0.0])}, {"w": jnp.array([4.0])}], t=0.25)
      {'w': Array([1.], dtype=float32)}
    """
    return leafwise(_interpolate, models, stacked=stacked, shared={"t": t})


def _average(x: Operands, *, weights: Array, normalize: bool) -> Array:
    w = weights / weights.sum() if normalize else weights
    return sum((w[i] * model for i, model in enumerate(x.models)), start=jnp.zeros_like(x.models[0]))


@requires(symmetric=True, elementwise=True)
def average(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    weights: PerModel | None = None,
    normalize: bool = True,
) -> PyTree:
    r"""Average the models: $\sum_i w_i \theta_i / \sum_i w_i$.

    Args:
      models: N pytrees.
      base, key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: one a model, or one for all (the default: uniform). Each a number, a list over depth, or a
        dict pattern → value. Concrete ones that sum to zero at a leaf, but for rounding, are an error.
      normalize: divide by the sum of the weights; False gives $\sum_i w_i \theta_i$.

    Returns:
      Parameters with the structure, shapes, dtypes and shardings of the first model.

    Example:
      >>> average([{"w": jnp.array([0.0])}, {"w": jnp.array([4.0])}], weights=[1, 3])
      {'w': Array([3.], dtype=float32)}

    References:
      Wortsman et al., "Model soups", https://arxiv.org/abs/2203.05482
    """
    weights = 1.0 if weights is None else weights
    return leafwise(
        _average,
        models,
        stacked=stacked,
        each={"weights": weights},
        options={"normalize": bool(normalize)},
        check={"weights": functools.partial(check_sum, rule="average", optional=True)} if normalize else None,
    )


def check_sum(weights: Sequence[Any], path: str | None = None, *, rule: str, optional: bool = False) -> None:
    """Raise if weights of one leaf, one a model, are concrete and sum to zero, but for rounding: it is a divisor.

    Args:
      path: the leaf's, for the error.
      rule: the rule's name, for the error; optional: it has `normalize=False`.
    """
    if not is_concrete(weights):
        return
    entries = [float(weight) for weight in weights]
    if cancel(entries):
        at = "" if path is None else f" at leaf {path!r}"
        way_out = ", or pass normalize=False for the plain weighted sum" if optional else ""
        raise ValueError(
            f"{rule}: weights {entries} sum to zero{at}, so they cannot be normalised; change a weight{way_out}"
        )


def _task_arithmetic(x: Operands, *, weights: Array, scale: Array, normalize: bool) -> Array:
    assert x.base is not None
    return x.base + scale * weighted_sum(x.deltas, weights, normalize=normalize)


@requires(base="required", symmetric=True, elementwise=True)
def task_arithmetic(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    normalize: bool = False,
) -> PyTree:
    r"""Add task vectors to the base: $\theta_b + \lambda \sum_i w_i (\theta_i - \theta_b)$.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: w, one a model or one for all.
      scale: λ. A number, a list over depth, or a dict pattern → value.
      normalize: divide the sum by Σw, by 1 where that is zero.

    Returns:
      Parameters with the structure, shapes, dtypes and shardings of the first model.

    Example:
      >>> task_arithmetic([{"w": jnp.array([3.0])}], base={"w": jnp.array([1.0])}, scale=0.5)
      {'w': Array([2.], dtype=float32)}

    References:
      Ilharco et al., "Editing Models with Task Arithmetic", https://arxiv.org/abs/2212.04089
    """
    return leafwise(
        _task_arithmetic,
        models,
        base=base,
        stacked=stacked,
        shared={"scale": scale},
        each={"weights": weights},
        options={"normalize": bool(normalize)},
    )


def _extrapolate(x: Operands, *, alpha: Array) -> Array:
    (tuned,), (delta,) = x.models, x.deltas
    return tuned + alpha * delta


@requires(most=1, base="required", elementwise=True)
def extrapolate(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    alpha: Coefficient,
) -> PyTree:
    r"""Move past the tuned model, away from the base (ExPO): $\theta_t + \alpha(\theta_t - \theta_b)$.

    Args:
      models: [tuned].
      base: the model before training.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      alpha: step beyond tuned; 0 returns tuned, −1 the base. 0.3–0.5 for fully trained models, in the paper;
        choose it on validation data of the task's own metric. A number, a list over depth, or a dict.

    Returns:
      Parameters with the structure, shapes, dtypes and shardings of tuned.

    Example:
      >>> extrapolate([{"w": jnp.array([1.0])}], base={"w": jnp.array([0.0])}, alpha=0.5)
      {'w': Array([1.5], dtype=float32)}

    References:
      Zheng et al., "Model Extrapolation Expedites Alignment", https://arxiv.org/abs/2404.16792
    """
    return leafwise(_extrapolate, models, base=base, stacked=stacked, shared={"alpha": alpha})


def _extrapolation_merge(x: Operands, *, alphas: Array, weights: Array) -> Array:
    far = tuple(model + alphas[i] * delta for i, (model, delta) in enumerate(zip(x.models, x.deltas, strict=True)))
    return _average(Operands(far), weights=weights, normalize=True)


@requires(base="required", symmetric=True, elementwise=True)
def extrapolation_merge(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    alphas: PerModel,
    weights: PerModel | None = None,
) -> PyTree:
    r"""Extrapolate each model from the base, then average (ExMe).

    $\sum_i \lambda_i (\theta_i + \alpha_i(\theta_i - \theta_b))$, $\lambda = w / \sum w$; for two models,
    weights [β, 1 − β].

    If the task vectors lie on one line (one model is the base, or they are collinear) the result is plain
    extrapolation with another coefficient: ask `collinear(models, base=base)` first.

    Args:
      models: N tuned models, in the paper the two best checkpoints.
      base: the model before training.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      alphas: α, one a model or one for all; searched on validation data.
      weights: w, one a model; uniform by default. Concrete ones that sum to zero at a leaf are an error.

    Returns:
      Parameters with the structure, shapes, dtypes and shardings of the first model.

    Example:
      >>> one, two, base = ({"w": jnp.array([v])} for v in (1.0, 2.0, 0.0))
      >>> extrapolation_merge([one, two], base=base, alphas=[1.0, 0.5], weights=[0.5, 0.5])
      {'w': Array([2.5], dtype=float32)}

    References:
      Lin et al., "Extrapolation Merging", https://arxiv.org/abs/2503.04834
    """
    weights = 1.0 if weights is None else weights
    return leafwise(
        _extrapolation_merge,
        models,
        base=base,
        stacked=stacked,
        each={"alphas": alphas, "weights": weights},
        check={"weights": functools.partial(check_sum, rule="extrapolation_merge")},
    )


def _passthrough(x: Operands, *, scale: Array) -> Array:
    return scale * x.models[0]


@requires(most=1, elementwise=True)
def passthrough(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    scale: Coefficient = 1.0,
) -> PyTree:
    r"""Take the one model as it is, times a scale: $c\,\theta$. Of use in recipes that stack layers.

    Args:
      models: [model].
      base, key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      scale: c. A number, a list over depth, or a dict pattern → value.

    Example:
      >>> passthrough([{"w": jnp.array([2.0])}], scale=0.5)
      {'w': Array([1.], dtype=float32)}

    References:
      mergekit, https://github.com/arcee-ai/mergekit
    """
    return leafwise(_passthrough, models, stacked=stacked, shared={"scale": scale})


def collinear(models: Sequence[PyTree], *, base: PyTree) -> Array:
    r"""Return the cosines between the task vectors, [N, N]: entries near ±1 off the diagonal lie on one line.

    A zero task vector (a model equal to the base) has cosine 0 with everything, itself included: its diagonal
    entry 0 gives it away.

    Example:
      >>> base = {"w": jnp.zeros(2)}
      >>> one, two = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([2.0, 0.0])}
      >>> print(collinear([one, two], base=base))
      [[1. 1.]
       [1. 1.]]
    """
    return measure.cosines(models, base=base)
