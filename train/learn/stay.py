r"""What holds fine-tuned weights near those they came from: the controls that merging is compared with.

- `l2`: the penalty $\frac{\lambda}{2} \lVert \theta - \theta_0 \rVert^2$, L2-SP (Li et al., "Explicit Inductive
  Bias for Transfer Learning with Convolutional Networks", https://arxiv.org/abs/1802.01483)
- `kl`: the penalty $\beta\,\mathrm{KL}(p_0 \| p_\theta)$ of whole next-token distributions, the mean over the
  tokens learnt (Li and Hoiem, "Learning without Forgetting", https://arxiv.org/abs/1606.09282), or with `divergence`
  another one of models/divergence.py
- `freeze`: parameters that are not trained; `stop_at`: early stopping at a share of the schedule
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge.where import matches

from ..log import UserError
from ..models.decoder import Params
from .optim import checked_paths


class Anchor(NamedTuple):
    """The weights stayed near, and how strongly: arguments of the step, so that strengths share an executable."""

    params: Params
    l2: Any
    kl: Any


def pull(params: Params, anchor: Anchor, grads: Any) -> Any:
    """The gradients with λ(θ − θ_0) added."""
    return jax.tree.map(
        lambda g, p, a: g + anchor.l2 * (p.astype(jnp.float32) - a.astype(jnp.float32)), grads, params, anchor.params
    )


def held(patterns: tuple[str, ...], params: Params) -> Any:
    """True at every leaf that is frozen, None where no pattern is given; a pattern without a leaf is an error."""
    if not patterns:
        return None
    frozen = [matches(patterns, path) for path in checked_paths("sft.stay.freeze", patterns, params)]
    if all(frozen):
        raise UserError(f"sft.stay.freeze: {', '.join(patterns)} freeze every parameter; leave some to train")
    return jax.tree.unflatten(jax.tree.structure(params), frozen)


def zeroed(grads: Any, frozen: Any) -> Any:
    """The gradients with 0 where a leaf is frozen, so that it counts in no norm."""
    return jax.tree.map(lambda g, is_frozen: jnp.zeros_like(g) if is_frozen else g, grads, frozen)
