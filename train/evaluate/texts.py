"""Held-out reasoning text as batches, and its mean loss under a model: what most of the analysis measures by."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..generate.score import padded
from ..models.decoder import Params

Batch = dict[str, Any]
Loss = Callable[[Params, Batch], tuple[jax.Array, jax.Array]]
"""(parameters, batch) → (Σ w·loss, Σ w) over the batch's tokens, both (): `loss_sums` of one config, say."""
ROWS = 16
"""Sequences of a batch."""


@dataclasses.dataclass(frozen=True)
class Text:
    """One prompt with what should follow it, as tokens."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


def batches(texts: Sequence[Text], pad_id: int = 0, *, rows: int = ROWS) -> list[Batch]:
    """Put texts into batches of one shape: tokens [B, T] int32 and weights [B, T] float32.

    The weight of a token is 1 in a completion and 0 in a prompt and in padding; rows that fill up the last batch
    weigh nothing. T is the longest text, rounded up; B is `rows`, or less where as many batches then are fuller.

    Example:
      >>> [batch] = batches([Text((5, 6), (7,)), Text((5,), (7, 8, 9))])
      >>> batch["tokens"][:, :4].tolist(), batch["weights"][:, :4].tolist()
      ([[5, 6, 7, 0], [5, 7, 8, 9]], [[0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]])
    """
    length = padded(max(len(t.prompt) + len(t.completion) for t in texts))
    rows = math.ceil(len(texts) / math.ceil(len(texts) / rows))
    made = []
    for start in range(0, len(texts), rows):
        tokens, weights = np.full((rows, length), pad_id, np.int32), np.zeros((rows, length), np.float32)
        for row, text in enumerate(texts[start : start + rows]):
            whole = [*text.prompt, *text.completion]
            tokens[row, : len(whole)] = whole
            weights[row, len(text.prompt) : len(whole)] = 1.0
        made.append({"tokens": tokens, "weights": weights})
    return made


def mean_loss(loss: Loss, params: Params, given: Sequence[Batch]) -> float:
    r"""Return $\sum_b \ell_b / \sum_b w_b$ over batches: the mean of tokens, not of batches."""
    sums = [loss(params, batch) for batch in given]
    return total(sums)


def total(sums: Sequence[tuple[Any, Any]]) -> float:
    """Divide Σ numerators by Σ denominators, on the host in float64."""
    return float(sum(float(a) for a, _ in sums) / sum(float(b) for _, b in sums))


def mean_gradient(loss: Loss, params: Params, given: Sequence[Batch]) -> Params:
    """Return the gradient of `mean_loss` by the parameters, one batch after another."""
    return mean_loss_and_gradient(loss, params, given)[1]


def mean_loss_and_gradient(loss: Loss, params: Params, given: Sequence[Batch]) -> tuple[float, Params]:
    """Return `mean_loss` and its gradient by the parameters, one batch after another."""
    gradient, sums = jax.tree.map(jnp.zeros_like, params), []
    for batch in given:
        gradient, found = _add_gradient(loss, gradient, params, batch)
        sums.append(jax.device_get(found))
    weights = float(sum(float(weight) for _, weight in sums))
    return total(sums), jax.tree.map(lambda g: g / weights, gradient)


@functools.partial(jax.jit, static_argnums=0)
def _add_gradient(loss: Loss, gradient: Params, params: Params, batch: Batch):
    found, more = jax.value_and_grad(lambda p: loss(p, batch), has_aux=True)(params)
    return jax.tree.map(jnp.add, gradient, more), found
