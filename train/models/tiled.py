"""Causal attention in tiles of queries, each against the keys it can see: what a CPU does in place of a kernel.

Half of the scores of a causal mask are never looked at, and a tile's scores stay in the cache. Measured with
docs/log.md (AMD EPYC, 8 rows of 256, 6 heads of 64, forward and backward, CPU time): 74 ms as one mask and autodiff,
54 with this backward pass, 45 and 39 in tiles of 128 and 64 with autodiff, 32 with both in float32; in bfloat16 74
and, in tiles of 128, 33, for autodiff multiplies float32 gradients with bfloat16 operands.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from .branches import near, related

TILES = 8  # at most, for each is compiled


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments,
    *,
    scale: float,
    window: int | None,
    parents=None,
    positions=None,
) -> jax.Array:
    """As `attention.attend` under a causal mask: q [B, N, T, H], k and v [B, K, T, H] → [B, N, T, H] float32.

    Args:
      segments: [B, T] ids of packed sequences, or None.
      window: keys a query sees, itself included; None is all.
      parents, positions: [B, T] of rows that branch (branches.py), whose windows are of positions; None: of columns.
    """
    B, N, T, H = q.shape
    K = k.shape[1]
    q = q.reshape(B, K, N // K, T, H)
    size = max(64 if q.dtype == jnp.float32 else 128, -(-T // TILES))
    tiles = []
    for start in range(0, T, size):
        end = min(start + size, T)
        first = 0 if window is None or positions is not None else max(0, start - window + 1)
        query, key = jnp.arange(start, end)[:, None], jnp.arange(first, end)[None]
        part = slice(start, end), slice(first, end)
        seen = (query >= key)[None]
        if window is not None:
            seen &= query - key < window if positions is None else near(positions, window, *part)
        if segments is not None:
            seen &= related(segments, parents, *part)
        seen = seen[:, None, None]
        tiles.append(_tile(q[:, :, :, start:end], k[:, :, first:end], v[:, :, first:end], seen, scale))
    return jnp.concatenate(tiles, axis=3).reshape(B, N, T, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tile(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float) -> jax.Array:
    """softmax(s q kᵀ) v: q [B, K, G, t, H], k and v [B, K, S, H], seen broadcasts to [B, K, G, t, S]."""
    return _forward(q, k, v, seen, scale)[0]


def _forward(q, k, v, seen, scale: float):
    B, K, G, t, H = q.shape
    scores = _product("bkth,bksh->bkts", q.reshape(B, K, G * t, H), k).reshape(B, K, G, t, -1) * scale
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).reshape(B, K, G * t, -1).astype(v.dtype)
    return _product("bkts,bksh->bkth", weights, v).reshape(q.shape), (q, k, v, weights)


def _backward(scale: float, saved, g: jax.Array):
    r"""$\partial S = W \odot (\partial W - \langle \partial W, W \rangle)$, of the softmax W of the scores S."""
    q, k, v, weights = saved
    B, K, G, t, H = q.shape
    g = g.reshape(B, K, G * t, H).astype(v.dtype)
    d_weights, wide = _product("bkth,bksh->bkts", g, v), weights.astype(jnp.float32)
    d_scores = wide * (d_weights - jnp.sum(d_weights * wide, axis=-1, keepdims=True)) * scale
    d_scores = d_scores.astype(v.dtype)
    d_q = _product("bkts,bksh->bkth", d_scores, k).reshape(q.shape)
    d_k = _product("bkts,bkth->bksh", d_scores, q.reshape(B, K, G * t, H))
    d_v = _product("bkts,bkth->bksh", weights, g)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_tile.defvjp(_forward, _backward)
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
