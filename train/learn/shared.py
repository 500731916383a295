"""Rows that hold a prompt once and several answers to it: what is computed of a prompt is computed once, not for each.

A group of eight answers in rows of prompt and answer computes its prompt eight times. Here a row is the prompt and
then answers, each of which sees the prompt and itself alone (models/branches.py), so that the log-probabilities, and
with them every loss, are those of rows of one answer each, rounding apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..models.config import ModelConfig
from .batches import Batch
from .speed import step_flops

Pair = tuple[Sequence[int], Sequence[int]]
"""A prompt and an answer to it."""
Given = Sequence[Pair | None]
"""The answers of updates, one after another; None stands where one is left out of the computation."""
FINEST = 32
"""Lengths of rows are multiples of it, and from 256 on of an eighth to a quarter of themselves: few programs."""
QUARTERS = 4
"""Where answers are left out, updates have the rows for a quarter of their answers, for two, three or four."""
CLEARLY = 0.9
"""Rows with fewer answers are taken where they need less than this share of the operations: else a run would go to and
fro between two programs."""


def bucket(n: int) -> int:
    """The length of a row for n tokens: 32, 64, …, 256, then four steps to each doubling.

    Example:
      >>> [bucket(n) for n in (1, 33, 256, 257, 513, 1100)]
      [32, 64, 256, 320, 640, 1280]
    """
    step = max(FINEST, 1 << max(0, (n - 1).bit_length() - 3))
    return step * max(1, -(-n // step))


def longest_of(pairs: Iterable[Pair]) -> int:
    return max(len(answer) for _, answer in pairs)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the rows of an update: G answers at most in each of `rows` rows of `length` tokens and M `targets`."""

    answers: int
    rows: int
    length: int
    targets: int


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How the answers of an update are put into rows.

    Attributes:
      model: whose operations are counted.
      size: answers of an update.
      parts: micro-batches of an update. ways: parts that the rows of a micro-batch are cut into (mesh.py).
      longest: tokens of an answer at most, K.
      skips: whether answers that nothing is learnt from may be left out.
    """

    model: ModelConfig
    size: int
    parts: int
    ways: int
    longest: int
    skips: bool = False

    def layout(self, pairs: Given) -> Layout | None:
        """The rows with most answers, fewer where that takes clearly fewer operations; None: one answer each does."""
        most = max(len(run) for run in self.runs(pairs))
        if most == 1:
            return None
        there = [pair for pair in pairs if pair is not None]
        plain, width = (
            FINEST * -(-n // FINEST) for n in (max(len(p) + len(a) for p, a in there) - 1, longest_of(there))
        )
        apart = step_flops(self.model, self.size, plain, self.size * min(width, plain))
        best, fewest = None, math.inf
        while most > 1:
            found = self.rows_of(pairs, most)
            flops = step_flops(self.model, found.rows, found.length, found.rows * found.targets)
            if flops < CLEARLY * fewest:
                best, fewest = found, flops
            most = -(-most // 2)
        return best if fewest < apart else None

    def runs(self, pairs: Given) -> Iterator[list[int]]:
        """Numbers of the answers to one prompt that stand together in an update."""
        for first in range(0, len(pairs), self.size):
            numbers = range(first, min(first + self.size, len(pairs)))
            there = [(i, tuple(pair[0])) for i in numbers if (pair := pairs[i]) is not None]
            for _, run in itertools.groupby(there, key=lambda numbered: numbered[1]):
                yield [i for i, _ in run]

    def rows_of(self, pairs: Given, most: int) -> Layout:
        """The sizes of rows with `most` answers or fewer."""
        chosen = self.chosen(pairs, most)
        multiple = self.parts * self.ways
        if self.skips:  # how many are left out changes from step to step, and every other number is another program
            multiple *= -(-self.size // (most * QUARTERS * multiple))
        members = [[pair for i in row if (pair := pairs[i]) is not None] for rows in chosen for row in rows]
        rows = [(len(row[0][0]), [len(answer) for _, answer in row]) for row in members]
        length = bucket(max(prompt + sum(max(0, n - 1) for n in answers) for prompt, answers in rows))
        # Follows from the length, so that there is a program for each length and not for each pair of them.
        spare = min(prompt - len(answers) for prompt, answers in rows)
        return Layout(
            most, multiple * math.ceil(max(map(len, chosen)) / multiple), length, length - spare // FINEST * FINEST
        )

    def chosen(self, pairs: Given, most: int) -> list[list[list[int]]]:
        """Of each update its rows, of each row the numbers of its answers."""
        updates: list[list[list[int]]] = [[] for _ in range(0, len(pairs), self.size)]
        for run in self.runs(pairs):
            updates[run[0] // self.size] += [run[i : i + most] for i in range(0, len(run), most)]
        return updates

    def batch(self, pairs: Given, layout: Layout, pad_id: int, /, **beside: Any) -> Batch:
        """Arrays of the rows of all updates, one update after another.

        Args:
          beside: by name an array an answer, of its length, or a number an answer.
        """
        updates = self.chosen(pairs, layout.answers)
        B, G, K = len(updates) * layout.rows, layout.answers, self.longest
        arrays = {name: np.zeros((B, layout.length), np.int32) for name in ("segments", "parents")}
        batch: Batch = {
            "tokens": np.full((B, layout.length), pad_id, np.int32),
            **arrays,
            "answers": np.zeros((B, G, K), np.int32),
            "weights": np.zeros((B, G, K), np.float32),
            "sources": np.zeros((B, layout.targets), np.int32),
            "cells": np.full((B, layout.targets), G * K, np.int32),
        }
        for name, values in beside.items():
            batch[name] = np.zeros((B, G) if np.ndim(values[0]) == 0 else (B, G, K), np.float32)
        for number, rows in enumerate(updates):
            for row, members in enumerate(rows, number * layout.rows):
                place({name: values[row] for name, values in batch.items()}, pairs, members, beside)
        return batch

    def without_equal(self, pairs: Sequence[Pair], pad_id: int, /, **beside: Any) -> tuple[Batch, int]:
        """Rows without the samples whose advantage is 0, and the rows of an update; what a loss is divided by stays.

        An update that has no others is made all the same, for an optimizer's moments move without a gradient, too.
        """
        learnt = beside["advantages"] != 0
        if not learnt.any():
            learnt[0] = True  # rows have the length of something
        given = [pair if is_learnt else None for pair, is_learnt in zip(pairs, learnt, strict=True)]
        layout = self.layout(given) or self.rows_of(given, 1)
        batch = self.batch(given, layout, pad_id, **beside)
        batch["absent"] = np.zeros(len(batch["tokens"]), np.float32)
        for update, first in enumerate(range(0, len(pairs), self.size)):
            gone = [i for i in range(first, min(first + self.size, len(pairs))) if not learnt[i]]
            rows = slice(update * layout.rows, (update + 1) * layout.rows)
            batch["absent"][rows] = evenly(sum(len(pairs[i][1]) for i in gone), layout.rows)
            batch["rows"][rows, 0] += evenly(len(gone), layout.rows)
        return batch, layout.rows


def evenly(count: int, parts: int) -> np.ndarray:
    """Whole numbers, as equal as can be, that sum to `count`: every micro-batch has its share."""
    return np.full(parts, count // parts) + (np.arange(parts) < count % parts)


def place(row: Batch, pairs: Given, members: Sequence[int], beside: dict[str, Any]) -> None:
    """Write a prompt and its answers into the arrays of one row."""
    there = [(number, pair) for number in members if (pair := pairs[number]) is not None]
    prompt = there[0][1][0]
    K = row["answers"].shape[-1]
    at, target = len(prompt), 0
    row["tokens"][:at], row["segments"][:at] = prompt, 1
    for g, (number, (_, answer)) in enumerate(there):
        n, end = len(answer), at + max(0, len(answer) - 1)
        row["tokens"][at:end], row["segments"][at:end], row["parents"][at:end] = answer[:-1], g + 2, 1
        row["answers"][g, :n], row["weights"][g, :n] = answer, 1.0
        row["sources"][target : target + n] = [len(prompt) - 1, *range(at, end)][:n]
        row["cells"][target : target + n] = g * K + np.arange(n)
        for name, values in beside.items():
            if np.ndim(values[number]) == 0:
                row[name][g] = values[number]
            else:
                row[name][g, :n] = values[number]
        at, target = end, target + n
