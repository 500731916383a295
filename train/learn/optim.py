"""AdamW in pieces: the learning rate is an argument of the step, so one executable serves every phase."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge.tree import leaf_paths
from jaxmerge.where import matches

from ..log import UserError
from .settings import Sft, Step

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


class Moments(NamedTuple):
    """Adam's running means of the gradient and of its square, float32, like the parameters; updates made so far."""

    mu: Any
    nu: Any
    updates: Any


def start(params: Any) -> Moments:
    mu, nu = (jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params) for _ in range(2))
    return Moments(mu, nu, jnp.zeros((), jnp.int32))


def adamw(
    config: Step, params: Any, moments: Moments, grads: Any, *, norm: jax.Array, rate: jax.Array, good: jax.Array
) -> tuple[Any, Moments]:
    r"""Adam with decoupled weight decay of the clipped gradient :math:`g \min(1, c / \lVert g \rVert)`.

    .. math:: \theta \leftarrow \theta - \eta \left(\frac{m / (1 - \beta_1^n)}{\sqrt{v / (1 - \beta_2^n)} + \epsilon}
       + \lambda \theta\right)

    Written out instead of taken from optax: where an update may not be made (`good` false leaves all as it was),
    the moments are chosen first and the parameters made of the chosen ones, so that XLA writes all of them in place;
    choosing between optax's results it copied two of the three, which made the update 3.7 × slower on a CPU.

    Args:
      norm: of the gradient, all parameters together. rate: η.

    References:
      Loshchilov and Hutter, "Decoupled Weight Decay Regularization", https://arxiv.org/abs/1711.05101
    """
    scale = jnp.where(norm > config.clip, config.clip / norm, 1.0)
    count = moments.updates + good.astype(jnp.int32)
    mu = jax.tree.map(lambda m, g: jnp.where(good, BETA_1 * m + (1 - BETA_1) * (scale * g), m), moments.mu, grads)
    nu = jax.tree.map(lambda v, g: jnp.where(good, BETA_2 * v + (1 - BETA_2) * (scale * g) ** 2, v), moments.nu, grads)
    n = count.astype(jnp.float32)
    first, second = 1 - BETA_1**n, 1 - BETA_2**n

    def leaf(p, m, v, decays: bool):
        wide = p.astype(jnp.float32)
        step = m / first / (jnp.sqrt(v / second) + EPSILON) + (config.weight_decay * wide if decays else 0.0)
        return jnp.where(good, (wide - rate * step).astype(p.dtype), p)

    return jax.tree.map(leaf, params, mu, nu, decay_mask(params, config.decay)), Moments(mu, nu, count)


def decays(path: str, patterns: tuple[str, ...] = ()) -> bool:
    """Whether the parameter at `path` decays: where a pattern matches; with none, all but norms and biases.

    By name and not by rank: with stacked layers a norm has two axes.

    Example:
      >>> decays("model/norm/weight"), decays("model/layers/0/mlp/up_proj/weight"), decays("lm_head/weight", ("mlp",))
      (False, True, False)
    """
    return matches(patterns, path) if patterns else re.search(r"(norm/weight|/bias)$", path) is None


def decay_mask(params: Any, patterns: tuple[str, ...]) -> Any:
    """True at every leaf that decays; a pattern that matches no parameter is an error."""
    paths = checked_paths("sft.step.decay", patterns, params)
    return jax.tree.unflatten(jax.tree.structure(params), [decays(path, patterns) for path in paths])


def checked_paths(setting: str, patterns: tuple[str, ...], params: Any) -> list[str]:
    """The path of every leaf, once each of a setting's patterns is known to match one."""
    paths = leaf_paths(params)
    for pattern in patterns:
        if not any(matches(pattern, path) for path in paths):
            raise UserError(
                f"{setting}: {pattern!r} matches none of the {len(paths)} parameters; the first is {paths[0]}"
            )
    return paths


def learning_rate(config: Sft, step: int, steps: int) -> float:
    """Rate of update number `step` (from 0) of `steps`: linear warm-up, then cosine to 0 or constant."""
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def ema_keep(config: Sft, step: int) -> float:
    """Share of the average kept at update number `step` (from 0): min(ema, (1 + n)/(10 + n)), n = step + 1.

    A short run then averages its own weights instead of remembering the ones it started from.
    """
    return min(config.step.ema, (2 + step) / (11 + step))
