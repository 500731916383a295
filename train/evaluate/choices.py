"""Multiple choice by likelihood: the choice the model finds most probable after the question.

acc takes log p(choice) as it is, acc_norm divides it by the choice's length in characters, so that long choices are
not at a disadvantage. Both are what EleutherAI's harness calls so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..generate.score import encode_pair, score
from ..models.open import Model
from ..tasks.task import Question
from .accuracy import wilson

CONTEXT = "Question: {question}\nAnswer:"


def choose(
    model: Model,
    questions: Sequence[Question],
    *,
    dtype: str = "float32",
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """A row a question: log-probability of each choice, and whether the best one is right, as is and normalised.

    Args:
      questions: of the task `choice`; their entries hold the bare question and its choices.
      on_batch: called with the number of choices done.
    """
    pairs = [
        encode_pair(model.tokenizer, CONTEXT.format(question=q.entry["question"].strip()), f" {choice}")
        for q in questions
        for choice in q.entry["choices"]
    ]
    scored = iter(score(model.config, model.params, pairs, dtype=dtype, on_batch=on_batch))
    rows = []
    for q in questions:
        choices = q.entry["choices"]
        logprobs = [next(scored).logprob for _ in choices]
        best = {
            "acc": first_largest(logprobs),
            "acc_norm": first_largest([p / len(choice) for p, choice in zip(logprobs, choices, strict=True)]),
        }
        gold = ord(q.answer) - ord("A")
        rows.append({"question_id": q.id, "logprobs": logprobs} | {name: float(i == gold) for name, i in best.items()})
    return rows


def first_largest(values: Sequence[float]) -> int:
    """The index of the largest value, the first of equal ones."""
    return max(range(len(values)), key=lambda i: (values[i], -i))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Accuracy with its 95 % interval under each name."""
    found = {}
    for name in ("acc", "acc_norm"):
        right = int(sum(row[name] for row in rows))
        low, high = wilson(right, len(rows))
        found[name] = {"accuracy": right / len(rows), "low": low, "high": high, "n": len(rows)}
    return found
