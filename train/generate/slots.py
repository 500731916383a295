"""The sequences that are decoded side by side: what each slot holds, as the decode step wants it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

CHUNK = 4
"""Decode steps between two looks at which sequences ended."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to generate: `key` draws it, whatever else is in the batch."""

    id: int
    prompt: tuple[int, ...]
    key: np.ndarray
    """uint32 [2], threefry key data."""
    max_new_tokens: int
    temperature: float | None = None
    """Temperature of this sequence; None is the engine's."""
    stop: Callable[[Sequence[int]], int | None] | None = None
    """Where this sequence ends, in place of the engine's."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """What came of a request; `tokens` ends with the stop token when `reason` is "eos"."""

    id: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: str
    """eos, stop (a stop string appeared) or length."""


@dataclasses.dataclass
class Slot:
    request: Request
    tokens: list[int]
    logprobs: list[float]

    @property
    def so_far(self) -> tuple[int, ...]:
        """What is prefilled when this goes (back) into a slot."""
        return (*self.request.prompt, *self.tokens) if self.tokens else self.request.prompt

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.tokens)


class Slots:
    """What lies in each of N slots.

    Attributes:
      active: the sequence of each slot; None: idle.
      last: [N] its newest token. at: [N] that token's position. steps: [N] tokens generated so far.
      keys: [N, 2] uint32, what draws it. temperatures: [N, 1].
    """

    def __init__(self, count: int, temperature: float):
        self.default = temperature
        self.active: list[Slot | None] = [None] * count
        self.last, self.at, self.steps = (np.zeros(count, np.int32) for _ in range(3))
        self.keys = np.zeros((count, 2), np.uint32)
        self.temperatures = np.full((count, 1), temperature, np.float32)

    def __len__(self) -> int:
        return len(self.active)

    @property
    def busy(self) -> int:
        return sum(map(bool, self.active))

    @property
    def free(self) -> list[int]:
        return [n for n, slot in enumerate(self.active) if slot is None]

    def rearrange(self, order: Sequence[int]) -> None:
        """Go on with the slots of `order`; those past as many as there were before are idle copies."""
        before = len(self)
        self.active = [self.active[n] for n in order[:before]] + [None] * (len(order) - before)
        index = list(order)
        self.last, self.at, self.steps = self.last[index], self.at[index], self.steps[index]
        self.keys, self.temperatures = self.keys[index], self.temperatures[index]

    def put(self, n: int, slot: Slot) -> None:
        """Let a sequence go on in slot n, where its prompt's cache lies."""
        self.active[n] = slot
        self.last[n], self.at[n] = slot.so_far[-1], slot.length - 1
        self.steps[n], self.keys[n] = len(slot.tokens), slot.request.key
        own = slot.request.temperature
        self.temperatures[n] = self.default if own is None else own

    def advance(self, tokens: np.ndarray) -> None:
        """Move on by the chunk `tokens` [CHUNK, N]; an idle slot decodes rubbish into its own row from position 0."""
        self.last = tokens[-1].copy()
        idle = np.array([slot is None for slot in self.active])
        self.at = np.where(idle, 0, self.at + CHUNK).astype(np.int32)
        self.steps = np.where(idle, 0, self.steps + CHUNK).astype(np.int32)
