"""What a search wants of a model or a verifier, and what comes back.

A search is a generator: it yields the requests it can make now and is sent their replies, in their order. So a
scripted model, the engine with thousands of searches, or a log of an earlier run can answer it, and what it does
depends on the replies alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

ROLES = ("policy", "critic", "reflector")
VERIFIER = "verifier"


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request. `name` is its own within the search and keys its random draws."""

    name: str
    prompt: str
    """Entry of the prompt file: step, score, hint, chain, write; empty for a verifier."""
    role: str
    values: Mapping[str, Any]
    """What the prompt's templates read."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """The text of a completion, or the verdict on one."""

    text: str = ""
    reason: str = "eos"
    """eos, stop, length (cut off), or context: the prompt has no room in the model."""
    tokens: int = 0
    verdict: float | None = None
    """What a verifier says: 1 right, 0 wrong, None could not be judged."""


Asking = Generator[list[Ask], list[Reply], T]


def gather(parts: Sequence[Asking[T]]) -> Asking[list[T]]:
    """Several searches as one that asks for all of them at once; their results in order."""
    results: dict[int, T] = {}
    asks: dict[int, list[Ask]] = {}

    def go_on(i: int, replies: list[Reply] | None) -> None:
        try:
            asks[i] = next(parts[i]) if replies is None else parts[i].send(replies)
        except StopIteration as end:
            asks.pop(i, None)
            results[i] = end.value

    for i in range(len(parts)):
        go_on(i, None)
    while asks:
        order = sorted(asks)
        replies = iter((yield [ask for i in order for ask in asks[i]]))
        for i, mine in [(i, [next(replies) for _ in asks[i]]) for i in order]:
            go_on(i, mine)
    return [results[i] for i in range(len(parts))]
