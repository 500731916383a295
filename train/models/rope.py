r"""Rotary position embeddings: frequencies, their scaling to longer contexts, and the rotation.

    angle(position, i) = position · inv_i,   inv_i = θ^(−2i/R),   i < R/2

    linear     inv / s
    llama3     of long waves inv / s, of short ones inv, in between a ramp in turns of the original context
    yarn       the same with a ramp over i; cos and sin × 0.1 ln s + 1
    dynamic    θ grows once a sequence of n tokens is longer than m: θ (s n/m − (s − 1))^(R/(R−2))
    longrope   inv / short_i, or inv / long_i once n exceeds the original context; cos and sin × √(1 + ln s / ln m)

s is the factor, m the context trained on, n the sequence's largest position + 1: with padding that carries its
last token's position, and positions that start again in each packed segment, n is read off the positions.

References:
  Peng et al., "YaRN", https://arxiv.org/abs/2309.00071
  Ding et al., "LongRoPE", https://arxiv.org/abs/2402.13753
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .config import ModelConfig, Rope, RopeScaling

Frequencies = tuple[np.ndarray | jax.Array, float]
"""Frequencies [R/2], or [B, T, 1, R/2] where they depend on the sequence, and the factor of cos and sin."""


def rope_table(c: ModelConfig, positions: jax.Array, kind: Rope = "global") -> tuple[jax.Array, jax.Array]:
    """cos and sin of position × frequency, [B, T, 1, R/2]: computed once, used by every layer of a kind."""
    scaling = None if kind == "local" else c.rope_scaling
    theta = c.local_rope_theta if kind == "local" and c.local_rope_theta is not None else c.rope_theta
    scale: Callable[..., Frequencies] = default if scaling is None else SCALINGS[scaling.kind]
    inverse, factor = scale(c, theta, scaling, positions)
    if kind == "none":
        # Rotation by nothing, exactly: layers that do not rotate have the shape of those that do.
        inverse, factor = np.zeros(c.rotary_dim // 2, np.float32), 1.0
    angle = positions.astype(jnp.float32)[..., None, None] * jnp.asarray(inverse, jnp.float32)
    return pin(jnp.cos(angle) * factor), pin(jnp.sin(angle) * factor)


def pin(table: jax.Array) -> jax.Array:
    """The same numbers, computed once: a product with the identity, exact in full precision.

    XLA otherwise fuses cos and sin into every use and computes them once a head and layer, forward and backward: a
    tenth of a training step of 11 M parameters on a CPU, where it drops optimization barriers before it fuses.
    """
    return jnp.matmul(table, jnp.eye(table.shape[-1], dtype=table.dtype), precision=lax.Precision.HIGHEST)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array], *, interleaved: bool = False) -> jax.Array:
    """Rotate the first R elements of x [B, T, heads, H]: i pairs with i + R/2 (Hugging Face's order).

    Args:
      interleaved: 2i pairs with 2i + 1. The result has the first of all pairs before the second: queries and keys in
        one order have the products that they have in another.
    """
    if interleaved:
        R = 2 * rope[0].shape[-1]
        pairs = x[..., :R].reshape(*x.shape[:-1], R // 2, 2).swapaxes(-1, -2).reshape(*x.shape[:-1], R)
        x = jnp.concatenate([pairs, x[..., R:]], axis=-1)
    return _rotate(x, *rope)


@jax.custom_vjp
def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


# The gradient of a rotation is the rotation back; autodiff adds up padded slices, 5 × slower on a CPU. The angles
# are no parameters.
_rotate.defvjp(
    lambda x, cos, sin: (_rotate(x, cos, sin), (cos, sin)),
    lambda rope, g: (_rotate(g, rope[0], -rope[1]), None, None),
)


def sequence_lengths(positions: jax.Array) -> jax.Array:
    """Length of the sequence that each token is part of, [B, T]: the position its run ends at, + 1.

    A run ends where the next position is smaller. (Two single tokens in a row are taken for one run: both stand
    at position 0, which no frequency turns.)
    """
    T = positions.shape[1]
    index = jnp.arange(T)
    falls = positions[:, 1:] < positions[:, :-1]
    ends = jnp.where(jnp.pad(falls, ((0, 0), (0, 1)), constant_values=True), index, T)
    return jnp.take_along_axis(positions, lax.cummin(ends, axis=1, reverse=True), axis=1) + 1


# --- frequencies: (config, θ, scaling, positions) → Frequencies --------------------------------------------


def powers(c: ModelConfig, theta) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, c.rotary_dim, 2, dtype=np.float64) / c.rotary_dim)


def default(c: ModelConfig, theta: float, s: RopeScaling | None, positions) -> Frequencies:
    del s, positions
    return powers(c, theta), 1.0


def linear(c: ModelConfig, theta: float, s: RopeScaling, positions) -> Frequencies:
    del positions
    return powers(c, theta) / s.factor, 1.0


def llama3(c: ModelConfig, theta: float, s: RopeScaling, positions) -> Frequencies:
    del positions
    inverse = powers(c, theta)
    # In turns of the original context: below low_freq_factor scaled, above high_freq_factor kept.
    turns = s.original_max_position_embeddings * inverse / (2 * np.pi)
    keep = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
    return inverse * keep + inverse / s.factor * (1 - keep), 1.0


def yarn(c: ModelConfig, theta: float, s: RopeScaling, positions) -> Frequencies:
    del positions
    R = c.rotary_dim

    def index(turns: float) -> float:
        """Frequency that makes so many turns in the original context."""
        return R * math.log(s.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(s.beta_fast), index(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    scaled = np.clip((np.arange(R // 2) - low) / max(high - low, 0.001), 0, 1)
    inverse = powers(c, theta)
    return inverse / s.factor * scaled + inverse * (1 - scaled), yarn_attention_factor(s)


def yarn_attention_factor(s: RopeScaling) -> float:
    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0

    if s.attention_factor is not None:
        return s.attention_factor
    if s.mscale and s.mscale_all_dim:
        return growth(s.mscale) / growth(s.mscale_all_dim)
    return growth(1.0)


def dynamic(c: ModelConfig, theta: float, s: RopeScaling, positions) -> Frequencies:
    R, longest = c.rotary_dim, c.max_position_embeddings
    length = jnp.maximum(sequence_lengths(positions), longest).astype(jnp.float32)
    grown = theta * (s.factor * length / longest - (s.factor - 1)) ** (R / (R - 2))
    exponents = jnp.asarray(np.arange(0, R, 2) / R, jnp.float32)
    return grown[..., None, None] ** -exponents, 1.0


def longrope(c: ModelConfig, theta: float, s: RopeScaling, positions) -> Frequencies:
    inverse = powers(c, theta)
    short, long = (jnp.asarray(inverse / np.array(f), jnp.float32) for f in (s.short_factor, s.long_factor))
    is_long = sequence_lengths(positions) > s.original_max_position_embeddings
    factor = s.attention_factor
    if factor is None:
        trained = s.original_max_position_embeddings
        factor = math.sqrt(1 + math.log(s.factor) / math.log(trained)) if s.factor > 1 else 1.0
    return jnp.where(is_long[..., None, None], long, short), factor


SCALINGS: dict[str, Callable[..., Frequencies]] = {
    "linear": linear,
    "dynamic": dynamic,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}
READS_LENGTHS = ("dynamic", "longrope")
"""Those of SCALINGS that look at the length of the sequence a token is part of."""
