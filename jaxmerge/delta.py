r"""Rules of task vectors: sparsify → rescale → consensus → add.

TIES, DARE, DELLA, breadcrumbs and SCE are all
$\theta_b + \lambda\,\mathrm{consensus}_i(w_i, \mathrm{rescale}(\mathrm{sparsify}(\theta_i - \theta_b)))$.
Each rule here says of which parts; `jaxmerge.sparse` computes the formula, and `delta_rule` makes rules of other parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxmerge.consensus import (
    elect_sign,
    elect_sign_by_energy,
    elect_sign_by_energy_mergekit,
    elect_sign_unweighted,
    weighted_sum,
)
from jaxmerge.contract import check_compat, requires
from jaxmerge.sparse import Rescale, merge_deltas
from jaxmerge.sparsify import drop, rank_drop, trim, two_sided_trim, variance_select
from jaxmerge.tree import Array, PyTree
from jaxmerge.where import Coefficient, PerModel


@requires(base="required", key="required", symmetric=True)
def dare(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    density: PerModel,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    normalize: bool = False,
    rescale: Rescale = "inverse",
) -> PyTree:
    r"""Drop and rescale (DARE): $\theta_b + \lambda \sum_i w_i\, m_i \odot \tau_i / q_i$.

    m is drawn from Bernoulli(q). In expectation this is task arithmetic. The mask of a leaf depends on the key, the
    leaf's path and the model's name, on nothing else; without `names` models are named by position, so that order
    matters.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key: PRNG key (threefry).
      names: N distinct names of the models, for their masks; without them models are named by position.
      stacked: containers whose leaves have a leading layer axis.
      density: q = 1 − p, the keep probability, one a model or one for all; 1 keeps all.
      weights: $w_i$, one a model or one for all.
      scale: $\lambda$, which the sum is multiplied by.
      normalize: divide the sum by Σw, by 1 where that is zero.
      rescale: "inverse" divides by the keep probability (the paper's); "l1" keeps the L1 norm of the tensor
        (mergekit's); None leaves what is kept as it is.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tuned, base = {"w": jnp.array([3.0, 5.0])}, {"w": jnp.array([1.0, 1.0])}
      >>> dare([tuned], base=base, key=jax.random.key(0), density=1.0)
      {'w': Array([3., 5.], dtype=float32)}

    References:
      Yu et al., "Language Models are Super Mario", https://arxiv.org/abs/2311.03099
    """
    return merge_deltas(
        models, drop(density), weighted_sum, base=base, key=key, names=names, stacked=stacked,
        weights=weights, scale=scale, normalize=normalize, rescale=rescale,
    )  # fmt: skip


@requires(base="required", key="required", symmetric=True)
def dare_ties(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    density: PerModel,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    normalize: bool = False,
    rescale: Rescale = "inverse",
) -> PyTree:
    r"""Drop and rescale (DARE), then sum the deltas that agree with the elected sign (TIES).

    $\theta_b + \lambda \sum_i M_i w_i\, m_i \odot \tau_i / q_i$ with the masks m of `dare` and the election M of
    `ties`.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key: PRNG key (threefry).
      names: N distinct names of the models, for their masks; without them models are named by position.
      stacked: containers whose leaves have a leading layer axis.
      density: q, the keep probability, one a model or one for all.
      weights: $w_i$, one a model or one for all.
      scale: $\lambda$, which the sum is multiplied by.
      normalize: average those that agree, in place of their sum.
      rescale: "inverse" divides by the keep probability (the paper's); "l1" keeps the L1 norm of the tensor
        (mergekit's); None leaves what is kept as it is.

    References:
      Yu et al., "Language Models are Super Mario", https://arxiv.org/abs/2311.03099
    """
    return merge_deltas(
        models, drop(density), elect_sign, base=base, key=key, names=names, stacked=stacked,
        weights=weights, scale=scale, normalize=normalize, rescale=rescale,
    )  # fmt: skip


@requires(base="required", symmetric=True)
def ties(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    density: PerModel,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    normalize: bool = True,
    rescale: Literal["l1"] | None = None,
    weighted_election: bool = True,
) -> PyTree:
    r"""Trim, elect sign, disjoint mean (TIES).

    $\theta_b + \lambda \sum_i M_i w_i d_i / \sum_i M_i w_i$, with $d_i$ the k = max(1, ⌊density·n⌋) largest
    of $\tau_i$, $s = \mathrm{sign}\sum_i w_i d_i$, and M where sign(w d) = s. The election is by weighted
    deltas, as mergekit's, or by the deltas themselves, as the paper's: $s = \mathrm{sign}\sum_i d_i$.
    Equal magnitudes at the cut: the lower flat index is kept.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      density: share kept, one a model or one for all; the paper's 0.2.
      weights: $w_i$, one a model or one for all.
      scale: $\lambda$, which the sum is multiplied by.
      normalize: False leaves the sum undivided.
      rescale: "l1" keeps the L1 norm of the tensor; None leaves what is kept as it is.
      weighted_election: False elects as the paper does.

    Example:
      >>> import jax.numpy as jnp
      >>> one, two = {"w": jnp.array([3.0, 1.0, 0.1])}, {"w": jnp.array([1.0, -2.0, 0.1])}
      >>> ties([one, two], base={"w": jnp.zeros(3)}, density=0.7)
      {'w': Array([ 2., -2.,  0.], dtype=float32)}

    References:
      Yadav et al., "TIES-Merging", https://arxiv.org/abs/2306.01708
    """
    elect = elect_sign if weighted_election else elect_sign_unweighted
    return merge_deltas(
        models, trim(density), elect, base=base, stacked=stacked,
        weights=weights, scale=scale, normalize=normalize, rescale=rescale,
    )  # fmt: skip


@requires(base="required", key="required", symmetric=True)
def della(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    density: PerModel,
    epsilon: PerModel = 0.15,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    normalize: bool = True,
    rescale: Rescale = "inverse",
) -> PyTree:
    r"""Drop by rank, rescale, elect sign, average (DELLA).

    $\theta_b + \lambda \sum_i M_i w_i d_i / \sum_i M_i w_i$ with $d_i = m_i \odot \tau_i / p_i$.
    The keep probability p of an element runs from density − epsilon (smallest magnitude of its row, the last
    axis) to density + epsilon (largest); kept ones are divided by it. M is the election of `ties`.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key: PRNG key (threefry).
      names: N distinct names of the models, for their masks; without them models are named by position.
      stacked: containers whose leaves have a leading layer axis.
      density: the mean keep probability, one a model or one for all.
      epsilon: how far the keep probability goes from density at either end of a row, one a model or one for all.
      weights: $w_i$, one a model or one for all.
      scale: $\lambda$, which the sum is multiplied by.
      normalize: False leaves the sum undivided.
      rescale: "inverse" divides by the keep probability (the paper's); "l1" keeps the L1 norm of the tensor
        (mergekit's); None leaves what is kept as it is.

    References:
      Deep et al., "DELLA-Merging", https://arxiv.org/abs/2406.11617
    """
    return merge_deltas(
        models, rank_drop(density, epsilon), elect_sign, base=base, key=key, names=names, stacked=stacked,
        weights=weights, scale=scale, normalize=normalize, rescale=rescale,
    )  # fmt: skip


@requires(base="required", key="required", symmetric=True)
def della_linear(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    density: PerModel,
    epsilon: PerModel = 0.15,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    normalize: bool = False,
    rescale: Rescale = "inverse",
) -> PyTree:
    r"""Drop by rank and rescale as `della`, then the weighted sum.

    $\theta_b + \lambda \sum_i w_i\, m_i \odot \tau_i / p_i$ with the keep probabilities p of `della`.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key: PRNG key (threefry).
      names: N distinct names of the models, for their masks; without them models are named by position.
      stacked: containers whose leaves have a leading layer axis.
      density: the mean keep probability, one a model or one for all.
      epsilon: how far the keep probability goes from density at either end of a row, one a model or one for all.
      weights: $w_i$, one a model or one for all.
      scale: $\lambda$, which the sum is multiplied by.
      normalize: divide the sum by Σw, by 1 where that is zero.
      rescale: "inverse" divides by the keep probability (the paper's); "l1" keeps the L1 norm of the tensor
        (mergekit's); None leaves what is kept as it is.

    References:
      Deep et al., "DELLA-Merging", https://arxiv.org/abs/2406.11617
    """
    return merge_deltas(
        models, rank_drop(density, epsilon), weighted_sum, base=base, key=key, names=names, stacked=stacked,
        weights=weights, scale=scale, normalize=normalize, rescale=rescale,
    )  # fmt: skip


@requires(base="required", symmetric=True)
def breadcrumbs(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    density: PerModel,
    gamma: PerModel = 0.01,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    normalize: bool = False,
    rescale: Literal["l1"] | None = None,
) -> PyTree:
    r"""Drop the largest and the smallest of each delta, then the weighted sum (model breadcrumbs).

    $\theta_b + \lambda \sum_i w_i d_i$: of the n elements of $\tau_i$ the ⌊gamma·n⌋ largest magnitudes go,
    the next ⌊density·n⌋ stay (fewer outliers go where density + gamma > 1).

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      density: share kept, one a model or one for all.
      gamma: share of the largest magnitudes that is dropped first, one a model or one for all.
      weights: $w_i$, one a model or one for all.
      scale: $\lambda$, which the sum is multiplied by.
      normalize: divide the sum by Σw, by 1 where that is zero.
      rescale: "l1" keeps the L1 norm of the tensor; None leaves what is kept as it is.

    References:
      Davari and Belilovsky, "Model Breadcrumbs", https://arxiv.org/abs/2312.06795
    """
    return merge_deltas(
        models, two_sided_trim(density, gamma), weighted_sum, base=base, stacked=stacked,
        weights=weights, scale=scale, normalize=normalize, rescale=rescale,
    )  # fmt: skip


@requires(base="required", symmetric=True)
def breadcrumbs_ties(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    density: PerModel,
    gamma: PerModel = 0.01,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    normalize: bool = False,
    rescale: Literal["l1"] | None = None,
) -> PyTree:
    r"""Drop the largest and the smallest as `breadcrumbs`, then sum the deltas that agree with the elected sign.

    $\theta_b + \lambda \sum_i M_i w_i d_i$ with the election M of `ties`.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      density: share kept, one a model or one for all.
      gamma: share of the largest magnitudes that is dropped first, one a model or one for all.
      weights: $w_i$, one a model or one for all.
      scale: $\lambda$, which the sum is multiplied by.
      normalize: average those that agree, in place of their sum.
      rescale: "l1" keeps the L1 norm of the tensor; None leaves what is kept as it is.

    References:
      Davari and Belilovsky, "Model Breadcrumbs", https://arxiv.org/abs/2312.06795
    """
    return merge_deltas(
        models, two_sided_trim(density, gamma), elect_sign, base=base, stacked=stacked,
        weights=weights, scale=scale, normalize=normalize, rescale=rescale,
    )  # fmt: skip


@requires(base="required", symmetric=True)
def sce(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    select_topk: Coefficient = 1.0,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    normalize: bool = True,
    rescale: Literal["l1"] | None = None,
    compat: Literal["mergekit"] | None = None,
) -> PyTree:
    r"""Select by variance, calculate weights, erase minorities (SCE).

    $\theta_b + \lambda \sum_i M_i v_i d_i / \sum_i M_i v_i$: keep the ⌊select_topk·m⌋ elements of largest
    variance over the models (m: of nonzero variance); weigh each model by its share of mean(d²), v; elect the sign by
    the unweighted deltas, M; average those that agree.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      select_topk: share kept, of the elements on which the models differ.
      weights: factors of $v_i$, one a model or one for all.
      scale: $\lambda$, which the sum is multiplied by.
      normalize: False leaves the sum undivided.
      rescale: "l1" keeps the L1 norm of the tensor; None leaves what is kept as it is.
      compat: "mergekit" brings back its absolute floors (uniform weights for small deltas).

    References:
      Wan et al., "FuseChat", https://arxiv.org/abs/2408.07990
    """
    check_compat(compat)
    consensus = elect_sign_by_energy_mergekit if compat else elect_sign_by_energy
    return merge_deltas(
        models, variance_select(select_topk), consensus, base=base, stacked=stacked,
        weights=weights, scale=scale, normalize=normalize, rescale=rescale,
    )  # fmt: skip
