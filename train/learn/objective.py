"""Token-weighted cross-entropy, reported as a numerator and a denominator so that means are of tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..models.config import ModelConfig
from ..models.decoder import Params, forward


def token_logprobs(config: ModelConfig, params: Params, tokens: jax.Array, *, segments=None, dtype=jnp.float32):
    """log p(token t | tokens before it) for t ≥ 1, [B, T − 1] float32, of right-padded tokens [B, T]."""
    inputs = None if segments is None else segments[:, :-1]
    logits = forward(config, params, tokens[:, :-1], segments=inputs, dtype=dtype)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def loss_sums(config: ModelConfig, params: Params, batch: dict[str, jax.Array], *, dtype=jnp.float32):
    r"""Σ w·(−log p) and Σ w over a batch.

    Args:
      batch: `tokens` [B, T] int32; `weights` [B, T] float32, the loss weight of each token as a target.

    Returns:
      (sum of weighted losses, sum of weights): their ratio is the mean loss a token.
    """
    logprobs = token_logprobs(config, params, batch["tokens"], dtype=dtype)
    weights = batch["weights"][:, 1:]
    return -jnp.sum(logprobs * weights), jnp.sum(weights)
