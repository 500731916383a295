r"""How evenly a router spreads tokens over experts: the load-balancing loss, and what is told of it while training.

$\mathcal{L} = E \sum_e f_e P_e$, f_e how often a token chose expert e and P_e the mean probability that the router gave
it (Fedus et al., "Switch Transformers", https://arxiv.org/abs/2101.03961, equations 4 to 6). Means are over the tokens
of all layers together, as in transformers, whose configs recommend the coefficient. With k experts a token the loss is
k where the tokens are spread evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .config import Experts


class Routing(NamedTuple):
    """What the routers of a forward pass said."""

    scores: Sequence[jax.Array] | jax.Array
    """[B, T, E] of each layer with experts, or [L, B, T, E]."""
    read: jax.Array
    """Which tokens [B, T] are read, and are no padding."""


def balance(routing: Routing, k: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The load-balancing loss, and the metrics by name.

    Args:
      k: experts a token.

    Returns:
      The loss, and: `router_balance`, the loss too; `router_max_share`, the largest share of a layer's choices that one
      expert got; `router_entropy`, of a layer's shares in units of log E, the mean over layers, 1 if they are equal;
      `expert_share_0` and so on, the share of all layers' choices that the expert got.
    """
    layers = [_layer(scores, routing.read, k) for scores in routing.scores]
    often, likely = (jnp.stack(parts) for parts in zip(*layers, strict=True))
    tokens = jnp.maximum(jnp.sum(routing.read), 1).astype(jnp.float32)
    count = often.shape[1]
    loss = count * jnp.sum(jnp.mean(often, axis=0) * jnp.mean(likely, axis=0)) / tokens**2
    shares = often / (k * tokens)
    entropy = -jnp.sum(shares * jnp.log(jnp.maximum(shares, 1e-9)), axis=1) / jnp.log(max(count, 2))
    of_expert = jnp.mean(shares, axis=0)
    return loss, jax.lax.stop_gradient(
        {
            "router_balance": loss,
            "router_max_share": jnp.max(shares),
            "router_entropy": jnp.mean(entropy),
            **{f"expert_share_{e}": of_expert[e] for e in range(count)},
        }
    )


def _layer(scores: jax.Array, read: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """How often each expert was chosen, and its probability, both summed over the tokens that are read: [E] each."""
    chosen = jax.lax.top_k(scores, k)[1]
    here = read.astype(jnp.float32)[..., None]
    picked = jnp.sum(chosen[..., None] == jnp.arange(scores.shape[-1]), axis=-2, dtype=jnp.float32)
    often = jnp.sum(picked * here, axis=(0, 1))
    return often, jnp.sum(jax.nn.softmax(scores, axis=-1) * here, axis=(0, 1))


def balance_sums(
    experts: Experts | None, routing: Routing | None, weight: jax.Array, coefficient: float | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What the load-balancing loss adds to a sum of losses whose weights sum to `weight`, and its metrics' sums.

    Args:
      coefficient: of the loss, whose mean over the tokens is added; None adds nothing, and has no metrics.
    """
    if experts is None or routing is None or coefficient is None or not len(routing.scores):
        return jnp.float32(0), {}
    loss, metrics = balance(routing, experts.per_token)
    return weight * coefficient * loss, {name: weight * value for name, value in metrics.items()}


def tokens_read(weights: jax.Array) -> jax.Array:
    """Which tokens [B, T − 1] of rows that are not packed come before the last target: weights [B, T]."""
    last = jnp.max(jnp.where(weights != 0, jnp.arange(weights.shape[1]), 0), axis=1, keepdims=True)
    return jnp.arange(weights.shape[1] - 1) < last
