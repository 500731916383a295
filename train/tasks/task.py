"""What a task is: questions with gold answers, a prompt, a verifier and a reward."""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

Domain = Literal["id", "harder", "ood", "unseen"]
Split = Literal["train", "validation", "test"]
Style = Literal["instruct", "compact"]
Prompt = str | list[dict[str, str]]  # text as it stands, or chat messages for the tokenizer's template

DOMAINS: tuple[Domain, ...] = ("id", "harder", "ood", "unseen")
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
STYLES: tuple[Style, ...] = ("instruct", "compact")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question with its gold answer.

    Attributes:
      id: `family-` and twelve hex digits of the SHA-256 of the normalised text; the same in every run.
      family: name of the generator.
      domain: in domain, harder of the same family, out of domain (what the base can do), or never seen by it.
      split: where the question may be used.
      text: the question as it is put to the model, before any instruction.
      answer: the gold answer.
      solution: a worked solution that ends in the answer, where the family has one.
      entry: what the generator gave, metadata and all; its scorer reads it.
    """

    id: str
    family: str
    domain: Domain
    split: Split
    text: str
    answer: str
    solution: str | None
    entry: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)


class Unjudged(Counter[str]):
    """How often each exception class kept an answer from being judged, with the first such answer of each.

    Attributes:
      examples: exception class → the question's id and what was said.
    """

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, str] = {}

    def add(self, error: Exception, question: Question) -> None:
        name = type(error).__name__
        self[name] += 1
        said = " ".join(str(error).split())[:200]
        id = getattr(question, "id", "a question without a name")  # a verifier never raises
        self.examples.setdefault(name, f"{id}: {said}" if said else id)

    def __str__(self) -> str:
        return ", ".join(f"{count} × {name} (such as {self.examples[name]})" for name, count in self.items())


class Task(Protocol):
    """One family in one style: where questions come from, how they are asked, and who is right.

    Attributes:
      name: name of the family.
      unjudged: how often each exception class kept an answer from being judged.
    """

    name: str
    unjudged: Unjudged

    def draw(self, args: Mapping[str, Any], seed: int, size: int) -> Iterator[tuple[str, str, str | None, dict]]:
        """Yield up to `size` of (text, answer, solution, entry), the same for the same seed; a file gives all."""
        ...

    def prompt(self, question: Question) -> Prompt:
        """Build what the model is given."""
        ...

    def verify(self, question: Question, text: str) -> float | None:
        """Judge a completion: 1.0 right, 0.0 wrong, None if it could not be judged. Never raises."""
        ...


def reward(score: float | None) -> float:
    """Turn a verdict into a reward: 1 for right, 0 for wrong, 0 too for what could not be judged.

    An unjudged sample earns nothing, but callers count it apart and never train on it.
    """
    return 0.0 if score is None else float(score)


def normalise(text: str) -> str:
    """Reduce a question to what makes it that question: Unicode form, case and runs of space do not.

    Example:
      >>> normalise("  What is  2 + 2? ")
      'what is 2 + 2?'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def question_id(family: str, text: str) -> str:
    """Name a question by its family and a digest of its normalised text.

    Example:
      >>> question_id("chain_sum", "1+1?") == question_id("chain_sum", " 1+1? ")
      True
    """
    return f"{family}-{hashlib.sha256(normalise(text).encode()).hexdigest()[:12]}"


def majority_answer(questions: Sequence[Question]) -> tuple[str, float]:
    """Find the most common gold answer and the share of questions it gets right.

    Ties go to the answer that comes first in alphabetical order.

    Returns:
      (answer, share of `questions` with that answer); ("", 0.0) without questions.
    """
    if not questions:
        return "", 0.0
    counts = Counter(q.answer for q in questions)
    answer, n = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return answer, n / len(questions)
