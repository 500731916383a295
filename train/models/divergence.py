r"""How far a model's next-token distribution p is from another's, q: what `kl_sum` of loss.py adds up.

Each is a function of (log p, log q, labels), [..., V] twice and [...], and gives a number ≥ 0 for each token. p is
trained; q is a base model's or a teacher's. All are 0 where p = q.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Divergence = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

SKEW = 0.1
"""α of the skewed divergences, as their paper has it."""
NEVER = -1e30
"""The log-probability of a token that is taken out: finite, so that no gradient is inf − inf."""


def _kl(first: jax.Array, second: jax.Array) -> jax.Array:
    """KL(first ‖ second) of two log-distributions."""
    return jnp.sum(jnp.exp(first) * (first - second), axis=-1)


def _mixed(first: jax.Array, second: jax.Array) -> jax.Array:
    """log(α·first + (1 − α)·second) of two log-distributions."""
    return jnp.logaddexp(math.log(SKEW) + first, math.log1p(-SKEW) + second)


def forward_kl(p: jax.Array, q: jax.Array, labels: jax.Array) -> jax.Array:
    r"""$\mathrm{KL}(q \| p)$: p covers all that q does."""
    del labels
    return _kl(q, p)


def reverse_kl(p: jax.Array, q: jax.Array, labels: jax.Array) -> jax.Array:
    r"""$\mathrm{KL}(p \| q)$: p keeps to what q holds likely."""
    del labels
    return _kl(p, q)


def skewed_kl(p: jax.Array, q: jax.Array, labels: jax.Array) -> jax.Array:
    r"""$\mathrm{KL}(q \| \alpha q + (1 - \alpha) p)$: as `forward_kl`, and at most −log α, whatever p leaves out.

    References:
      Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models",
      https://arxiv.org/abs/2402.03898
    """
    del labels
    return _kl(q, _mixed(q, p))


def skewed_reverse_kl(p: jax.Array, q: jax.Array, labels: jax.Array) -> jax.Array:
    r"""$\mathrm{KL}(p \| \alpha p + (1 - \alpha) q)$; Ko et al., as `skewed_kl`."""
    del labels
    return _kl(p, _mixed(p, q))


def masked_kl(p: jax.Array, q: jax.Array, labels: jax.Array) -> jax.Array:
    r"""$\mathrm{KL}(\tilde q \| \tilde p)$ where the label is taken out: $\tilde p_v \propto p_v$ for $v \ne y$.

    The order among the other tokens is kept, and nothing pulls against learning the label. The distributions are
    normalised anew from log-probabilities: 1 − p_y would be rounding noise where the label is nearly certain.

    References:
      Xu et al., "Mask the Target: A Plug-and-Play Regularizer Against LoRA Forgetting",
      https://arxiv.org/abs/2605.29498
    """
    gold = jax.nn.one_hot(labels, p.shape[-1], dtype=bool)
    return _kl(*(jax.nn.log_softmax(jnp.where(gold, NEVER, x)) for x in (q, p)))


DIVERGENCES: dict[str, Divergence] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "skewed": skewed_kl,
    "skewed_reverse": skewed_reverse_kl,
    "masked": masked_kl,
}
"""By name: what `sft.stay.divergence` may be."""
