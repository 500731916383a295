"""The loss along the line from the base through a tuned model, and over the plane of a run's models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmerge
from jaxmerge.tree import named_leaves

from ..models.decoder import Params
from .texts import Batch, Loss, total

FLAT = 1e-3
"""A model whose distance to the line is a smaller share of its distance to the base lies on the line."""


def along_line(
    loss: Loss, base: Params, tuned: Params, coefficients: Sequence[float], given: Mapping[str, Sequence[Batch]]
) -> dict[str, list[float]]:
    r"""Measure the mean loss of $\theta_0 + \lambda(\theta_t - \theta_0)$ for each λ, compiled once.

    Args:
      coefficients: λ: 0 is the base, 1 the tuned model, beyond 1 extrapolates (ExPO with α = λ − 1).
      given: name of a text → its batches.

    Returns:
      Name → loss a token for each λ.

    References:
      Goodfellow et al., "Qualitatively characterizing neural network optimization problems",
      https://arxiv.org/abs/1412.6544.
    """
    delta = jax.tree.map(jnp.subtract, tuned, base)
    points = [(coefficient, 0.0) for coefficient in coefficients]
    return over_points(loss, base, (delta, delta), points, given)


def over_points(
    loss: Loss,
    base: Params,
    directions: tuple[Params, Params],
    points: Sequence[tuple[float, float]],
    given: Mapping[str, Sequence[Batch]],
) -> dict[str, list[float]]:
    r"""Measure the mean loss of $\theta_0 + u d_1 + v d_2$ for each (u, v); u and v are traced."""

    @jax.jit
    def sums(base, directions, u, v, batch):
        params = jax.tree.map(lambda w, a, b: w + u * a + v * b, base, *directions)
        return loss(params, batch)

    def at(u, v, batches):
        return total([sums(base, directions, jnp.float32(u), jnp.float32(v), batch) for batch in batches])

    return {name: [at(u, v, batches) for u, v in points] for name, batches in given.items()}


@dataclasses.dataclass(frozen=True)
class Plane:
    """A plane through the base: θ_0 + u·d_1 + v·d_2, d_1 ⊥ d_2, both as long as the first model's change.

    places: model → (u, v, share of its change that sticks out of the plane).
    """

    directions: tuple[Params, Params]
    places: dict[str, tuple[float, float, float]]


def plane(base: Params, models: Mapping[str, Params]) -> Plane | None:
    r"""Find the plane of the base, the first model, and the model farthest off the line through these two.

    $d_1 = \tau_1$; $d_2$ is the part of that other model's $\tau$ orthogonal to $d_1$, scaled
    to $\|\tau_1\|$. Every model is then projected, and the rest reported.

    Returns:
      None where all models lie on one line through the base, as base, tuned, merged and extrapolated do in the first
      round of a linear merge.
    """
    deltas = {name: jaxmerge.task_vector(model, base) for name, model in models.items()}
    first = next(iter(deltas.values()))
    length = float(jaxmerge.norm(first))
    if not length:
        return None

    def rest(delta):
        scale = jaxmerge.dot(delta, first) / length**2
        return jax.tree.map(lambda d, f: d - scale * f, delta, first)

    off = {name: (float(jaxmerge.norm(rest(d))), float(jaxmerge.norm(d))) for name, d in deltas.items()}
    farthest = max(off, key=lambda name: off[name][0])
    if off[farthest][0] <= FLAT * max(off[farthest][1], length):
        return None
    scale = length / off[farthest][0]
    second = jax.tree.map(lambda d: scale * d, rest(deltas[farthest]))
    places = {}
    for name, delta in deltas.items():
        u, v = (float(jaxmerge.dot(delta, d)) / length**2 for d in (first, second))
        own = off[name][1] / length
        out = max(own**2 - u**2 - v**2, 0.0) ** 0.5
        places[name] = (u, v, out / own if own else 0.0)
    return Plane((_like(base, first), _like(base, second)), places)


def _like(params: Params, named: Mapping[str, Any]) -> Params:
    """Put values by path back into the structure of `params`."""
    paths = list(named_leaves(params))
    return jax.tree.unflatten(jax.tree.structure(params), [named[path] for path in paths])


def grid(places: Mapping[str, tuple[float, float, float]], size: int) -> tuple[list[float], list[float]]:
    """Choose `size` values of u and of v that hold the base and every place, with a margin of 0.3 of the span."""

    def axis(values):
        low, high = min(0.0, *values), max(0.0, *values)
        margin = 0.3 * (high - low)
        return [float(x) for x in np.linspace(low - margin, high + margin, size)]

    return axis([p[0] for p in places.values()]), axis([p[1] for p in places.values()])
