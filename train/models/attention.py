"""Attention over keys and values of one layer, cached or not, and what a query may see."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import fused
from .branches import near, related


class KV(NamedTuple):
    """Keys and values of one layer, [B, K, S, H]: heads before positions, which CPUs read 7 × faster."""

    k: jax.Array
    v: jax.Array


def attend(
    q: jax.Array, kv: KV, mask: jax.Array | fused.Causal, *, scale: float | None = None, softcap: float | None = None
) -> jax.Array:
    """Scaled dot-product attention, queries grouped over shared key/value heads; softmax in float32.

    Args:
      q: [B, N, T, H]. kv: [B, K, S, H].
      mask: [B, T, S], True = visible; or a `Causal`, which names the implementation (fused.py).
      scale: of the scores; None is 1/√H.
      softcap: c bounds the scores smoothly, c·tanh(score / c); None leaves them.

    Returns:
      [B, N, T, H].
    """
    B, N, T, H = q.shape
    factor: float = H**-0.5 if scale is None else scale
    if isinstance(mask, fused.Causal):
        return fused.attend(q, kv.k, kv.v, mask, scale=factor, softcap=softcap)
    K = kv.k.shape[1]
    q = q.reshape(B, K, N // K * T, H)
    scores = jnp.einsum("bkth,bksh->bkts", q, kv.k, preferred_element_type=jnp.float32)
    scores = cap(scores * factor, softcap)
    scores = scores.reshape(B, K, N // K, T, -1)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).reshape(B, K, N // K * T, -1).astype(kv.v.dtype)
    out = jnp.einsum("bkts,bksh->bkth", weights, kv.v, preferred_element_type=jnp.float32)
    return out.reshape(B, N, T, H)


def cap(x: jax.Array, limit: float | None) -> jax.Array:
    r"""Bound smoothly: $c \tanh(x / c)$; None leaves x as it is."""
    return x if limit is None else limit * jnp.tanh(x / limit)


def within(
    mask: jax.Array | fused.Causal, window: int | None, at: jax.Array | None = None, positions: jax.Array | None = None
):
    """The mask [B, T, S] of a layer whose queries see `window` positions, their own included; None is all.

    Args:
      at: [B] index of the first query of each row while decoding; None: query t has index t.
      positions: [B, T] of the tokens, which rows that branch need; None: a token's index is its position.
    """
    if isinstance(mask, fused.Causal):
        return mask.within(window)
    if window is None:
        return mask
    if positions is not None and at is None:
        return mask & near(positions, window)
    query = jnp.arange(mask.shape[1])[None] + (0 if at is None else at[:, None])
    return mask & (query[:, :, None] - jnp.arange(mask.shape[2]) < window)


def write(cache: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """Put new [B, K, T, H] at positions at[b], at[b] + 1, … of cache [B, K, S, H], row by row."""
    if new.shape[2] > 1:
        places = at[:, None] + jnp.arange(new.shape[2])
        return cache.at[jnp.arange(cache.shape[0])[:, None], :, places].set(new.swapaxes(1, 2), mode="drop")
    return cache.at[jnp.arange(cache.shape[0]), :, at].set(new[:, :, 0], mode="drop", unique_indices=True)


def visible(positions: jax.Array, segments: jax.Array | None = None, parents: jax.Array | None = None) -> jax.Array:
    """Causal mask [B, T, T]; with segment ids and parents [B, T], what branches.py says is seen."""
    index = jnp.arange(positions.shape[1])
    mask = jnp.broadcast_to(index[:, None] >= index[None, :], (*positions.shape, positions.shape[1]))
    if segments is not None:
        mask &= related(segments, parents)
    return mask
