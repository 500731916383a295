r"""How far a model's next-token distribution p is from another's, q, and the sum over a batch.

Each is a function of (log p, log q, labels), [..., V] twice and [...], and gives a number ≥ 0 for each token. p is
trained; q is a base model's or a teacher's. All are 0 where p = q.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Divergence = Callable[..., jax.Array]
Projection = Callable[[jax.Array, jax.Array], jax.Array]
"""Logits [..., V] of (weight [V, D], hidden [..., D]): a `Head` of loss.py."""

SKEW = 0.1
"""α of the skewed divergences, as their paper has it."""
NEVER = -1e30
"""The log-probability of a token that is taken out: finite, so that no gradient is inf − inf."""


def _kl(first: jax.Array, second: jax.Array) -> jax.Array:
    """KL(first ‖ second) of two log-distributions."""
    return jnp.sum(jnp.exp(first) * (first - second), axis=-1)


def _mixed(share: float, first: jax.Array, second: jax.Array) -> jax.Array:
    """log(α·first + (1 − α)·second) of two log-distributions."""
    return jnp.logaddexp(math.log(share) + first, math.log1p(-share) + second)


def forward_kl(p: jax.Array, q: jax.Array, labels: jax.Array) -> jax.Array:
    r"""$\mathrm{KL}(q \| p)$: p covers all that q does."""
    del labels
    return _kl(q, p)


def reverse_kl(p: jax.Array, q: jax.Array, labels: jax.Array) -> jax.Array:
    r"""$\mathrm{KL}(p \| q)$: p keeps to what q holds likely."""
    del labels
    return _kl(p, q)


def skewed_kl(p: jax.Array, q: jax.Array, labels: jax.Array, *, alpha: float = SKEW) -> jax.Array:
    r"""$\mathrm{KL}(q \| \alpha q + (1 - \alpha) p)$: as `forward_kl`, and at most −log α, whatever p leaves out.

    References:
      Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models",
      https://arxiv.org/abs/2402.03898
    """
    del labels
    return _kl(q, _mixed(alpha, q, p))


def skewed_reverse_kl(p: jax.Array, q: jax.Array, labels: jax.Array, *, alpha: float = SKEW) -> jax.Array:
    r"""$\mathrm{KL}(p \| \alpha p + (1 - \alpha) q)$; Ko et al., as `skewed_kl`."""
    del labels
    return _kl(p, _mixed(alpha, p, q))


def jsd(p: jax.Array, q: jax.Array, labels: jax.Array, *, beta: float = 0.5) -> jax.Array:
    r"""$\beta\,\mathrm{KL}(q \| m) + (1 - \beta)\,\mathrm{KL}(p \| m)$ with $m = \beta q + (1 - \beta) p$.

    Divided by β it goes to `forward_kl` as β → 0; divided by 1 − β, to `reverse_kl` as β → 1.

    References:
      Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
      https://arxiv.org/abs/2306.13649, equation 1
    """
    del labels
    middle = _mixed(beta, q, p)
    return beta * _kl(q, middle) + (1 - beta) * _kl(p, middle)


def masked_kl(p: jax.Array, q: jax.Array, labels: jax.Array) -> jax.Array:
    r"""$\mathrm{KL}(\tilde q \| \tilde p)$ where the label is taken out: $\tilde p_v \propto p_v$ for $v \ne y$.

    The order among the other tokens is kept, and nothing pulls against learning the label. The distributions are
    normalised anew from log-probabilities: 1 − p_y would be rounding noise where the label is nearly certain. The
    direction is that of a summary of the paper, which could not be read.

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
    "jsd": jsd,
}
"""By name: what `sft.stay.divergence` may be."""


def kl_sum(
    head: Projection,
    at_once: int,
    ours: tuple[jax.Array, jax.Array],
    theirs: tuple[jax.Array, jax.Array],
    labels: jax.Array,
    weights: jax.Array,
    divergence: Divergence = forward_kl,
    *,
    their_head: Projection | None = None,
) -> jax.Array:
    r"""$\sum_i w_i \, D(p_{\theta,i}, p_{0,i})$, the logits of `at_once` tokens held at a time.

    Args:
      ours, theirs: (weight [V, D], hidden [B, K, D]) of p_θ and of p_0; D may be another one for p_0.
      labels, weights: [B, K].
      divergence: D, of models/divergence.py.
      their_head: where p_0 is of a model with another config; the vocabulary is the same.
    """
    (weight, hidden), (weight_0, hidden_0) = ours, theirs
    head_0 = head if their_head is None else their_head
    B, K, _ = hidden.shape
    count = -(-K // max(1, at_once // B))
    width = -(-K // count)

    @jax.checkpoint
    def chunk(total, part):
        h, h_0, y, w = part
        logits = head(weight, h), head_0(weight_0, h_0)
        known = min(z.shape[-1] for z in logits)  # the rows past it fill a matrix up and are no token's
        p, p_0 = (jax.nn.log_softmax(z[..., :known].astype(jnp.float32)) for z in logits)
        return total + jnp.sum(w * divergence(p, p_0, y)), None

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, count * width - K), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, count, width, *x.shape[2:]), 1, 0)

    return jax.lax.scan(chunk, jnp.float32(0), tuple(map(split, (hidden, hidden_0, labels, weights))))[0]
