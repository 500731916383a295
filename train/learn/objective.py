"""Token-weighted cross-entropy, reported as a numerator and a denominator so that means are of tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..models.attention import visible
from ..models.config import ModelConfig
from ..models.decoder import Params, bind


def token_logprobs(
    config: ModelConfig, params: Params, tokens: jax.Array, *, targets=None, segments=None, dtype=jnp.float32
):
    """log p(token t | tokens before it), float32, of right-padded tokens [B, T].

    Args:
      targets: [B, K] positions t ≥ 1 to judge; None judges all, K = T − 1. The head, a fifth of a small model's
        work, and its logits are computed for these alone.

    Returns:
      [B, K].
    """
    B, T = tokens.shape
    if targets is None:
        targets = jnp.broadcast_to(jnp.arange(1, T), (B, T - 1))
    positions = jnp.broadcast_to(jnp.arange(T - 1), (B, T - 1))
    decoder = bind(config, params)
    seen = visible(positions, None if segments is None else segments[:, :-1])
    hidden, _ = decoder(tokens[:, :-1], positions, seen, dtype=dtype)
    if targets.shape[1] < T - 1:
        hidden = jnp.take_along_axis(hidden, jnp.maximum(targets - 1, 0)[..., None], axis=1)
    logits = decoder.head(hidden, dtype)
    labels = jnp.take_along_axis(tokens, targets, axis=1)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def loss_sums(config: ModelConfig, params: Params, batch: dict[str, jax.Array], *, dtype=jnp.float32):
    r"""Σ w·(−log p) and Σ w over a batch.

    Args:
      batch: `tokens` [B, T] int32; `weights` [B, T] float32, the loss weight of each token as a target; optionally
        `targets` [B, K] int32, the positions whose weight is not 0, filled up with 0.

    Returns:
      (sum of weighted losses, sum of weights): their ratio is the mean loss a token.
    """
    targets = batch.get("targets")
    logprobs = token_logprobs(config, params, batch["tokens"], targets=targets, dtype=dtype)
    if targets is None:
        weights = batch["weights"][:, 1:]
    else:
        weights = jnp.where(targets > 0, jnp.take_along_axis(batch["weights"], targets, axis=1), 0.0)
    return -jnp.sum(logprobs * weights), jnp.sum(weights)
