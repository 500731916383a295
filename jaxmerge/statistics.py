r"""Rules that use statistics of the models or of data: Fisher-weighted and RegMean averages, grafting."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge import order, tree, where
from jaxmerge.arithmetic import check_sum
from jaxmerge.contract import requires
from jaxmerge.leaves import Operands, leafwise
from jaxmerge.tree import Array, PyTree
from jaxmerge.where import Coefficient, PerModel


def _fisher(x: Operands, *, weights: Array, floor: Array) -> Array:
    importance = [w * (f + floor) for w, f in zip(weights, x.extra, strict=True)]
    total = sum(importance[1:], start=importance[0])
    # From the first model, so that models that agree stay as they are where all information is zero.
    first = x.models[0]
    moved = sum((f * (m - first) for f, m in zip(importance, x.models, strict=True)), start=jnp.zeros_like(first))
    return first + moved / jnp.where(total == 0, 1, total)


@requires(symmetric=True, elementwise=True)
def fisher(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    fishers: Sequence[PyTree],
    weights: PerModel = 1.0,
    floor: Coefficient = 1e-6,
) -> PyTree:
    r"""Average by information: $\sum_i w_i F_i \theta_i / \sum_i w_i F_i$, element by element.

    Args:
      models: N models.
      base, key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      fishers: N pytrees like the models: diagonal Fisher information, the mean squared gradient.
      weights: one a model. Concrete ones that sum to zero at a leaf are an error.
      floor: added to F, in its units: where no model has information, the plain weighted average.

    Example:
      >>> one, two = {"w": jnp.array([0.0])}, {"w": jnp.array([4.0])}
      >>> fisher([one, two], fishers=[{"w": jnp.array([3.0])}, {"w": jnp.array([1.0])}], floor=0.0)
      {'w': Array([1.], dtype=float32)}

    References:
      Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", https://arxiv.org/abs/2111.09832
    """
    _check_count("fisher", "fishers", fishers, len(models))
    return leafwise(
        _fisher,
        models,
        extra=fishers,
        stacked=stacked,
        shared={"floor": floor},
        each={"weights": weights},
        check={"weights": functools.partial(check_sum, rule="fisher")},
    )


# By default GPUs multiply float32 in TF32 and TPUs in bfloat16.
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _regmean(x: Operands, *, damping: Array) -> Array:
    first = x.models[0]
    mean = sum(x.models[1:], start=first) / len(x.models)
    if not x.extra:
        return mean  # no Gram matrices of this leaf
    diagonal = jnp.eye(first.shape[-1], dtype=first.dtype)
    kept = [(1 - damping) * gram + damping * gram * diagonal for gram in x.extra]
    total = sum(kept[1:], start=kept[0])
    # A feature never seen has no row in the sum: a ridge far under the mean keeps the system solvable.
    total = total + diagonal * (1e-6 * jnp.trace(total) / total.shape[0] + 1e-30)
    pulled = sum((_product(m - mean, g) for m, g in zip(x.models, kept, strict=True)), start=jnp.zeros_like(first))
    # The inverse of [in, in] on every device, for the rows of `pulled` may be sharded.
    return mean + _product(pulled, jnp.linalg.inv(total))


@requires(symmetric=True)
def regmean(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    grams: Sequence[Mapping[str, Array]],
    damping: Coefficient = 0.1,
) -> PyTree:
    r"""Merge linear layers so that outputs change least: $W = (\sum_i W_i G_i)(\sum_i G_i)^{-1}$.

    With W [out, in], as Hugging Face keeps it, and $G_i = X_i^\top X_i$ [in, in] of the layer's inputs
    under model i. Leaves without a Gram matrix are averaged.

    Args:
      models: N models.
      base, key, names: not used.
      stacked: containers whose leaves have a leading layer axis; none of them may have Gram matrices.
      grams: N mappings from leaf path to G.
      damping: share by which off-diagonal entries shrink (0.1 is the paper's α = 0.9).

    Example:
      >>> one, two = {"w": jnp.array([[0.0]])}, {"w": jnp.array([[4.0]])}
      >>> grams = [{"w": jnp.array([[3.0]])}, {"w": jnp.array([[1.0]])}]
      >>> print(regmean([one, two], grams=grams)["w"].round(4))
      [[1.]]

    References:
      Jin et al., "Dataless Knowledge Fusion", https://arxiv.org/abs/2212.09849
    """
    _check_count("regmean", "grams", grams, len(models))
    trees = tree.align(models)
    for path in dict.fromkeys(path for gram in grams for path in gram):
        if path not in trees.paths:
            raise ValueError(f"regmean: grams name {path!r}, which is no leaf of the models ({trees.paths[0]!r}, …)")
        weight = trees.models[0][trees.paths.index(path)]
        if not tree.is_array(weight):
            continue  # set aside by a mask
        is_matrix = len(weight.shape) == 2 and where.layer_paths(path, weight.shape, stacked) is None
        for i, gram in enumerate(grams):
            wanted = (weight.shape[-1],) * 2 if is_matrix else "a 2-D leaf, not stacked"
            found = gram[path].shape if path in gram else "none"
            if found != wanted:
                raise ValueError(f"regmean: grams[{i}] of leaf {path!r} has shape {found}, wanted {wanted}")
    return leafwise(_regmean, models, stacked=stacked, shared={"damping": damping}, beside=grams)


def _grafting(x: Operands) -> Array:
    assert x.base is not None
    (delta,), (mask,) = x.deltas, x.extra
    return x.base + mask * delta


@requires(most=1, base="required")
def grafting(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    mask: PyTree,
) -> PyTree:
    r"""Graft a part of the tuned model onto the base: $\theta_b + \gamma \odot \tau$.

    Args:
      models: [tuned].
      base: the model before training.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      mask: γ, a pytree like the models in floating dtypes, 0 base … 1 tuned; `graft_mask` gives a start, a
        loss differentiated with respect to S in γ = σ(S) the learned one.

    Example:
      >>> grafting([{"w": jnp.array([3.0, 5.0])}], base={"w": jnp.ones(2)}, mask={"w": jnp.array([1.0, 0.0])})
      {'w': Array([3., 1.], dtype=float32)}

    References:
      Panigrahi et al., "Task-Specific Skill Localization", https://arxiv.org/abs/2302.06600
    """
    return leafwise(_grafting, models, base=base, extra=[mask], stacked=stacked)


def _graft_mask(x: Operands, *, density: Array) -> Array:
    return order.top(jnp.abs(x.deltas[0]), density).astype(x.models[0].dtype)


def graft_mask(tuned: PyTree, base: PyTree, *, density: Coefficient, stacked: Sequence[str] = ()) -> PyTree:
    r"""Return the mask of the ⌊density·n⌋ largest changes of each leaf, 0 or 1, in the leaves' dtypes.

    Example:
      >>> graft_mask({"w": jnp.array([3.0, 5.0])}, {"w": jnp.ones(2)}, density=0.5)
      {'w': Array([0., 1.], dtype=float32)}
    """
    return leafwise(
        _graft_mask,
        [tuned],
        base=base,
        stacked=stacked,
        shared={"density": density},
        convert={"density": lambda value, n: order.share(value, n, name="density")},
    )


def _check_count(rule: str, name: str, given: Any, count: int) -> None:
    if isinstance(given, Mapping) or len(given) != count:
        found = type(given).__name__ if isinstance(given, Mapping) else f"{len(given)} entries"
        raise ValueError(f"{rule}: {name} must be a list with one entry a model, {count}; found {found}")
