"""What a search ends with, and the chains of thought that several kinds begin with."""

from __future__ import annotations

import dataclasses
from typing import Any

from .ask import Asking, gather
from .subject import Subject
from .tree import ROOT, Tree


@dataclasses.dataclass(frozen=True)
class Solution:
    """A whole solution: the steps of its plan, and the text written from them (a chain has no steps)."""

    name: str
    node: int
    steps: list[str]
    text: str
    reason: str
    value: float | None
    """Value of its plan; None where no critic was asked."""
    verdict: float | None = None
    """1 right, 0 wrong, None could not be judged, or was not."""
    prompt: str = ""
    """The prompt that the text answers in place of the question: critique, guide."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the templates of that prompt read beside the question."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search ends with."""

    tree: Tree
    chosen: int | None
    """The node whose plan was taken."""
    end: str
    """gate, iterations, exhausted (no leaf is left), depth, samples, right, most: why it ended."""
    solutions: list[Solution]

    def row(self) -> dict[str, Any]:
        """As plain data."""
        solutions = [dataclasses.asdict(s) for s in self.solutions]
        return {"nodes": self.tree.rows(), "chosen": self.chosen, "end": self.end, "solutions": solutions}


def chains(c: Subject, tree: Tree, numbers: range) -> Asking[list[Solution]]:
    """Chains of thought under the root, each judged where the question can be."""

    def one(k: int) -> Asking[tuple[str, str, float | None]]:
        (reply,) = yield [c.ask(f"chain{k}", "chain")]
        if reply.reason == "context":
            c.counts["chain context"] += 1
            return "", reply.reason, None
        verdict = (yield from c.verify(f"chain{k}", [], reply.text)) if c.judged else None
        return reply.text, reply.reason, verdict

    drawn = yield from gather([one(k) for k in numbers])
    return [
        Solution(f"chain{k}", tree.add(ROOT, text, None, solved=True), [], text, reason, None, verdict)
        for k, (text, reason, verdict) in zip(numbers, drawn, strict=True)
    ]
