r"""LiMem, a score of memorisation: training questions that are solved, and not solved any more once changed a little.

$\mathrm{LiMem} = \mathrm{Acc} \cdot (1 - \mathrm{CR})$: Acc is the share of training questions solved, CR (the
consistency ratio) the share of these whose perturbed twin is solved too (Xie et al., "On Memorization of Large
Language Models in Logical Reasoning", https://arxiv.org/abs/2410.23123).

A twin is drawn from the generator, so that its gold answer and its verifier are the generator's own: of many fresh
items of the same family and ranges, one whose question reads the same but for its numbers, with the fewest numbers
changed, and among these the smallest change. No question of the run is a twin. Where a family's questions hold no
numbers, or stand in a file, nothing generates a twin and the score is not available: the family is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..tasks import Question, Suite
from ..tasks.code import MbppTask
from ..tasks.local import LocalTask
from ..tasks.suite import draw_seed
from ..tasks.task import normalise, question_id

DRAWS = 5000
"""Fresh items looked through a family; more make nearer twins."""
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
Numbers = tuple[float, ...]


def template(text: str) -> tuple[str, Numbers]:
    """Split a question into its words, each number replaced by `#`, and its numbers.

    Example:
      >>> template("What is 12 + 7?")
      ('What is # + #?', (12.0, 7.0))
    """
    return _NUMBER.sub("#", text), tuple(float(n) for n in _NUMBER.findall(text))


def distance(a: Numbers, b: Numbers) -> tuple[int, float]:
    """Compare numbers place by place: (how many differ, sum of the differences)."""
    return sum(x != y for x, y in zip(a, b, strict=True)), sum(abs(x - y) for x, y in zip(a, b, strict=True))


def twins(suite: Suite, questions: Sequence[Question], *, seed: int = 0, draws: int = DRAWS) -> dict[str, Question]:
    """Find the perturbed twin of each question; those without one are left out. No two questions share a twin."""
    taken = {normalise(q.text) for q in suite.all}
    pools: dict[tuple[str, str, str], dict[str, list[tuple[Numbers, Question]]]] = {}
    found: dict[str, Question] = {}
    for question in questions:
        task = suite.tasks[question.family]
        if isinstance(task, LocalTask | MbppTask):
            continue
        spec = next(s for s in suite.specs if (s.family, s.domain) == (question.family, question.domain))
        key = (question.family, question.domain, repr(sorted(spec.args.items())))
        if key not in pools:
            pools[key] = {}
            start = draw_seed(seed, "twins", *key)
            for text, answer, solution, entry in _items(task, spec.args, start, draws):
                if normalise(text) not in taken:
                    words, numbers = template(text)
                    name = question_id(question.family, text)
                    twin = Question(
                        name, question.family, question.domain, question.split, text, answer, solution, entry
                    )
                    pools[key].setdefault(words, []).append((numbers, twin))
        words, numbers = template(question.text)
        near = [(distance(numbers, n), i) for i, (n, q) in enumerate(pools[key].get(words, ())) if numbers]
        if near:
            _, index = min(near)
            found[question.id] = pools[key][words].pop(index)[1]
    return found


def _items(task: Any, args: Mapping[str, Any], start: int, draws: int):
    """Draw in blocks, as suites do; each text once."""
    seen: set[str] = set()
    for offset in range(0, draws, 1000):
        for item in task.draw(args, start + offset, min(1000, draws - offset)):
            if item[0] not in seen:
                seen.add(item[0])
                yield item


def limem(accuracy: float, consistency: float) -> float:
    """Return Acc · (1 − CR).

    Example:
      >>> limem(0.5, 0.75)
      0.125
    """
    return accuracy * (1.0 - consistency)


def memorisation(
    solve: Callable[[Sequence[Question]], Mapping[str, float]],
    questions: Sequence[Question],
    pairs: Mapping[str, Question],
) -> dict[str, Any]:
    """Score one model.

    Args:
      solve: questions → {id: 1.0 right, 0.0 not}.
      questions: training questions; those without a twin are left out.
      pairs: question id → its twin.

    Returns:
      questions, accuracy, solved, consistency (None where nothing was solved), score (0 then), changed (mean share of
      a question's numbers that its twin changes).
    """
    asked = [q for q in questions if q.id in pairs]
    own = solve(asked)
    solved = [q for q in asked if own[q.id] == 1.0]
    again = solve([pairs[q.id] for q in solved]) if solved else {}
    accuracy = len(solved) / len(asked)
    consistency = sum(again[pairs[q.id].id] == 1.0 for q in solved) / len(solved) if solved else None
    numbers = [(template(q.text)[1], template(pairs[q.id].text)[1]) for q in asked]
    return {
        "questions": len(asked),
        "accuracy": accuracy,
        "solved": len(solved),
        "consistency": consistency,
        "score": limem(accuracy, consistency) if consistency is not None else 0.0,
        "changed": sum(distance(a, b)[0] / len(a) for a, b in numbers) / len(numbers),
    }
