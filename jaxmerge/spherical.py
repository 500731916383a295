r"""Rules on the sphere: each tensor is one vector (or its rows are), direction and length merged apart.

Where a tensor is one vector, all these results lie in the span of the inputs, $\sum_i c_i v_i$, and the
coefficients follow from the inner products $v_i \cdot v_j$ alone. So a rule is one pass for the inner products,
arithmetic on N numbers (ten steps of a Karcher mean cost nothing), and one pass for the sum.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxmerge import passes
from jaxmerge.arithmetic import check_sum
from jaxmerge.contract import requires
from jaxmerge.leaves import Operands, leafwise
from jaxmerge.tree import Array, PyTree, or_one
from jaxmerge.where import Coefficient, PerModel


def gram(vectors: Sequence[Array]) -> Array:
    """Return the inner products of N arrays as vectors, [N, N], in one pass."""
    count = len(vectors)
    pairs = list(itertools.combinations_with_replacement(range(count), 2))
    products = passes.sums([vectors[i] * vectors[j] for i, j in pairs])
    at = {pair: n for n, pair in enumerate(pairs)}
    return jnp.stack([jnp.stack([products[at[min(i, j), max(i, j)]] for j in range(count)]) for i in range(count)])


def _root(square: Array) -> Array:
    # The derivative of the root at zero is infinite: take it where there is something to take. Compared with
    # zero by equality throughout, so that NaN stays NaN.
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def _length(products: Array, coefficients: Array) -> Array:
    r"""Return $\|\sum_i c_i v_i\|$ of vectors with these inner products."""
    # At least zero, whatever was rounded where the vectors cancel; NaN stays NaN.
    square = (coefficients[:, None] * products * coefficients[None]).sum()
    return _root(jnp.where(square < 0, 0, square))


def _combine(coefficients: Array, vectors: Sequence[Array]) -> Array:
    return sum((coefficients[i] * v for i, v in enumerate(vectors)), start=jnp.zeros_like(vectors[0]))


def _arc(a: Array, b: Array, t: Array, cosine: Array, linear: Array) -> Array:
    r"""Return $[\sin((1-t)\Omega)\,a + \sin(t\Omega)\,b] / \sin\Omega$, linear where told so."""
    # The branch not taken must be finite too, or its derivative is NaN.
    omega = jnp.arccos(jnp.where(linear, 0, cosine))
    sine = jnp.sin(omega)
    from_a = jnp.where(linear, 1 - t, jnp.sin((1 - t) * omega) / sine)
    from_b = jnp.where(linear, t, jnp.sin(t * omega) / sine)
    return from_a * a + from_b * b


def _cosine(a: Array, b: Array, axis: int | None) -> Array:
    """Return the cosine of two arrays as vectors, or of their vectors along an axis; 0 where one is zero."""
    if axis is None:
        products = gram([a, b])
        square_a, product, square_b = products[0, 0], products[0, 1], products[1, 1]
    else:
        square_a, product, square_b = (jnp.sum(x * y, axis=axis, keepdims=True) for x, y in ((a, a), (a, b), (b, b)))
    return jnp.clip(product / or_one(_root(square_a)) / or_one(_root(square_b)), -1, 1)


def _slerp(x: Operands, *, t: Array) -> Array:
    x = x.after()
    cosine = _cosine(x.models[0], x.models[1], None)
    a, b = x.after(cosine).models
    return _arc(a, b, t, cosine, jnp.abs(cosine) > 0.9995)


@requires(least=2, most=2)
def slerp(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    t: Coefficient = 0.5,
) -> PyTree:
    r"""Interpolate two models on the sphere.

    $[\sin((1-t)\Omega)\,\theta_a + \sin(t\Omega)\,\theta_b]/\sin\Omega$. Ω is the angle between
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
    def vectors(x: Operands) -> tuple[Array, ...]:
        return x.models if x.base is None else x.deltas

    x = x.after()
    a, b = vectors(x)
    total = weights.sum()
    t = jnp.where(jnp.abs(total) < 1e-6, 0.5, weights[1] / jnp.where(jnp.abs(total) < 1e-6, 1, total))
    cosine = _cosine(a, b, axis if a.ndim else None)
    x = x.after(cosine)
    a, b = vectors(x)
    arc = _arc(a, b, t, cosine, 1 - jnp.square(cosine) <= 1e-16)
    return arc if x.base is None else x.base + arc


@requires(least=2, most=2, base="optional", symmetric=True)
def nuslerp(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    weights: PerModel = 1.0,
    flatten: bool = True,
    row_wise: bool = False,
) -> PyTree:
    r"""Spherical interpolation by weights, of two models or of their task vectors.

    $[\sin((1-t)\Omega)\,\theta_a + \sin(t\Omega)\,\theta_b]/\sin\Omega$ with $t = w_2/(w_1 + w_2)$.

    Args:
      models: [a, b].
      base: with one, $\theta_b + \mathrm{slerp}(\tau_1, \tau_2)$.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: one a model; only their ratio counts.
      flatten: the tensor is one vector. False: vectors lie along the last axis, or,
      row_wise: along the first (mergekit's words for it).

    References:
      mergekit, https://github.com/arcee-ai/mergekit
    """
    axis = None if flatten else 0 if row_wise else -1
    return leafwise(_nuslerp, models, base=base, stacked=stacked, each={"weights": weights}, options={"axis": axis})


