"""What goes into a batch: examples as padded rows, every row once an epoch in an order that (seed, epoch) gives."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..config import Sft
from ..log import UserError


@dataclasses.dataclass(frozen=True)
class Rows:
    """Examples as arrays: tokens [n, T] int32 right-padded, weights [n, T] float32 (0 where not learnt)."""

    tokens: np.ndarray
    weights: np.ndarray
    dropped: int = 0
    """Examples longer than max_length."""

    @property
    def targets(self) -> int:
        """Tokens with a loss."""
        return int((self.weights[:, 1:] > 0).sum())

    @functools.cached_property
    def positions(self) -> np.ndarray | None:
        """Where each row has its targets, [n, K] filled up with 0; None if most positions are targets."""
        has = self.weights[:, 1:] > 0
        most = -(-int(has.sum(axis=1).max()) // 8) * 8
        if most > 0.75 * has.shape[1]:
            return None
        # Targets first, in their order: a stable sort of "is none".
        order = np.argsort(~has, axis=1, kind="stable")[:, :most]
        return np.where(np.take_along_axis(has, order, axis=1), order + 1, 0).astype(np.int32)


def to_rows(examples: Sequence[Mapping[str, Any]], config: Sft, pad_id: int = 0) -> Rows:
    """Pad examples {tokens, prompt_length, weight} to one length; too long ones are dropped and counted."""
    kept = [e for e in examples if len(e["tokens"]) <= config.max_length]
    if not kept:
        raise UserError(
            f"sft: none of {len(examples)} examples is at most sft.max_length={config.max_length} tokens long; raise it"
            if examples
            else "sft: there is no example to train on"
        )
    longest = max(len(e["tokens"]) for e in kept)
    # T − 1 positions are computed: a multiple of 16 of them.
    length = 1 + -(-(longest - 1) // 16) * 16
    tokens = np.full((len(kept), length), pad_id, np.int32)
    weights = np.zeros((len(kept), length), np.float32)
    for row, e in enumerate(kept):
        n = len(e["tokens"])
        tokens[row, :n] = e["tokens"]
        weights[row, 0 if config.loss == "all" else e["prompt_length"] : n] = e.get("weight", 1.0)
    return Rows(tokens, weights, len(examples) - len(kept))


def batches(rows: Rows, config: Sft, *, seed: int, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Every row once an epoch in an order drawn from (seed, epoch); the last batch is filled with weight 0."""
    n = len(rows.tokens)
    per_epoch = math.ceil(n / config.batch)
    for step in range(start, per_epoch * config.epochs):
        epoch, index = divmod(step, per_epoch)
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)
        chosen = order[index * config.batch : (index + 1) * config.batch]
        batch = {"tokens": rows.tokens[chosen], "weights": rows.weights[chosen]}
        if rows.positions is not None:
            batch["targets"] = rows.positions[chosen]
        missing = config.batch - len(chosen)
        yield {name: np.pad(values, ((0, missing), (0, 0))) for name, values in batch.items()}


def steps_of(rows: Rows, config: Sft) -> int:
    return math.ceil(len(rows.tokens) / config.batch) * config.epochs
