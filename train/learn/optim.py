"""AdamW in pieces: the learning rate is an argument of the step, so one executable serves every phase."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import optax

from jaxmerge.where import matches

from ..config import Sft
from ..log import UserError


def transform(config: Sft) -> optax.GradientTransformation:
    """Clip, Adam moments, decoupled weight decay where `decays` says; the caller multiplies by −learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.step.clip),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.add_decayed_weights(config.step.weight_decay, mask=lambda params: decay_mask(params, config.step.decay)),
    )


def decays(path: str, patterns: tuple[str, ...] = ()) -> bool:
    """Whether the parameter at `path` decays: where a pattern matches; with none, all but norms and biases.

    By name and not by rank: with stacked layers a norm has two axes.

    Example:
      >>> decays("model/norm/weight"), decays("model/layers/0/mlp/up_proj/weight"), decays("lm_head/weight", ("mlp",))
      (False, True, False)
    """
    return matches(patterns, path) if patterns else re.search(r"(norm/weight|/bias)$", path) is None


def decay_mask(params: Any, patterns: tuple[str, ...]) -> Any:
    """True at every leaf that decays; a pattern that matches no parameter is an error."""
    paths = jax.tree_util.tree_map_with_path(
        lambda path, _: "/".join(str(getattr(entry, "key", entry)) for entry in path), params
    )
    for pattern in patterns:
        if not any(matches(pattern, path) for path in jax.tree.leaves(paths)):
            raise UserError(
                f"sft.step.decay: {pattern!r} matches none of the {len(jax.tree.leaves(paths))} parameters; the first"
                f" is {jax.tree.leaves(paths)[0]}"
            )
    return jax.tree.map(lambda path: decays(path, patterns), paths)


def learning_rate(config: Sft, step: int, steps: int) -> float:
    """Rate of update number `step` (from 0) of `steps`: linear warm-up, then cosine to 0 or constant."""
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def ema_keep(config: Sft, step: int) -> float:
    """Share of the average kept at update number `step` (from 0): min(ema, (1 + n)/(10 + n)), n = step + 1.

    A short run then averages its own weights instead of remembering the ones it started from.
    """
    return min(config.step.ema, (2 + step) / (11 + step))
