"""The questions of a search: their texts, how each is put in training, and who judges."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from ..data.rows import read_rows, stem_of
from ..log import UserError
from ..tasks import build_suite, extract_answer
from ..tasks.code import CodeProblem, CodeTask
from ..tasks.numbers import canonical, read_gold, same
from ..tasks.task import Prompt, question_id
from ..tasks.wording import PROGRAM, is_number
from .settings import Questions
from .testing import read_problem

TEXTS = ("question", "problem", "prompt", "text")
"""Keys of a line that may hold the question; the first that is there."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      prompt: what stands before the solution in training.
      verify: 1 right, 0 wrong, None could not be judged; None where nobody can say.
    """

    id: str
    family: str
    text: str
    prompt: Prompt
    answer: str | None = None
    verify: Callable[[str], float | None] | None = dataclasses.field(default=None, repr=False, compare=False)
    tests: CodeProblem | None = None
    """Tests of a program, run in the sandbox; they replace `verify`."""

    @property
    def judged(self) -> bool:
        return self.verify is not None or self.tests is not None


def read_questions(config: Questions) -> list[Item]:
    """The questions, in the order of the file or of the families, each once."""
    items = from_families(config) if config.families else from_file(config.path)
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(item.id, item)
    items = list(first.values())[: config.limit]
    if not items:
        raise UserError(f"questions: {config.path or 'the families'}: none there; families need train: N")
    return items


def from_families(config: Questions) -> list[Item]:
    suite = build_suite(config.families, seed=config.seed, style="instruct")
    items = []
    for q in suite.questions("train"):
        asked = suite.prompt(q)
        if not isinstance(suite.tasks[q.family], CodeTask):
            items.append(Item(q.id, q.family, q.text, asked, q.answer, functools.partial(suite.verify, q)))
            continue
        # The whole of what is asked: it names the function.
        text = asked if isinstance(asked, str) else asked[-1]["content"]
        items.append(Item(q.id, q.family, text, asked, None, None, CodeProblem.of_entry(q.entry)))
    return items


def from_file(path: str) -> list[Item]:
    items, family = [], stem_of(path)
    for place, line in read_rows(path):
        key = next((key for key in TEXTS if key in line), None)
        if key is None or not isinstance(line[key], str) or not line[key].strip():
            raise UserError(f"{place}: found the keys {', '.join(line)}; wanted a text under {', '.join(TEXTS)}")
        text, answer = line[key], line.get("answer")
        if answer is not None and not isinstance(answer, (str, int, float)):
            raise UserError(f"{place}: answer is {answer!r}; a text or a number is wanted")
        answer = None if answer is None else str(answer)
        id = str(line.get("id", line.get("task_id", question_id(family, text))))
        problem = read_problem(line, text, place)
        if problem is not None and not problem.stub:
            text = PROGRAM.format(text=text.strip(), tests=problem.tests.strip())
        asked: list[dict[str, Any]] = [{"role": "user", "content": text}]
        verify = None if answer is None else functools.partial(equal, answer)
        items.append(Item(id, family, text, asked, answer, None if problem else verify, problem))
    return items


def equal(answer: str, text: str) -> float:
    """Whether what a text ends in is the answer: as a number where it is one, else word by word.

    Example:
      >>> equal("14", "12 + 2 = 14\\nAnswer: 14.0"), equal("red", "Answer: Red."), equal("red", "blue")
      (1.0, 1.0, 0.0)
      >>> equal("1/2", "Answer: 2/4"), equal("18 kg", "Answer: 18"), equal("18 kg", "Answer: 18 m")
      (1.0, 1.0, 0.0)
    """
    found = extract_answer(text, answer)
    if found is None:
        return 0.0
    if is_number(answer):
        return float(same(canonical(found), answer))
    if found.casefold().split() == answer.strip().casefold().split():
        return 1.0
    try:
        gold = read_gold(answer)
    except UserError:
        return 0.0
    # A number for a number with a unit, `1/2` as 2/4; but no other unit.
    return float(not any(map(str.isalpha, found)) and same(found, gold))
