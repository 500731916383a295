"""Rows of two sequences of which only the first is learnt: no backward pass is made of the second.

Some objectives read the log-probabilities of a second answer and let no gradient flow through them: KTO's estimate of
its divergence, AFT's worse answer while it is detached. As constants they cost a forward pass; as a part of the batch
they cost three, for the backward pass of zeros costs what any other does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..models.branches import grouped, there
from ..models.config import ModelConfig
from ..models.decoder import Params
from ..models.loss import READ, Compute, Objective, as_rows, token_logps

Batch = dict[str, jax.Array]


def with_constants(
    model: ModelConfig, params: Params, batch: Batch, how: Compute, objective: Objective
) -> tuple[Batch, Objective]:
    """The first sequences of a batch [B, 2, T], and the objective as a function of their log-probabilities alone.

    The value is that of the whole batch, and so is the gradient if none flows through the second sequences.
    """
    shape = batch["tokens"].shape
    paired = {name for name, x in batch.items() if x.ndim == len(shape)}
    first, second = ({name: batch[name][:, i : i + 1] for name in paired} for i in (0, 1))
    rows = as_rows(second)

    def of_targets(values: jax.Array) -> jax.Array:
        return grouped(second, there(rows, values.reshape(-1, values.shape[-1])))

    constants = {name: of_targets(x) for name, x in second.items() if name not in READ}
    logps = of_targets(token_logps(model, jax.lax.stop_gradient(params), second, how))
    weights = of_targets(second["weights"])
    if "targets" in second:
        weights = jnp.where(second["targets"] > 0, weights, 0.0)

    def both(ours, our_weights, beside):
        whole = {name: join(x, constants[name]) if name in constants else x for name, x in beside.items()}
        return objective(join(ours, logps), join(our_weights, weights), whole)

    return {**batch, **first}, both


def join(first: jax.Array, second: jax.Array) -> jax.Array:
    """[B, 1, K] twice as [B, 2, K]."""
    return jnp.concatenate([first, second], axis=1)
