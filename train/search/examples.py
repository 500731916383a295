"""From found solutions to training examples: filters in a fixed order, each with the count of what it removed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..models.tokenizer import DATE, Tokenizer
from ..runtime.jsonl import Row
from ..tasks.code import extract_code, source_of
from ..tasks.wording import untemplated
from .prompts import Prompts, fill
from .questions import Item
from .testing import compiles

REMOVED = (
    "no solution", "no room", "low value", "short plan", "unfinished", "open fence", "no program", "does not compile",
    "wrong", "unjudged", "duplicate", "over per_question",
)  # fmt: skip
"""Why a solution is not learnt from, in the order in which it is asked; the first that holds counts."""


def whole(prompts: Prompts, solution: Mapping[str, Any]) -> str:
    """The text that is judged and learnt: a plan with what was written from it, or a chain as it is."""
    if not solution["steps"]:
        return str(solution["text"]).strip()
    return fill(prompts.target, {"steps": solution["steps"], "text": solution["text"]}).strip()


def reason_against(
    solution: Mapping[str, Any], text: str, item: Item, *, code: bool, words: int, value: float, tests: bool
) -> str | None:
    """The first filter that removes a solution; None if it stays so far."""
    if solution["reason"] == "context":
        return "no room"
    if solution["value"] is not None and solution["value"] < value:
        return "low value"
    if solution["steps"] and sum(len(step.split()) for step in solution["steps"]) < words:
        return "short plan"
    entry = None if item.tests is None else item.tests.entry_point
    program, missing = extract_code(text, entry) if code else (None, "")
    if "not closed" in missing:
        return "open fence"
    if solution["reason"] == "length":
        return "unfinished"
    if code and program is None:
        return "no program"
    if program is not None and not compiles(program if item.tests is None else source_of(item.tests, program)):
        return "does not compile"
    if tests and item.judged and solution["verdict"] != 1.0:
        return "unjudged" if solution["verdict"] is None else "wrong"
    return None


def select(
    items: Sequence[Item],
    rows: Mapping[str, Mapping[str, Any]],
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    code: bool,
    words: int,
    value: float,
    tests: bool,
    per_question: int | None,
) -> tuple[list[Row], dict[str, Any]]:
    """Examples in the order of the questions, and what each filter removed.

    Args:
      rows: what the search of each question found, by its id.
    """
    examples: list[Row] = []
    removed: Counter[str] = Counter()
    found = 0
    for item in items:
        solutions = rows[item.id]["solutions"]
        found += len(solutions)
        removed["no solution"] += not solutions
        kept: set[str] = set()
        for number, solution in enumerate(solutions):
            text = whole(prompts, solution)
            why = reason_against(solution, text, item, code=code, words=words, value=value, tests=tests)
            if why is None and " ".join(text.split()) in kept:
                why = "duplicate"
            if why is None and per_question is not None and len(kept) >= per_question:
                why = "over per_question"
            if why is not None:
                removed[why] += 1
                continue
            kept.add(" ".join(text.split()))
            examples.append(example(item, text, tokenizer, solution, number))
    counts = {
        "questions": len(items),
        "solutions": found,
        "removed": {why: removed[why] for why in REMOVED},
        "kept": len(examples),
        "questions_kept": len({row["question_id"] for row in examples}),
    }
    return examples, counts


def example(item: Item, text: str, tokenizer: Tokenizer, solution: Mapping[str, Any], number: int) -> Row:
    """One training example: the question as it is asked elsewhere, then the text, then the end."""
    rendered = not isinstance(item.prompt, str) and tokenizer.has_chat_template
    if isinstance(item.prompt, str):
        prompt = item.prompt
    elif tokenizer.has_chat_template:
        prompt = tokenizer.chat(item.prompt, date_string=DATE)
    else:
        prompt = untemplated([message["content"] for message in item.prompt])
    before, after = tokenizer.join(prompt, text, special=not rendered)
    return {
        "question_id": item.id,
        "family": item.family,
        "prompt": prompt,
        "completion": text,
        "tokens": before + tokenizer.close(after),
        "prompt_length": len(before),
        "score": 1.0 if solution["value"] is None else solution["value"],
        "weight": 1.0,
        "sample": number,
    }


def distribution(values: Iterable[float], edges: Sequence[float]) -> list[int]:
    """How many values lie in [edges[i], edges[i + 1]), the last interval closed.

    Example:
      >>> distribution([0.0, 0.5, 1.0], [0.0, 0.5, 1.0])
      [1, 2]
    """
    counts = [0] * (len(edges) - 1)
    for value in values:
        inside = [i for i in range(len(counts)) if edges[i] <= value < edges[i + 1]]
        if not inside and value == edges[-1]:
            inside = [len(counts) - 1]
        for i in inside:
            counts[i] += 1
    return counts
