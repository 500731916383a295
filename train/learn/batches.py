"""What goes into a batch: examples as padded or packed rows, in an order that (seed, epoch) gives.

A batch is a pure function of (rows, settings, seed, step): a resumed run sees what the undisturbed one would have,
and processes that take their shares of every batch see together what one sees.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..log import UserError
from .mixture import Mixture
from .packing import fill, pack
from .settings import Sft
from .stages import staged

Batch = dict[str, np.ndarray]
WINDOW = 4096
"""Examples packed together: rows stay near the order drawn, and so near the rates of a mixture."""


class RowSource(Protocol):
    """What `batches` needs."""

    def count(self, epoch: int) -> int:
        """Rows of an epoch."""
        ...

    def take(self, chosen: np.ndarray, epoch: int) -> Batch:
        """Arrays of some rows of an epoch, [len(chosen), T] each."""
        ...

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Row numbers of an epoch in the order in which they are seen."""
        ...

    def summary(self) -> dict[str, Any]:
        """Counts for the record of a run: examples, rows, tokens, efficiency, dropped, truncated."""
        ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """Examples as arrays: tokens [n, T] int32 right-padded, weights [n, T] float32 (0 where not learnt).

    A row may be several sequences (`pairs.Groups`): there are axes between n and T then.
    """

    tokens: np.ndarray
    weights: np.ndarray
    dropped: int = 0
    """Examples longer than max_length, left out."""
    truncated: int = 0
    """Examples longer than max_length, cut."""
    lengths: np.ndarray | None = None
    """Tokens of each sequence, [n]; None where rows are full or it is not known."""

    @property
    def targets(self) -> int:
        """Tokens with a loss."""
        return int((self.weights[..., 1:] != 0).sum())

    @functools.cached_property
    def positions(self) -> np.ndarray | None:
        """Where each sequence has its targets, [n, K] filled up with 0; None if most positions are targets."""
        has = self.weights[..., 1:] != 0
        width = target_width(int(has.sum(axis=-1).max()), has.shape[-1])
        if width is None:
            return None
        flat = has.reshape(math.prod(has.shape[:-1]), has.shape[-1])
        return target_positions(flat, width).reshape(*has.shape[:-1], width)

    def count(self, epoch: int) -> int:
        del epoch
        return len(self.tokens)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(self.tokens))

    def take(self, chosen: np.ndarray, epoch: int) -> Batch:
        del epoch
        batch = {"tokens": self.tokens[chosen], "weights": self.weights[chosen]}
        return batch if self.positions is None else batch | {"targets": self.positions[chosen]}

    def summary(self) -> dict[str, Any]:
        used = self.tokens.size if self.lengths is None else int(self.lengths.sum())
        return {
            "examples": len(self.tokens),
            "rows": len(self.tokens),
            "efficiency": used / self.tokens.size,
            "dropped": self.dropped,
            "truncated": self.truncated,
        }


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Examples of one or more sources, drawn and perhaps packed anew for every epoch.

    Attributes:
      tokens, weights: of each example, int32 and float32 of its length.
      epochs: rows of each epoch in the order in which they are seen, a row being the numbers of its examples.
      length: tokens of a row.
      packed: whether rows have segment ids.
    """

    tokens: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...]
    epochs: tuple[tuple[tuple[int, ...], ...], ...]
    length: int
    pad_id: int
    packed: bool
    dropped: int = 0
    truncated: int = 0

    @functools.cached_property
    def _width(self) -> int | None:
        """K of the targets of a row, the same for every batch."""
        learnt = [int((w[1:] != 0).sum()) for w in self.weights]
        return target_width(max(sum(learnt[i] for i in row) for rows in self.epochs for row in rows), self.length - 1)

    def count(self, epoch: int) -> int:
        return len(self.epochs[epoch])

    def order(self, seed: int, epoch: int) -> np.ndarray:
        del seed  # the mixture's own seed drew the rows
        return np.arange(self.count(epoch))

    def take(self, chosen: np.ndarray, epoch: int) -> Batch:
        shape = (len(chosen), self.length)
        tokens, weights, segments = (np.zeros(shape, kind) for kind in (np.int32, np.float32, np.int32))
        for at, number in enumerate(chosen):
            row = self.epochs[epoch][number]
            tokens[at], weights[at], segments[at] = fill(
                [self.tokens[i] for i in row], [self.weights[i] for i in row], self.length, self.pad_id
            )
        batch = {"tokens": tokens, "weights": weights}
        if self._width is not None:
            batch["targets"] = target_positions(weights[:, 1:] != 0, self._width)
        return batch | ({"segments": segments} if self.packed else {})

    def summary(self) -> dict[str, Any]:
        """Count the first epoch; `unpacked` is the efficiency of one example a row, padded to the longest."""
        rows = self.epochs[0]
        drawn = [len(self.tokens[i]) for row in rows for i in row]
        longest = row_length(max(drawn))
        return {
            "examples": len(drawn),
            "rows": len(rows),
            "efficiency": sum(drawn) / (len(rows) * self.length),
            "unpacked": sum(drawn) / (len(drawn) * longest),
            "dropped": self.dropped,
            "truncated": self.truncated,
        }


# --- from examples to rows ---------------------------------------------------------------------------------


def to_rows(examples: Sequence[Mapping[str, Any]], config: Sft, pad_id: int = 0, *, seed: int = 0) -> Rows | Drawn:
    """Rows of examples {tokens, prompt_length or learnt, weight}, padded to one length, or packed (`sft.packing`).

    Too long ones are dropped or cut, as `sft.overlong` says, and counted.

    Args:
      seed: of the order in which examples are drawn into packed rows.
    """
    if config.packing:
        return to_drawn([examples], config, pad_id, seed=seed)
    tokens, weights, dropped, truncated = to_arrays(examples, config)
    length = row_length(max(map(len, tokens)))
    rows = [fill([ids], [weight], length, pad_id) for ids, weight in zip(tokens, weights, strict=True)]
    lengths = np.array([len(ids) for ids in tokens])
    return Rows(np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows]), dropped, truncated, lengths)


def to_drawn(
    sources: Sequence[Sequence[Mapping[str, Any]]],
    config: Sft,
    pad_id: int = 0,
    *,
    rates: Sequence[float] = (),
    draws: int | None = None,
    stages: Sequence[Sequence[float]] = (),
    seed: int,
) -> Drawn:
    """Rows of several sources mixed at `rates`, for each of `config.epochs` epochs.

    Args:
      sources: examples of each.
      rates: () draws every example of every source once an epoch.
      draws: examples of an epoch; None goes on until every example of every source has come once.
      stages: of each source, its shares in the stages, which are gone through in place of a mixture (stages.py).
    """
    arrays = [to_arrays(examples, config, f" of source {k}" if len(sources) > 1 else "")
              for k, examples in enumerate(sources)]  # fmt: skip
    mixture = Mixture(tuple(len(a[0]) for a in arrays), tuple(rates), seed)
    tokens = tuple(ids for a in arrays for ids in a[0])
    weights = tuple(weight for a in arrays for weight in a[1])
    first = np.cumsum((0, *mixture.sizes))
    longest = max(map(len, tokens))
    length = row_length(config.max_length if config.packing else longest)
    size = draws or mixture.epoch
    passes = (
        staged(mixture.sizes, stages, config.epochs, seed)
        if stages
        else [[mixture.draw(epoch * size, (epoch + 1) * size)] for epoch in range(config.epochs)]
    )
    epochs = []
    for epoch, drawn in enumerate(passes):
        epochs.append([])
        for at, (source, example) in enumerate(drawn):
            numbers = first[source] + example
            if not config.packing:
                epochs[-1] += [(int(i),) for i in numbers]
                continue
            rows = pack([len(tokens[i]) for i in numbers], length, window=WINDOW)
            # Best fit leaves the fullest rows first; a batch is to hold rows of every kind.
            key = (seed, epoch * len(drawn) + at)
            epochs[-1] += shuffle_windows([tuple(int(numbers[i]) for i in row) for row in rows], key)
    return Drawn(
        tokens,
        weights,
        tuple(map(tuple, epochs)),
        length,
        pad_id,
        config.packing,
        sum(a[2] for a in arrays),
        sum(a[3] for a in arrays),
    )


def to_arrays(
    examples: Sequence[Mapping[str, Any]], config: Sft, where: str = ""
) -> tuple[list[np.ndarray], list[np.ndarray], int, int]:
    """Tokens and loss weights of each example that is kept, then how many were dropped and how many cut."""
    tokens, weights, dropped, truncated = [], [], 0, 0
    for e in examples:
        n = len(e["tokens"])
        learnt = np.zeros(n, np.float32)
        if config.loss == "all":
            learnt[:] = 1.0
        elif "learnt" in e:
            learnt[:] = e["learnt"]
        else:
            learnt[e["prompt_length"] :] = 1.0
        keep = config.max_length if config.overlong == "truncate" else n
        if n > config.max_length and not learnt[1:keep].any():
            dropped += 1  # cut, nothing would be left to learn
        elif n > config.max_length and config.overlong == "drop":
            dropped += 1
        elif (weight := np.broadcast_to(np.float32(config.objective.weight_of(e)), n)).any():  # else nothing is learnt
            truncated += n > keep
            tokens.append(np.asarray(e["tokens"][:keep], np.int32))
            weights.append(learnt[:keep] * weight[:keep])
    if not tokens and examples and not dropped:
        raise UserError(f"sft: all {len(examples)} examples{where} have the weight 0; nothing would be learnt")
    if not tokens:
        raise UserError(
            f"sft: none of {len(examples)} examples{where} is at most sft.max_length={config.max_length} tokens long;"
            " raise it"
            if examples
            else f"sft: there is no example{where} to train on"
        )
    return tokens, weights, dropped, truncated


def row_length(longest: int) -> int:
    """T − 1 positions are computed: a multiple of 16 of them."""
    return 1 + -(-(longest - 1) // 16) * 16


def shuffle_windows(rows: list[tuple[int, ...]], key: tuple[int, int]) -> list[tuple[int, ...]]:
    """Permute rows within blocks that keep the order drawn, roughly."""
    generator = np.random.Generator(np.random.Philox(key=[key[0], (1 << 63) + key[1]]))
    mixed = []
    for start in range(0, len(rows), WINDOW):
        block = rows[start : start + WINDOW]
        mixed += [block[i] for i in generator.permutation(len(block))]
    return mixed


def target_width(most: int, positions: int) -> int | None:
    """Columns for a row's targets, a multiple of 8; None if that would be most of the positions."""
    width = -(-most // 8) * 8
    return None if width > 0.75 * positions else width


def target_positions(has: np.ndarray, width: int) -> np.ndarray:
    """Where rows have targets: has [n, T − 1] (of tokens 1 …) → [n, width] int32 filled up with 0."""
    # Targets first, in their order: a stable sort of "is none".
    order = np.argsort(~has, axis=1, kind="stable")[:, :width]
    return np.where(np.take_along_axis(has, order, axis=1), order + 1, 0).astype(np.int32)


# --- from rows to batches ----------------------------------------------------------------------------------


def batches(
    rows: RowSource, config: Sft, *, seed: int, start: int = 0, share: np.ndarray | None = None
) -> Iterator[Batch]:
    """Every row once an epoch in an order drawn from (seed, epoch); the last batch is filled with weight 0.

    Args:
      start: the first step to give.
      share: give these rows of every batch alone, by their numbers in it; None is all.
    """
    share = np.arange(config.batch) if share is None else share
    step = 0
    for epoch in range(config.epochs):
        steps = math.ceil(rows.count(epoch) / config.batch)
        if step + steps <= start:
            step += steps
            continue
        order = rows.order(seed, epoch)
        for index in range(max(0, start - step), steps):
            begin = index * config.batch
            numbers = begin + share
            chosen = order[numbers[numbers < len(order)]]
            missing = len(share) - len(chosen)
            batch = rows.take(chosen, epoch)
            yield {
                name: np.pad(values, ((0, missing), *[(0, 0)] * (values.ndim - 1))) for name, values in batch.items()
            }
        step += steps


def steps_of(rows: RowSource, config: Sft) -> int:
    return sum(math.ceil(rows.count(epoch) / config.batch) for epoch in range(config.epochs))
