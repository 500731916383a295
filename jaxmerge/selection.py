r"""Rules that choose, element by element, what of a task vector to take over."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import order
from jaxmerge.contract import requires
from jaxmerge.leaves import Operands, leafwise
from jaxmerge.tree import Array, PyTree
from jaxmerge.where import Coefficient, PerModel


def _nearswap(x: Operands, *, t: Array) -> Array:
    assert x.base is not None
    (delta,) = x.deltas
    return x.base + jnp.clip(t / jnp.maximum(jnp.abs(delta), 1e-6), 0, 1) * delta


@requires(most=1, base="required", elementwise=True)
def nearswap(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    t: Coefficient,
) -> PyTree:
    r"""Take over what is near the base, hold back what is far: $\theta_b + \mathrm{clip}(t/|\tau|, 0, 1)\,\tau$.

    No element moves by more than t.

    Args:
      models: [model].
      base: the model to move.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      t: the largest move, in units of the weights.

    Example:
      >>> nearswap([{"w": jnp.array([1.0, 3.0])}], base={"w": jnp.zeros(2)}, t=2.0)
      {'w': Array([1., 2.], dtype=float32)}

    References:
      mergekit, https://github.com/arcee-ai/mergekit
    """
    return leafwise(_nearswap, models, base=base, stacked=stacked, shared={"t": t})


def divergence(x: Array, b: Array) -> Array:
    r"""Return $\mathrm{KL}(\mathrm{softmax}\,x\,\|\,\mathrm{softmax}\,b)$ of the last axis, kept as 1.

    With q = softmax b and u = (x − b) − log Σ q e^{x−b} it is $\sum q\,(u e^u - e^u + 1)$: every term is
    ≥ 0, so that nothing cancels where x is near b.
    """
    q = jax.nn.softmax(b, axis=-1)
    delta = x - b
    u = delta - jnp.log1p(jnp.sum(q * jnp.expm1(delta), axis=-1, keepdims=True))
    # u e^u − e^u + 1 = u²/2 + u³/3 + u⁴/8 + …: the closed form loses it to rounding where u is small.
    series = u * u * (1 / 2 + u * (1 / 3 + u * (1 / 8 + u * (1 / 30 + u / 144))))
    return jnp.sum(q * jnp.where(jnp.abs(u) < 0.1, series, u * jnp.exp(u) - jnp.expm1(u)), axis=-1, keepdims=True)


def _arcee_fusion(x: Operands) -> Array:
    assert x.base is not None
    (model,), (delta,) = x.models, x.deltas
    if not delta.ndim or not delta.size:
        return model  # one number, whose softmax is 1 in both, so that nothing tells them apart; or none at all
    # Computed once, so that an element at the threshold is at it for all uses (see `jaxmerge.cut.cuts`).
    importance = jax.lax.optimization_barrier(jnp.abs(delta) * divergence(model, x.base))
    n = importance.size
    # Order statistics of index ⌊q(n−1)⌋ from below, which is n − index from above.
    ks = np.array([n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75)], np.uint32)
    first, median, third = order.kth_largest(importance, jnp.asarray(ks))
    return x.base + jnp.where(importance >= median + 1.5 * (third - first), delta, 0)


@requires(most=1, base="required")
def arcee_fusion(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
) -> PyTree:
    r"""Take over the outliers of importance.

    $\theta_b + [I \ge \mathrm{median}\,I + 1.5\,\mathrm{IQR}\,I]\,\tau$ with the importance
    $I = |\tau|\cdot\mathrm{KL}_{row}$. The divergence is that of the rows' softmax (last axis), model from base,
    in a form that float32 can hold; quartiles are exact order statistics of the whole tensor.

    Args:
      models: [model].
      base: the model to move.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.

    References:
      mergekit, https://github.com/arcee-ai/mergekit
    """
    return leafwise(_arcee_fusion, models, base=base, stacked=stacked)


def _ram(x: Operands, *, epsilon: Array, r: Array, alpha: Array) -> Array:
    assert x.base is not None
    changed = [~(jnp.abs(delta) <= epsilon) for delta in x.deltas]  # NaN is a change
    count = sum((c.astype(x.base.dtype) for c in changed), start=jnp.zeros_like(x.base))
    total = jnp.zeros_like(x.base)
    for delta, mine in zip(x.deltas, changed, strict=True):
        shared = jnp.sum(mine & (count > 1), dtype=jnp.uint32).astype(x.base.dtype)
        unique = jnp.sum(mine & (count == 1), dtype=jnp.uint32).astype(x.base.dtype)
        boost = 1 + r * jnp.clip(shared / jnp.maximum(unique, epsilon), 0, alpha)
        total = total + jnp.where(mine, delta * jnp.where(count > 1, 1 / jnp.maximum(count, 1), boost), 0)
    return x.base + total


@requires(base="required", symmetric=True, elementwise=True)
def ram(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    epsilon: Coefficient = 1e-5,
) -> PyTree:
    r"""Average what several models changed, keep whole what one alone changed (reinforced agent merging).

    $\theta_b + \sum_i M_i \tau_i / \sum_i M_i$ with $M_i = [|\tau_i| > \epsilon]$: the mean is over the
    models that changed an element.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      epsilon: absolute, in units of the weights.

    Example:
      >>> one, two = {"w": jnp.array([2.0, 1.0])}, {"w": jnp.array([4.0, 0.0])}
      >>> ram([one, two], base={"w": jnp.zeros(2)})
      {'w': Array([3., 1.], dtype=float32)}

    References:
      https://arxiv.org/abs/2601.13572
    """
    return leafwise(_ram, models, base=base, stacked=stacked, shared={"epsilon": epsilon, "r": 0.0, "alpha": 0.0})


@requires(base="required", symmetric=True)
def ramplus_tl(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    epsilon: Coefficient = 1e-5,
    r: Coefficient = 0.1,
    alpha: Coefficient = 0.2,
) -> PyTree:
    r"""As `ram`, with what one model alone changed made up for its shared part, tensor by tensor.

    $\theta_b + \sum_i M_i s_i \tau_i / \sum_i M_i$. Where one model alone changed an element,
    $s_i = 1 + r\,\mathrm{clip}(\mathrm{shared}/\mathrm{unique}, 0, \alpha)$, of the counts of elements that it
    changed with and without others; elsewhere 1.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      epsilon: absolute, in units of the weights: what is no more is no change.
      r: how far $s_i$ goes beyond 1.
      alpha: the largest ratio of shared to unique elements that counts.

    References:
      https://arxiv.org/abs/2601.13572
    """
    return leafwise(_ram, models, base=base, stacked=stacked, shared={"epsilon": epsilon, "r": r, "alpha": alpha})


def _magmax(x: Operands, *, weights: Array, scale: Array) -> Array:
    assert x.base is not None
    deltas = [w * delta for w, delta in zip(weights, x.deltas, strict=True)]
    highest, lowest = functools.reduce(jnp.maximum, deltas), functools.reduce(jnp.minimum, deltas)
    return x.base + scale * jnp.where(highest >= -lowest, highest, lowest)


@requires(base="required", symmetric=True, elementwise=True)
def magmax(
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
    r"""Take of each element the largest change: $\theta_b + \lambda\,\tau_j$ with $j = \arg\max_i |w_i \tau_i|$.

    Of equally large changes of either sign the positive one is taken.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: w, one a model or one for all; what is taken over is the weighted change.
      scale: λ.

    Example:
      >>> one, two = {"w": jnp.array([2.0, 1.0])}, {"w": jnp.array([1.0, -3.0])}
      >>> magmax([one, two], base={"w": jnp.zeros(2)})
      {'w': Array([ 2., -3.], dtype=float32)}

    References:
      Marczak et al., "MagMax", https://arxiv.org/abs/2407.06322
    """
    return leafwise(_magmax, models, base=base, stacked=stacked, shared={"scale": scale}, each={"weights": weights})


def _consensus_ta(x: Operands, *, weights: Array, scale: Array, share: Array, least: int) -> Array:
    assert x.base is not None
    deltas = [w * delta for w, delta in zip(weights, x.deltas, strict=True)]
    total = sum(deltas[1:], start=deltas[0])
    votes = [(jnp.abs(delta) > share * jnp.abs(total - delta)).astype(total.dtype) for delta in deltas]
    kept = (sum(votes[1:], start=votes[0]) >= least) | ~jnp.isfinite(total)  # no vote hides what came in broken
    return x.base + scale * jnp.where(kept, total, 0)


@requires(base="required", symmetric=True, elementwise=True)
def consensus_ta(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    share: Coefficient = 0.4,
    least: int = 2,
) -> PyTree:
    r"""Keep what several models want: $\theta_b + \lambda\,[\sum_i M_i \ge k]\,\tau$ with $\tau = \sum_i w_i \tau_i$.

    The mask of model i is $M_i = [|w_i\tau_i| > \sigma\,|\tau - w_i\tau_i|]$ (TALL): its own change is not small
    beside that of the others. Elements that fewer than k masks keep stay the base's.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: w, one a model or one for all.
      scale: λ.
      share: σ; a smaller one lets more through the masks.
      least: k.

    Example:
      >>> one, two = {"w": jnp.array([2.0, 3.0])}, {"w": jnp.array([1.0, 0.1])}
      >>> consensus_ta([one, two], base={"w": jnp.zeros(2)})
      {'w': Array([3., 0.], dtype=float32)}

    References:
      Wang et al., "Localizing Task Information for Improved Model Merging and Compression",
      https://arxiv.org/abs/2405.07813 (consensus task arithmetic with TALL masks)
    """
    return leafwise(
        _consensus_ta, models, base=base, stacked=stacked, shared={"scale": scale, "share": share},
        each={"weights": weights}, options={"least": int(least)},
    )  # fmt: skip


def _tatr(x: Operands, *, weights: Array, scale: Array, region: Array) -> Array:
    assert x.base is not None
    deltas = [w * delta for w, delta in zip(weights, x.deltas, strict=True)]
    total = sum(deltas[1:], start=deltas[0])
    gradients = [jnp.abs(array) for array in x.extra or x.deltas]
    conflict = jnp.zeros_like(total)
    for j, delta in enumerate(deltas):
        others = sum((g for i, g in enumerate(gradients) if i != j), start=jnp.zeros_like(total))
        # The magnitude after the product, which no compiler then rounds together with the sum: all meshes rank alike.
        conflict = conflict + jnp.abs(delta * others)
    kept = ~order.top(conflict, region) | (conflict == 0) | ~jnp.isfinite(total)  # no mask hides what came in broken
    return x.base + scale * jnp.where(kept, total, 0)


def _outside(value: Any, n: int) -> Any:
    """How many of n elements are outside a trust region that has the share `value`."""
    return np.uint32(n) - order.share(value, n, name="region")


@requires(base="required", symmetric=True)
def tatr(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    weights: PerModel = 1.0,
    scale: Coefficient = 1.0,
    region: Coefficient = 0.99,
    gradients: Sequence[PyTree] | None = None,
) -> PyTree:
    r"""Sum in a trust region: $\theta_b + \lambda\,[\Omega < \epsilon]\,\sum_i w_i \tau_i$.

    $\Omega = \sum_{i \ne j} |g_i|\,|w_j \tau_j|$ is how much the change of one task moves, to first order, the losses
    of the others; ε leaves the smallest ⌊ρn⌋ elements of each tensor. (The paper takes one ε for the whole model.)
    Where Ω is 0 no task disturbs another: these elements are kept whatever ρ is.

    Args:
      models: N tuned models.
      base: the model they were tuned from.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: w, one a model or one for all.
      scale: λ.
      region: ρ, the share of a tensor that is in the trust region.
      gradients: g, N pytrees like the models: the mean magnitude of the gradient of each task's loss at the base.
        Without them g is τ, the paper's estimate without data.

    Example:
      >>> one, two = {"w": jnp.array([2.0, 1.0, 3.0, 0.0])}, {"w": jnp.array([1.0, 1.0, 3.0, 5.0])}
      >>> tatr([one, two], base={"w": jnp.zeros(4)}, region=0.75)
      {'w': Array([3., 2., 0., 5.], dtype=float32)}

    References:
      Sun et al., "Task Arithmetic in Trust Region", https://arxiv.org/abs/2501.15065 (TATR)
    """
    if gradients is not None and (isinstance(gradients, Mapping) or len(gradients) != len(models)):
        found = type(gradients).__name__ if isinstance(gradients, Mapping) else f"{len(gradients)} entries"
        raise ValueError(f"tatr: gradients must be a list with one entry a model, {len(models)}; found {found}")
    return leafwise(
        _tatr, models, base=base, stacked=stacked, shared={"scale": scale, "region": region},
        each={"weights": weights}, convert={"region": _outside}, extra=gradients or [],
    )  # fmt: skip
