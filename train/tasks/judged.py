"""Solutions to be judged, in symbols: what teaches the miniature to be the critic of a search.

family       prompt                        answer
judge:gcd    g48,18?48%18=12,18%12=6!      score:7    (right so far)
             g48,18?48%18=12,18%12=7!      score:0    (a step is wrong)
             g48,18?48%18=…,12%6=0#6!      score:10   (right to its end)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

from .characters import EOS
from .compact import CompactTask
from .task import Prompt, Question

PREFIX = "judge:"
WRONG, SO_FAR, RIGHT = 0, 7, 10
"""Scores on the critic's scale: below the end gate of a search but for a whole solution."""


class JudgedTask:
    """Solutions of a compact family, half of them with a number changed, to be scored."""

    def __init__(self, name: str):
        self.name, self.of = name, CompactTask(name.removeprefix(PREFIX))
        self.unjudged: Counter[str] = Counter()

    def draw(self, args: Mapping[str, Any], seed: int, size: int) -> Iterator[tuple[str, str, str | None, dict]]:
        """Yield (question and steps, score, score, entry); item i depends on `args` and seed + i alone."""
        for i, (question, _, solution, entry) in enumerate(self.of.draw(args, seed, size)):
            assert solution is not None, "compact families have solutions"
            text, score = shown(solution, Random(f"judge/{seed + i}"))
            answer = f"score:{score}"
            yield f"{question}{text}!", answer, answer, entry

    def prompt(self, question: Question) -> Prompt:
        """Build the text the model continues."""
        return EOS + question.text

    def verify(self, question: Question, text: str) -> float:
        """Judge a completion: it must be the score, to the end of its line."""
        return float(text.split(EOS, 1)[0] == question.answer)


def shown(solution: str, random: Random) -> tuple[str, int]:
    """Some first steps of a solution, or all with the answer, half of the time with one number changed; their score.

    The changed number is the last one shown half of the time: that is the one a critic must look at.

    Example:
      >>> shown("48%18=12,18%12=6,12%6=0#6", Random(5)), shown("48%18=12,18%12=6,12%6=0#6", Random(0))
      (('48%18=12,18%12=6,12%6=0#6', 10), ('48%18=12,18%12=5', 0))
    """
    steps = re.split(r"(?<=[,;])", solution)
    count = random.randint(1, len(steps))
    text = "".join(steps[:count]).rstrip(",;")
    if random.random() < 0.5:
        return text, RIGHT if count == len(steps) else SO_FAR
    numbers = list(re.finditer(r"\d+", text))
    chosen = numbers[-1] if random.random() < 0.5 else random.choice(numbers)
    return text[: chosen.start()] + other_than(chosen.group(), random) + text[chosen.end() :], WRONG


def other_than(number: str, random: Random) -> str:
    """A number near another: one digit changed, or a little more or less."""
    while True:
        if random.random() < 0.5:
            place = random.randrange(len(number))
            found = number[:place] + random.choice("0123456789") + number[place + 1 :]
        else:
            found = str(max(0, int(number) + random.choice((-10, -2, -1, 1, 2, 10))))
        if found != number and str(int(found)) == found:
            return found
