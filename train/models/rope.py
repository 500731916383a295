"""Rotary position embeddings: frequencies, their scaling to longer contexts, and the rotation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .config import ModelConfig


def inverse_frequencies(c: ModelConfig) -> np.ndarray:
    r"""Rotary frequencies :math:`\theta^{-2i/H}`, [H/2] float32, after linear or llama3 scaling."""
    inv = 1.0 / c.rope_theta ** (np.arange(0, c.head_dim, 2, dtype=np.float64) / c.head_dim)
    s = c.rope_scaling
    if s is not None and s.kind == "linear":
        inv = inv / s.factor
    elif s is not None and s.kind == "llama3":
        # In turns of the original context: below low_freq_factor scaled, above high_freq_factor kept.
        turns = s.original_max_position_embeddings * inv / (2 * np.pi)
        keep = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
        inv = inv * keep + inv / s.factor * (1 - keep)
    return inv.astype(np.float32)


def rope_table(c: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position × frequency, [B, T, 1, H/2]: computed once, used by every layer."""
    angle = positions.astype(jnp.float32)[..., None, None] * jnp.asarray(inverse_frequencies(c))
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate x [B, T, heads, H]: element i pairs with i + H/2 (the Hugging Face order, not interleaved)."""
    cos, sin = rope
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
