"""Vectors of texts under a model: the mean of the last hidden states, or the last of them.

Lengths are padded to few sizes, so the number of compilations is bounded; a result depends on its own sequence alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..models.attention import visible
from ..models.config import ModelConfig
from ..models.decoder import Params, bind, count_up
from ..runtime.mesh import activations_on, everywhere, mesh_of
from .score import TOKENS_AT_ONCE, padded


def embed(
    config: ModelConfig,
    params: Params,
    sequences: Sequence[Sequence[int]],
    *,
    kind: Literal["mean", "last"] = "mean",
    dtype: str = "float32",
) -> np.ndarray:
    """A vector of length 1 for each sequence of tokens, float32 [n, D].

    Args:
      sequences: none empty; what is longer than the model's context is cut.
      kind: the mean of the hidden states behind the last norm over the tokens, or that of the last token.
    """
    cut = [list(s[: config.context]) for s in sequences]
    found = np.zeros((len(cut), config.hidden_size), np.float32)
    order = sorted(range(len(cut)), key=lambda i: (-len(cut[i]), i))
    start = 0
    while start < len(order):
        length = padded(len(cut[order[start]]))
        batch = order[start : start + max(1, min(64, TOKENS_AT_ONCE // length))]
        start += len(batch)
        rows = 1 << (len(batch) - 1).bit_length()
        tokens, lengths = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
        for row, i in enumerate(batch):
            tokens[row, : len(cut[i])], lengths[row] = cut[i], len(cut[i])
        vectors = embed_batch(config, params, tokens, lengths, kind=kind, dtype=dtype, mesh=mesh_of(params))
        found[batch] = np.asarray(vectors)[: len(batch)]
    return found


@functools.partial(jax.jit, static_argnames=("config", "kind", "dtype", "mesh"))
def embed_batch(config: ModelConfig, params: Params, tokens, lengths, *, kind: str, dtype: str, mesh) -> jax.Array:
    """Vectors [B, D] of right-padded rows [B, T] with `lengths` [B] tokens."""
    positions = count_up(tokens.shape, lengths)
    with activations_on(mesh):
        hidden, _ = bind(config, params)(tokens, positions, visible(positions), dtype=jnp.dtype(dtype))
        index = jnp.arange(tokens.shape[1])
        taken = index == lengths[:, None] - 1 if kind == "last" else index < lengths[:, None]
        total = jnp.sum(jnp.where(taken[..., None], hidden.astype(jnp.float32), 0.0), axis=1)
        return everywhere(total / jnp.linalg.norm(total, axis=-1, keepdims=True))
