r"""Rules on the sphere: each tensor is one vector (or its rows are), direction and length merged apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.leafwise import Operands, leafwise, requires
from jaxmerge.linear import check_sum
from jaxmerge.tree import Array, PyTree


def _dot(a: Array, b: Array, axis: int | None) -> Array:
    return jnp.sum(a * b, axis=axis, keepdims=axis is not None)


def _norm(x: Array, axis: int | None) -> Array:
    square = _dot(x, x, axis)
    # The derivative of the root at zero is infinite: take it where there is something to take. Compared with
    # zero by equality throughout, so that NaN stays NaN.
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def _unit(x: Array, axis: int | None) -> Array:
    length = _norm(x, axis)
    return x / jnp.where(length == 0, 1, length)


def _arc(a: Array, b: Array, t: Array, cosine: Array, linear: Array) -> Array:
    r"""Return :math:`[\sin((1-t)\Omega)\,a + \sin(t\Omega)\,b] / \sin\Omega`, linear where told so."""
    # The branch not taken must be finite too, or its derivative is NaN.
    omega = jnp.arccos(jnp.where(linear, 0, cosine))
    sine = jnp.sin(omega)
    from_a = jnp.where(linear, 1 - t, jnp.sin((1 - t) * omega) / sine)
    from_b = jnp.where(linear, t, jnp.sin(t * omega) / sine)
    return from_a * a + from_b * b


def _slerp(x: Operands, *, t: Array) -> Array:
    a, b = x.models
    cosine = jnp.clip(_dot(_unit(a, None), _unit(b, None), None), -1, 1)
    return _arc(a, b, t, cosine, jnp.abs(cosine) > 0.9995)


@requires(least=2, most=2)
def slerp(models: Sequence[PyTree], *, base=None, key=None, names=None, stacked=(), t: Any = 0.5) -> PyTree:
    r"""Interpolate two models on the sphere.

    :math:`[\sin((1-t)\Omega)\,\theta_a + \sin(t\Omega)\,\theta_b]/\sin\Omega`. Ω is the angle between
    the two tensors; linear where they are almost parallel, abs(cos Ω) > 0.9995.
    A tensor of zeros has no direction: it counts as orthogonal, as in mergekit.

    Args:
      models: [a, b].
      base, key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      t: 0 gives a, 1 gives b. A number, a list over depth, or a dict pattern → value.

    Example:
      >>> slerp([{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}], t=0.5)
      {'w': Array([0.70710677, 0.70710677], dtype=float32)}

    References:
      Shoemake, "Animating rotation with quaternion curves", 1985
    """
    return leafwise(_slerp, models, stacked=stacked, shared={"t": t})


def _nuslerp(x: Operands, *, weights: Array, axis: int | None) -> Array:
    a, b = x.models if x.base is None else x.deltas
    total = weights.sum()
    t = jnp.where(jnp.abs(total) < 1e-6, 0.5, weights[1] / jnp.where(jnp.abs(total) < 1e-6, 1, total))
    axis = axis if a.ndim else None
    cosine = jnp.clip(_dot(_unit(a, axis), _unit(b, axis), axis), -1, 1)
    arc = _arc(a, b, t, cosine, 1 - jnp.square(cosine) <= 1e-16)
    return arc if x.base is None else x.base + arc


@requires(least=2, most=2, base="optional", symmetric=True)
def nuslerp(
    models: Sequence[PyTree],
    *,
    base=None,
    key=None,
    names=None,
    stacked=(),
    weights: Any = 1.0,
    flatten: bool = True,
    row_wise: bool = False,
) -> PyTree:
    r"""Spherical interpolation by weights, :math:`t = w_2/(w_1 + w_2)`, of two models or of their task vectors.

    Args:
      models: [a, b].
      base: with one, :math:`\theta_b + \mathrm{slerp}(\tau_1, \tau_2)`.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: one a model; only their ratio counts.
      flatten: the tensor is one vector. False: vectors lie along the last axis, or,
      row_wise: along the first (mergekit's words for it).
    """
    axis = None if flatten else 0 if row_wise else -1
    return leafwise(_nuslerp, models, base=base, stacked=stacked, each={"weights": weights}, options={"axis": axis})


def _multislerp(x: Operands, *, weights: Array, normalize: bool, eps: float) -> Array:
    vectors = x.models if x.base is None else x.deltas
    if len(vectors) == 1:
        return x.models[0]
    w = weights / weights.sum() if normalize else weights
    lengths = [_norm(v, None) for v in vectors]
    units = [v / (length + eps) for v, length in zip(vectors, lengths, strict=True)]
    mean = sum((w[i] * u for i, u in enumerate(units)), start=jnp.zeros_like(units[0]))
    size = _norm(mean, None)
    center = mean / jnp.where(size == 0, 1, size)
    tangent = sum(
        (w[i] * (u - _dot(u, center, None) * center) for i, u in enumerate(units)), start=jnp.zeros_like(mean)
    )
    angle = _norm(tangent, None) + eps
    length = sum(w[i] * l for i, l in enumerate(lengths))
    point = (center * jnp.cos(angle) + tangent * (jnp.sin(angle) / angle)) * length
    # Directions that balance out have no mean on the sphere: the linear mean, which is then near zero.
    linear = sum((w[i] * v for i, v in enumerate(vectors)), start=jnp.zeros_like(mean))
    merged = jnp.where(size < eps, linear, point)
    return merged if x.base is None else x.base + merged


@requires(base="optional", symmetric=True)
def multislerp(
    models: Sequence[PyTree],
    *,
    base=None,
    key=None,
    names=None,
    stacked=(),
    weights: Any = 1.0,
    normalize: bool = True,
    eps: float = 1e-8,
) -> PyTree:
    r"""Barycentre on the sphere, in the tangent space at the weighted mean direction.

    :math:`u_i` unit, :math:`m = \mathrm{unit}\sum w_i u_i`, :math:`v = \sum w_i(u_i - (u_i\cdot m)m)`,
    :math:`(m\cos\|v\| + v\sin\|v\|/\|v\|)\sum w_i\|\theta_i\|`; of the task vectors if there is a base.
    Directions that balance out exactly have no mean: their linear mean is taken.

    Args:
      models: N models.
      base: origin, or None.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: one a model, divided by their sum if `normalize`.
      eps: added to norms.
    """
    if normalize:
        check_sum(weights, len(models), "multislerp")
    options = {"normalize": bool(normalize), "eps": float(eps)}
    return leafwise(_multislerp, models, base=base, stacked=stacked, each={"weights": weights}, options=options)


def _karcher(x: Operands, *, max_iter: int, tol: float) -> Array:
    if len(x.models) == 1:
        return x.models[0]
    lengths = jnp.stack([_norm(model, None) for model in x.models])
    counted = (~(lengths <= tol)).astype(lengths.dtype)
    share = counted / jnp.maximum(counted.sum(), 1)
    units = [_unit(model, None) for model in x.models]

    def total(terms: list[Array]) -> Array:
        return sum((share[i] * term for i, term in enumerate(terms)), start=jnp.zeros_like(units[0]))

    mean = total(units)
    size = _norm(mean, None)
    # Directions that balance out: start from the first that counts.
    first = sum((jnp.where(jnp.argmax(counted) == i, u, 0) for i, u in enumerate(units)), start=jnp.zeros_like(mean))
    mean = jnp.where(size < tol, first, mean / jnp.where(size == 0, 1, size))

    def step(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        mean, done = state
        tangents = []
        for unit in units:
            cosine = jnp.clip(_dot(mean, unit, None), -1, 1)
            inside = jnp.abs(cosine) < 1
            near = ~inside | (jnp.arccos(jnp.where(inside, cosine, 0)) < tol)
            theta = jnp.arccos(jnp.where(near, 0, cosine))
            tangents.append(jnp.where(near, 0, theta / jnp.sin(theta)) * (unit - cosine * mean))
        tangent = total(tangents)
        size = _norm(tangent, None)
        done = done | (size < tol)
        moved = jnp.cos(size) * mean + jnp.sin(size) * tangent / jnp.where(size == 0, 1, size)
        return jnp.where(done, mean, _unit(moved, None)), done

    # A loop of fixed length, frozen once it has converged: it can be differentiated and batched.
    mean, _ = jax.lax.fori_loop(0, max_iter, step, (mean, jnp.bool_(False)))
    return lengths.mean() * mean


@requires(symmetric=True)
def karcher(
    models: Sequence[PyTree], *, base=None, key=None, names=None, stacked=(), max_iter: int = 10, tol: float = 1e-5
) -> PyTree:
    r"""Karcher (Riemannian) mean of the directions, times the mean length.

    Iterates :math:`m \leftarrow \exp_m(\mathrm{mean}_i \log_m u_i)` until the step is under `tol`. Models of
    norm zero count in the length, not in the direction.

    Args:
      models: N models.
      base, key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      max_iter, tol: of the iteration.

    References:
      Karcher, "Riemannian center of mass and mollifier smoothing", 1977
    """
    options = {"max_iter": int(max_iter), "tol": float(tol)}
    return leafwise(_karcher, models, stacked=stacked, options=options)
