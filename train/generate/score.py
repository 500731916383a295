"""Log-probabilities of given continuations under a model: multiple choice, perplexity, other people's harnesses.

Lengths are padded to few sizes, so the number of compilations is bounded; a result depends on its own sequence alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..log import UserError
from ..models.attention import visible
from ..models.config import ModelConfig
from ..models.decoder import Params, count_up, logprobs
from ..models.tokenizer import Tokenizer
from ..runtime.mesh import activations_on, everywhere, mesh_of
from .together import bind

TOKENS_AT_ONCE = 4096
"""Positions of a batch, padding included."""
LOGITS_AT_ONCE = 1024
"""Positions whose logits are held at a time."""
STEPS = (8, 32, 64, 128, 256, 512, 1024)
"""Lengths that sequences are padded to; above the last, multiples of it."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """A continuation under the model: its log-probability, and whether greedy decoding would have written it."""

    logprob: float
    greedy: bool


def padded(n: int) -> int:
    """Round a length up to one of few.

    Example:
      >>> padded(33), padded(1500)
      (64, 2048)
    """
    return next((step for step in STEPS if n <= step), -(-n // STEPS[-1]) * STEPS[-1])


def score(
    config: ModelConfig,
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    dtype: str = "float32",
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Scored]:
    """Σ log p(token | all before it) over each continuation, in the order of `pairs`.

    Args:
      pairs: (context, continuation) tokens, neither empty. What is too long for the model is refused.
      on_batch: called with the number of sequences done.
    """
    for i, (context, continuation) in enumerate(pairs):
        length = len(context) + len(continuation)
        if not len(context) or not len(continuation):
            raise UserError(f"sequence {i}: {len(context)} tokens before {len(continuation)}; both need one or more")
        if length > config.max_position_embeddings + 1:
            raise UserError(
                f"sequence {i} has {length} tokens, and the model ends at {config.max_position_embeddings}; shorten it"
            )
    results: list[Scored | None] = [None] * len(pairs)
    for batch in by_length(pairs):
        tokens, targets, lengths = arrays(pairs, batch)
        found, greedy = score_batch(config, params, tokens, targets, lengths, dtype=dtype, mesh=mesh_of(params))
        for row, i in enumerate(batch):
            n = len(pairs[i][1])
            # Summed in float64 on the host: a sum over a thousand tokens keeps the digits of its parts.
            total = float(np.asarray(found[row, :n], np.float64).sum())
            results[i] = Scored(total, bool(np.asarray(greedy[row, :n]).all()))
        on_batch(len(batch))
    return [r for r in results if r is not None]


def by_length(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[int]]:
    """Numbers of the pairs that share a batch: neighbours in length, the longest first."""
    order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]) - len(pairs[i][1]), i))
    start = 0
    while start < len(order):
        context, continuation = pairs[order[start]]
        width = max(1, min(64, TOKENS_AT_ONCE // padded(len(context) + len(continuation) - 1)))
        yield order[start : start + width]
        start += width


def arrays(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch: Sequence[int]):
    """(tokens [B, T + 1], targets [B, K], lengths [B]) of a batch, each size one of few; rows may hold nothing."""
    length = padded(max(len(pairs[i][0]) + len(pairs[i][1]) - 1 for i in batch))
    width = min(length, padded(max(len(pairs[i][1]) for i in batch)))
    B = 1 << (len(batch) - 1).bit_length()
    tokens, targets = np.zeros((B, length + 1), np.int32), np.zeros((B, width), np.int32)
    lengths = np.ones(B, np.int32)
    for row, i in enumerate(batch):
        context, continuation = pairs[i]
        n, k = len(context), len(continuation)
        tokens[row, : n + k] = [*context, *continuation]
        targets[row, :k] = np.arange(n, n + k)
        lengths[row] = n + k - 1
    return tokens, targets, lengths


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def score_batch(config: ModelConfig, params: Params, tokens, targets, lengths, *, dtype: str, mesh=None):
    """Log-probability of each target and whether it is the most probable token, [B, K] both.

    Args:
      tokens: [B, T + 1]. targets: [B, K] positions ≥ 1 of tokens, filled up with 0.
      lengths: [B] tokens that are read; positions after them keep the last one's.
      mesh: that the parameters lie on.
    """
    positions = count_up((tokens.shape[0], tokens.shape[1] - 1), lengths)
    decoder = bind(config, params)
    with activations_on(mesh):
        hidden, _ = decoder(tokens[:, :-1], positions, visible(positions), dtype=jnp.dtype(dtype))
    before = jnp.maximum(targets - 1, 0)[..., None]
    hidden = jax.tree.map(lambda state: jnp.take_along_axis(state, before, axis=1), hidden)
    labels = jnp.take_along_axis(tokens, targets, axis=1)

    def judge(part):
        h, label = part
        logits = decoder.head(h, jnp.dtype(dtype))
        return logprobs(logits, label), jnp.argmax(logits, axis=-1) == label

    flat, ids = jax.tree.map(lambda state: state.reshape(-1, state.shape[-1]), hidden), labels.reshape(-1)
    found, greedy = lax.map(judge, (flat, ids), batch_size=min(LOGITS_AT_ONCE, ids.size))
    with activations_on(mesh):
        return everywhere(found.reshape(labels.shape)), everywhere(greedy.reshape(labels.shape))


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, *, special: bool = True
) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what follows it, joined as everywhere (`Tokenizer.join`).

    Spaces that end the context begin the continuation instead, as tokenizers have it.

    Args:
      special: put what the tokenizer does by itself around a text, such as a BOS.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    head, tail = tokenizer.join(context, continuation, special=special)
    return head, tail
