r"""Rules on the singular values and vectors of the task vectors, matrix by matrix.

A leaf that is no matrix takes the mean of its weighted task vectors. Every decomposition is of a whole matrix, which a
mesh gathers on each device. Singular vectors have a derivative only where singular values differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from jaxmerge.contract import requires
from jaxmerge.decompose import polar, product, svd
from jaxmerge.leaves import Operands, leafwise
from jaxmerge.tree import Array, PyTree, or_one
from jaxmerge.where import Coefficient, PerModel

Deltas = Sequence[Array]


def _total(deltas: Deltas) -> Array:
    return sum(deltas[1:], start=deltas[0])


def _of_matrices(merge: Callable[..., Array]) -> Callable[..., Array]:
    """Make a leaf function of one that merges the task vectors of a matrix, each times its weight."""

    def leaf(x: Operands, *, weights: Array, scale: Array, **coefficients: Array) -> Array:
        assert x.base is not None
        deltas = [w * delta for w, delta in zip(weights, x.deltas, strict=True)]
        is_matrix = x.base.ndim == 2 and x.base.size
        merged = merge(deltas, **coefficients) if is_matrix else _total(deltas) / len(deltas)
        return x.base + scale * merged

    return leaf


def _kept(values: Array, tolerance: Array) -> Array:
    """1 for singular values above the tolerance, 0 for those of rounding noise."""
    return (values > tolerance * jnp.max(values)).astype(values.dtype)


@_of_matrices
def _tsvm(deltas: Deltas, *, tolerance: Array) -> Array:
    count = max(1, min(deltas[0].shape) // len(deltas))
    u, s, v = zip(*map(svd, deltas), strict=True)
    values = jnp.concatenate([x[:count] for x in s])
    kept = _kept(values, tolerance)
    left = polar(jnp.concatenate([x[:, :count] for x in u], axis=1) * kept)
    right = polar(jnp.concatenate([x[:count] for x in v], axis=0) * kept[:, None])
    return product(left * (values * kept), right)


@requires(base="required", symmetric=True)
def tsvm(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    tolerance: Coefficient = 1e-5,
) -> PyTree:
    r"""Sum each model's leading singular directions, made orthogonal: $\theta_b + \lambda\,U_\perp S V_\perp^\top$.

    Of every $w_i\tau_i = U_i S_i V_i^\top$ the ⌊r/N⌋ largest singular triples are kept, at least one. U and V are the
    kept vectors of all models side by side, S their values, and $U_\perp$, $V_\perp$ the nearest matrices with
    orthonormal columns. Vectors with a value of 0, which low-rank changes have, are any; they would turn the others, so
    that those below `tolerance` are left out; 0 is the paper's rule.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: w, one a model or one for all.
      scale: λ.
      tolerance: singular values up to this share of the largest count as 0.

    Example:
      >>> one, two = {"w": jnp.diag(jnp.array([2.0, 0.0]))}, {"w": jnp.diag(jnp.array([0.0, 4.0]))}
      >>> print(jnp.abs(tsvm([one, two], base={"w": jnp.zeros((2, 2))})["w"]).round(3))
      [[2. 0.]
       [0. 4.]]

    References:
      Gargiulo et al., "Task Singular Vectors", https://arxiv.org/abs/2412.00081 (TSV-M)
    """
    return leafwise(
        _tsvm, models, base=base, stacked=stacked, shared={"scale": scale, "tolerance": tolerance},
        each={"weights": weights},
    )  # fmt: skip


def _level(values: Array, tolerance: Array) -> Array:
    """The mean of the singular values that are above the tolerance in each of their places, 0 in the others."""
    kept = _kept(values, tolerance)
    return kept * jnp.sum(kept * values) / jnp.maximum(jnp.sum(kept), 1)


@_of_matrices
def _iso_c(deltas: Deltas, *, tolerance: Array) -> Array:
    u, s, v = svd(_total(deltas))
    return product(u * _level(s, tolerance), v)


@requires(base="required", symmetric=True)
def iso_c(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    tolerance: Coefficient = 1e-5,
) -> PyTree:
    r"""Give all directions of the summed change the same length: $\theta_b + \lambda\,\bar\sigma\,U V^\top$.

    $U \Sigma V^\top = \sum_i w_i \tau_i$, and $\bar\sigma$ is the mean singular value. The rule is ill-posed where the
    sum is nearly singular, as sums of low-rank changes are: it lifts directions of rounding noise to the mean. So those
    below `tolerance` times the largest stay at 0 and do not count in the mean; 0 is the paper's rule.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: w, one a model or one for all.
      scale: λ.
      tolerance: singular values up to this share of the largest count as 0.

    Example:
      >>> tuned = {"w": jnp.diag(jnp.array([3.0, 1.0]))}
      >>> print(iso_c([tuned], base={"w": jnp.zeros((2, 2))})["w"].round(3))
      [[2. 0.]
       [0. 2.]]

    References:
      Marczak et al., "No Task Left Behind: Isotropic Model Merging", https://arxiv.org/abs/2502.04959 (Iso-C)
    """
    return leafwise(
        _iso_c, models, base=base, stacked=stacked, shared={"scale": scale, "tolerance": tolerance},
        each={"weights": weights},
    )  # fmt: skip


@_of_matrices
def _iso_cts(deltas: Deltas, *, tolerance: Array, common: float) -> Array:
    rank, count = min(deltas[0].shape), len(deltas)
    own = round((rank - int(rank * common)) / count)
    shared = rank - own * count
    u, s, v = svd(_total(deltas))
    u, s, v = u[:, :shared], s[:shared], v[:shared]
    # What of a task lies outside the common directions, the largest of it.
    rests = [svd(delta - product(u, product(u.T, delta))) for delta in deltas] if own else []
    values = jnp.concatenate([*(rest[1][:own] for rest in rests), s])
    kept = _kept(values, tolerance)
    left = polar(jnp.concatenate([*(rest[0][:, :own] for rest in rests), u], axis=1) * kept)
    right = polar(jnp.concatenate([*(rest[2][:own] for rest in rests), v], axis=0) * kept[:, None])
    return product(left * _level(values, tolerance), right)


@requires(base="required", symmetric=True)
def iso_cts(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    tolerance: Coefficient = 1e-5,
    common: float = 0.8,
) -> PyTree:
    r"""Iso-C with directions of the single tasks: $\theta_b + \lambda\,\bar\sigma\,U_\perp V_\perp^\top$.

    U holds the leading left vectors $U_c$ of $\sum_i w_i \tau_i$, a share `common` of them, and of each task the
    leading ones of what is left, $(I - U_c U_c^\top)\, w_i \tau_i$, as many for every task; V holds the right ones.
    $\bar\sigma$ is the mean of their singular values, and ⊥ the nearest matrix with orthonormal columns.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: w, one a model or one for all.
      scale: λ.
      tolerance: see `iso_c`.
      common: share of the directions that are common, rounded so that every task has as many of its own.

    Example:
      >>> one, two = {"w": jnp.diag(jnp.array([3.0, 1.0]))}, {"w": jnp.diag(jnp.array([1.0, 3.0]))}
      >>> print(iso_cts([one, two], base={"w": jnp.zeros((2, 2))})["w"].round(3))
      [[4. 0.]
       [0. 4.]]

    References:
      Marczak et al., "No Task Left Behind: Isotropic Model Merging", https://arxiv.org/abs/2502.04959 (Iso-CTS)
    """
    if not 0 <= common <= 1:
        raise ValueError(f"iso_cts: common is {common}, wanted a share in [0, 1]")
    return leafwise(
        _iso_cts, models, base=base, stacked=stacked, shared={"scale": scale, "tolerance": tolerance},
        each={"weights": weights}, options={"common": float(common)},
    )  # fmt: skip


@_of_matrices
def _wudi(deltas: Deltas, *, damping: Array) -> Array:
    start = _total(deltas)
    grams = [product(delta.T, delta) / or_one(jnp.sum(delta * delta)) for delta in deltas]
    total = sum(grams[1:], start=grams[0])
    pulled = sum((product(delta - start, g) for delta, g in zip(deltas, grams, strict=True)), jnp.zeros_like(start))
    # Directions in which no task moved have no part in the objective: a ridge far under the mean keeps them.
    ridge = damping * jnp.trace(total) / len(total) + 1e-30
    # The inverse of [in, in] on every device, for the rows of `pulled` may be sharded.
    return start + product(pulled, jnp.linalg.inv(total + ridge * jnp.eye(len(total), dtype=total.dtype)))


@requires(base="required", symmetric=True)
def wudi(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    damping: Coefficient = 1e-6,
) -> PyTree:
    r"""Interfere least: $\theta_b + \lambda\,\arg\min_\tau \sum_i \|(\tau-\tau_i)\tau_i^\top\|^2/\|\tau_i\|^2$.

    The objective is quadratic, so its minimum is solved for: with $G_i = \tau_i^\top\tau_i/\|\tau_i\|^2$ it is
    $\tau_0 + \sum_i(\tau_i - \tau_0) G_i\,(\sum_i G_i)^{-1}$, where $\tau_0 = \sum_i \tau_i$ is where the paper's
    optimizer starts; damping keeps to τ_0 what the objective leaves open. $\tau_i$ stands for $w_i\tau_i$.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: w, one a model or one for all.
      scale: λ.
      damping: what is added to the diagonal of ΣG, as a share of its mean.

    Example:
      >>> one, two = {"w": jnp.diag(jnp.array([2.0, 0.0]))}, {"w": jnp.diag(jnp.array([0.0, 4.0]))}
      >>> print(wudi([one, two], base={"w": jnp.zeros((2, 2))})["w"].round(3))
      [[2. 0.]
       [0. 4.]]

    References:
      Cheng et al., "Whoever Started the Interference Should End It", https://arxiv.org/abs/2503.08099 (WUDI)
    """
    return leafwise(
        _wudi, models, base=base, stacked=stacked, shared={"scale": scale, "damping": damping},
        each={"weights": weights},
    )  # fmt: skip


@_of_matrices
def _svc(deltas: Deltas, *, alpha: Array) -> Array:
    u, s, v = svd(_total(deltas))
    ours = s[:, None] * v
    ratios = []
    for delta in deltas:
        theirs = product(u.T, delta)
        square = jnp.sum(theirs * theirs, axis=1)
        ratios.append(jnp.maximum(alpha, jnp.sum(ours * theirs, axis=1) / or_one(square)))
    return product(u * (len(deltas) / _total(ratios)), ours)


@requires(base="required", symmetric=True)
def svc(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    alpha: Coefficient = 1.0,
) -> PyTree:
    r"""Shorten directions that several models share: $\theta_b + \lambda\sum_k \gamma_k\,u_k u_k^\top\sum_i w_i\tau_i$.

    $u_k$ are the left singular vectors of $\sum_i w_i\tau_i$; $a = u_k^\top \sum_i w_i\tau_i$ and
    $a_i = u_k^\top w_i\tau_i$ give $\gamma_k = N/\sum_i\max(\alpha, \langle a, a_i\rangle/\|a_i\|^2)$: N models with
    the same change are one, and orthogonal ones are summed.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: w, one a model or one for all.
      scale: λ.
      alpha: the least of the ratios; below 1, directions in which models cancel are made longer.

    Example:
      >>> tuned = {"w": jnp.diag(jnp.array([2.0, 4.0]))}
      >>> print(svc([tuned, tuned], base={"w": jnp.zeros((2, 2))})["w"].round(3))
      [[2. 0.]
       [0. 4.]]

    References:
      "Singular Value Calibration", https://arxiv.org/abs/2602.05536
    """
    return leafwise(
        _svc, models, base=base, stacked=stacked, shared={"scale": scale, "alpha": alpha}, each={"weights": weights}
    )


@_of_matrices
def _opcm(deltas: Deltas, *, alpha: Array) -> Array:
    merged, length, lengths = deltas[0], jnp.ones((), deltas[0].dtype), [jnp.linalg.norm(deltas[0])]
    for delta in deltas[1:]:
        u, s, v = svd(merged)
        # A vector that comes after more than the share alpha of the singular values is no leading one.
        leading = jnp.cumsum(s) <= alpha * jnp.sum(s)
        known = (leading[:, None] & leading[None]) | jnp.eye(len(s), dtype=bool)
        inner = product(product(u.T, delta), v.T)
        new = delta - product(product(u, jnp.where(known, inner, 0)), v)
        lengths.append(jnp.linalg.norm(delta))
        merged = length * merged + new
        length = or_one(jnp.linalg.norm(merged) / or_one(_total(lengths) / len(lengths)))
        merged = merged / length
    return merged


@requires(base="required")
def opcm(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    alpha: Coefficient = 0.5,
) -> PyTree:
    r"""Merge one model after the other, each without what is there: $\theta_b + \lambda\,\tau^{(N)}$.

    $\tau^{(1)} = \tau_1$, and $\tau^{(t)} = (\lambda_{t-1}\tau^{(t-1)} + P(\tau_t))/\lambda_t$. With
    $\tau^{(t-1)} = U\Sigma V^\top$, P takes from $U^\top\tau_t V$ its diagonal and the block of the leading vectors,
    whose singular values together have at most the share α of the sum. $\lambda_t$ gives $\tau^{(t)}$ the mean length
    of $\tau_1 … \tau_t$, here matrix by matrix; the paper takes the lengths over the whole model. The order of the
    models matters. $\tau_i$ stands for $w_i\tau_i$.

    Args:
      models: N tuned models, in the order in which they are merged.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: w, one a model or one for all.
      scale: λ.
      alpha: α; 0 projects nothing out but the diagonal.

    Example:
      >>> one, two = {"w": jnp.diag(jnp.array([2.0, 0.0]))}, {"w": jnp.array([[0.0, 0.0], [2.0, 0.0]])}
      >>> print(opcm([one, two], base={"w": jnp.zeros((2, 2))})["w"].round(3))
      [[1.414 0.   ]
       [1.414 0.   ]]

    References:
      Tang et al., "Merging Models on the Fly Without Retraining", https://arxiv.org/abs/2501.09522 (OPCM)
    """
    return leafwise(
        _opcm, models, base=base, stacked=stacked, shared={"scale": scale, "alpha": alpha}, each={"weights": weights}
    )
