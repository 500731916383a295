"""AdamW in pieces: the learning rate is an argument of the step, so one executable serves every phase."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from ..config import Sft


def transform(config: Sft) -> optax.GradientTransformation:
    """Clip, Adam moments, decoupled weight decay of matrices; the caller multiplies by −learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda params: jax.tree.map(lambda p: jnp.ndim(p) > 1, params)
        ),
    )


def learning_rate(config: Sft, step: int, steps: int) -> float:
    """Rate of update number `step` (from 0) of `steps`: linear warm-up, then cosine to 0 or constant."""
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
