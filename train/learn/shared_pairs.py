"""Rows of preference pairs that hold their prompt once: the chosen and the rejected answer both continue it.

Rows of one answer each compute a pair's prompt twice. Here the row of a pair is its prompt and then its two answers,
each of which sees the prompt and itself alone (models/branches.py). So the log-probabilities, and with them every loss
of pairs, are those of rows of one answer each, rounding apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ..log import say
from ..models.branches import obstacle
from ..models.config import ModelConfig
from ..models.loss import Compute
from .batches import Batch, RowSource
from .pairs import Groups
from .settings import Sft
from .shared import Layout, Pair, Sharing
from .speed import step_flops

STEP = 16
"""Positions of a row are a multiple of it, as those of rows of one answer are; a run has rows of one length."""


@dataclasses.dataclass(frozen=True)
class Forked(Groups):
    """Pairs whose two answers share a row.

    Attributes:
      forked: the arrays of a batch, n rows each, as `BRANCHED` of models/branches.py says.
    """

    forked: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def take(self, chosen: np.ndarray, epoch: int) -> Batch:
        del epoch
        return {name: values[chosen] for name, values in {**self.forked, **self.beside}.items()}


def with_shared_prompts(model: ModelConfig, rows: RowSource, config: Sft, how: Compute) -> RowSource:
    """The rows with each pair's prompt once, where `config.share_prompts` asks for it, or as they were.

    What is done is told, with the reason where the rows stay.
    """
    if not isinstance(rows, Groups) or not config.share_prompts:
        return rows
    if reason := kept_apart(model, rows, config, how):
        say(f"prompts are computed for each of their answers: {reason}")
        return rows
    pairs = answers_of(rows)
    layout = layout_of(pairs)
    before = rows.tokens.shape[-1] - 1
    apart = step_flops(model, 2, before, 2 * (before if rows.positions is None else rows.positions.shape[-1]))
    ours = step_flops(model, 1, layout.length, layout.targets)
    if ours >= apart:
        say("prompts are computed for each of their answers: rows that share them take no fewer operations here")
        return rows
    say(
        f"prompts are computed once for both answers: rows of {layout.length} tokens in place of two of {before}, "
        f"{ours / apart:.0%} of the operations"
    )
    longest = max(len(answer) for _, answer in pairs)
    forked = Sharing(model, size=2, parts=1, ways=1, longest=longest).batch(pairs, layout, 0)
    forked["weights"] *= rows.weights.max(axis=-1)[..., None]  # a pair's weight is that of each of its tokens
    return Forked(**{f.name: getattr(rows, f.name) for f in dataclasses.fields(Groups)}, forked=forked)


def kept_apart(model: ModelConfig, rows: Groups, config: Sft, how: Compute) -> str | None:
    """Why the answers of these rows keep rows of their own, or None."""
    if config.objective.learns != "pairs":
        return f"{config.objective.name} learns one answer of a row and only looks at the other"
    starts = rows.starts
    assert starts is not None, "pairs.py tells where answers begin"
    if not starts.all():
        return "a pair has no prompt"
    before = np.arange(rows.tokens.shape[-1]) < starts[:, None]
    if differing := int(((rows.tokens[:, 0] != rows.tokens[:, 1]) & before).any(axis=-1).sum()):
        return f"the answers of {differing} pairs follow different prompts"
    return obstacle(model, how.attention)


def answers_of(rows: Groups) -> list[Pair]:
    """(prompt, answer) of each sequence: the chosen and the rejected one of the first pair, those of the second, …"""
    assert rows.starts is not None
    assert rows.lengths is not None
    found = []
    for both, start, lengths in zip(rows.tokens, rows.starts, rows.lengths, strict=True):
        found += [(both[0, :start].tolist(), ids[start:end].tolist()) for ids, end in zip(both, lengths, strict=True)]
    return found


def layout_of(pairs: list[Pair]) -> Layout:
    """One row a pair, as long as the longest needs."""
    both = list(zip(pairs[::2], pairs[1::2], strict=True))
    targets = max(len(chosen) + len(rejected) for (_, chosen), (_, rejected) in both)
    # The last token of an answer predicts nothing, so that it is not read.
    length = max(len(p) + max(0, len(chosen) - 1) + max(0, len(rejected) - 1) for (p, chosen), (_, rejected) in both)
    return Layout(answers=2, rows=1, length=-(-length // STEP) * STEP, targets=-(-targets // 8) * 8)