def _multislerp(x: Operands, *, weights: Array, normalize: bool, eps: float) -> Array:
    if len(x.models) == 1:
        return x.models[0]
    x = x.after()
    w = weights / weights.sum() if normalize else weights
    products = gram(x.models if x.base is None else x.deltas)
    lengths = _root(jnp.diagonal(products))
    # The mean of the directions v / (‖v‖ + eps), as coefficients of the vectors. What the tangents at the mean add is
    # zero, for their weighted sum is the mean's own part across itself: the mean direction is the result's.
    mean = w / (lengths + eps)
    size = _length(products, mean)
    # Directions that balance out have no mean on the sphere: the linear mean, which is then near zero.
    coefficients = jnp.where(size < eps, w, mean / or_one(size) * (w * lengths).sum())
    x = x.after(coefficients)
    merged = _combine(coefficients, x.models if x.base is None else x.deltas)
    return merged if x.base is None else x.base + merged


@requires(base="optional", symmetric=True)
def multislerp(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    weights: PerModel = 1.0,
    normalize: bool = True,
    eps: float = 1e-8,
) -> PyTree:
    r"""Barycentre on the sphere, in the tangent space at the weighted mean direction.

    $(m\,\cos\|v\| + v\,\sin\|v\|/\|v\|) \sum_i w_i\|\theta_i\|$ with $u_i$ unit,
    $m = \mathrm{unit}\sum w_i u_i$, $v = \sum w_i(u_i - (u_i\cdot m)m)$; of the task vectors if there is a
    base.
    Directions that balance out exactly have no mean: their linear mean is taken.

    Args:
      models: N models.
      base: origin, or None.
      key, names: not used.
      stacked: containers whose leaves have a leading layer axis.
      weights: one a model, divided by their sum if `normalize`: concrete ones that sum to zero are an error then.
      eps: added to norms.

    References:
      mergekit, https://github.com/arcee-ai/mergekit
    """
    return leafwise(
        _multislerp,
        models,
        base=base,
        stacked=stacked,
        each={"weights": weights},
        options={"normalize": bool(normalize), "eps": float(eps)},
        check={"weights": functools.partial(check_sum, rule="multislerp", optional=True)} if normalize else None,
    )


def _karcher(x: Operands, *, max_iter: int, tol: float) -> Array:
    if len(x.models) == 1:
        return x.models[0]
    x = x.after()
    products = gram(x.models)
    lengths = _root(jnp.diagonal(products))
    counted = (~(lengths <= tol)).astype(lengths.dtype)
    share = counted / jnp.maximum(counted.sum(), 1)
    # From here on in coefficients of the unit vectors, whose inner products are cosines.
    cosines = products / or_one(lengths)[:, None] / or_one(lengths)[None]
    size = _length(cosines, share)
    # Directions that balance out: start from the first that counts.
    first = (jnp.arange(lengths.size) == jnp.argmax(counted)).astype(lengths.dtype)
    mean = jnp.where(size < tol, first, share / or_one(size))

    def step(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        mean, done = state
        along = jnp.clip((cosines * mean[None]).sum(-1), -1, 1)
        inside = jnp.abs(along) < 1
        near = ~inside | (jnp.arccos(jnp.where(inside, along, 0)) < tol)
        theta = jnp.arccos(jnp.where(near, 0, along))
        pull = share * jnp.where(near, 0, theta / jnp.sin(theta))
        # Each unit vector's tangent at the mean is u − (u·m) m.
        tangent = pull - (pull * along).sum() * mean
        size = _length(cosines, tangent)
        done = done | (size < tol)
        moved = jnp.cos(size) * mean + jnp.sin(size) * tangent / or_one(size)
        return jnp.where(done, mean, moved / or_one(_length(cosines, moved))), done

    # A loop of fixed length, frozen once it has converged: it can be differentiated and batched.
    mean, _ = jax.lax.fori_loop(0, max_iter, step, (mean, jnp.bool_(False)))
    coefficients = lengths.mean() * mean / or_one(lengths)
    return _combine(coefficients, x.after(coefficients).models)


@requires(symmetric=True)
def karcher(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    max_iter: int = 10,
    tol: float = 1e-5,
) -> PyTree:
    r"""Karcher (Riemannian) mean of the directions, times the mean length.

    $m\,\mathrm{mean}_i\|\theta_i\|$, iterating $m \leftarrow \exp_m(\mathrm{mean}_i \log_m u_i)$ until the
    step is under `tol`. Models of norm zero count in the length, not in the direction.

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
