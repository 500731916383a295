"""Rows that branch: several sequences in one row, of which some go on where another one ends.

Each token of a row carries the number of its segment and that of the segment which its own continues, its parent
(0: none). A token sees its own segment and its parent's, up to itself, and its position counts on from where the
parent ends. Packed examples are segments without parents. A prompt and several answers to it are a segment and others
whose parent it is: each answer is computed as if it alone stood after the prompt, and the prompt is computed once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .config import ModelConfig
from .rope import READS_LENGTHS


def related(segments: jax.Array, parents: jax.Array | None, query=slice(None), key=slice(None)) -> jax.Array:
    """Whether a query's segment is the key's, or continues it: [B, t, s] of ids [B, T].

    Args:
      query, key: which tokens of the row these are.
    """
    columns = segments[:, None, key]
    same = segments[:, query, None] == columns
    return same if parents is None else same | (parents[:, query, None] == columns)


def near(positions: jax.Array, window: int, query=slice(None), key=slice(None)) -> jax.Array:
    """Whether a key stands fewer than `window` positions before a query: [B, t, s] of positions [B, T]."""
    return positions[:, query, None] - positions[:, None, key] < window


def restart(segments: jax.Array) -> jax.Array:
    """0, 1, 2, … from the first token of each segment [B, T] on."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def positions_of(segments: jax.Array, parents: jax.Array | None) -> jax.Array:
    """Positions [B, T]: from 0 in each segment, and from its parent's length on where it has one."""
    if parents is None:
        return restart(segments)
    before = jnp.sum(parents[:, :, None] == segments[:, None, :], axis=2)
    return restart(segments) + jnp.where(parents > 0, before, 0)


def obstacle(config: ModelConfig, attention: str) -> str | None:
    """Why rows of this model cannot branch, or None.

    Args:
      attention: as for `Compute` (loss.py).
    """
    if attention == "splash":
        return "splash attention knows segments and no parents (sft.step.attention=xla has both)"
    if config.experts is not None:
        return "the balance of a mixture of experts counts a prompt for each of its answers"
    if config.rope_scaling is not None and config.rope_scaling.kind in READS_LENGTHS:
        return f"rotations of the kind {config.rope_scaling.kind} depend on the length of a whole sequence"
    return None


# --- answers and targets -----------------------------------------------------------------------------------

BRANCHED = ("parents", "answers", "sources", "cells")
"""What a batch of such rows has beside `tokens` and `segments`, [B, T] both.

`parents` [B, T] int32. `answers` [B, G, K] int32: the tokens that are learnt, a sequence a branch, of whose shape are
`weights` and every other array of the batch that is of tokens; filled up with the weight 0. `sources` and `cells`
[B, M] int32 are of the row's targets: the position in `tokens` from which each is predicted, and where it stands among
the G·K of `answers`; filled up with G·K. An answer's first token is predicted from the end of its parent, and its last
one, from which nothing is predicted, is in `answers` alone.
"""


def flat(values: jax.Array, cells: jax.Array) -> jax.Array:
    """Of values [B, G, K] of answers those of a row's targets: [B, M]; cells [B, M] are theirs among G·K, or G·K: 0."""
    return jnp.take_along_axis(jnp.pad(values.reshape(len(values), -1), ((0, 0), (0, 1))), cells, axis=1)


def by_answer(values: jax.Array, cells: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The other way round: values [B, M] of a row's targets as [B, G, K], 0 where an answer has none."""
    B, G, K = shape
    empty = jnp.zeros((B, G * K + 1), values.dtype)
    found = jax.vmap(lambda row, cell, value: row.at[cell].add(value))(empty, cells, values)
    return found[:, :-1].reshape(shape)


def grouped(batch: dict[str, jax.Array], values: jax.Array) -> jax.Array:
    """Values of targets [B·G, K] as [B, G, K] where a batch has groups; of rows that branch, [B, M] as [B, G, K]."""
    if "cells" in batch:
        return by_answer(values, batch["cells"], batch["answers"].shape)
    return values.reshape(*batch["tokens"].shape[:-1], -1)


def there(batch: dict[str, jax.Array], values: jax.Array) -> jax.Array:
    """Of values [B, T] of the tokens, or [B, G, K] of answers, those of the targets, [B, K] or [B, M]."""
    if "cells" in batch:
        return flat(values, batch["cells"])
    targets = batch.get("targets")
    return values[:, 1:] if targets is None else jnp.take_along_axis(values, targets, axis=1)
