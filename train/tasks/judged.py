"""Solutions to be judged, in symbols: what teaches the miniature to be the critic of a search.

family       prompt                        work and answer
judge:gcd    g48,18?48%18=12,18%12=6!      18%12=6:6;score:7          (right so far)
             g48,18?48%18=12,18%12=7!      18%12=6:7;score:0          (the last step is wrong)
             g48,18?48%18=…,12%6=0#6!      12%6=0#6:0#6;score:10      (right to its end)

A critic first takes the last step itself, then writes what was found beside what it finds, then compares: in one
glance, or with the two apart, a model of four layers judged hardly better than chance (docs/log.md). Earlier steps are
right: a search has judged each when it was the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

from ..models.characters import EOS
from .compact import CompactTask
from .task import Prompt, Question, Unjudged

PREFIX = "judge:"
WRONG, SO_FAR, RIGHT = 0, 7, 10
"""Scores on the critic's scale: below the end gate of a search but for a whole solution."""


class JudgedTask:
    """Solutions of a compact family, half of them with a last step that comes to something wrong."""

    def __init__(self, name: str):
        self.name, self.of = name, CompactTask(name.removeprefix(PREFIX))
        self.unjudged = Unjudged()

    def draw(self, args: Mapping[str, Any], seed: int, size: int) -> Iterator[tuple[str, str, str | None, dict]]:
        """Yield (question and steps, score, work and score, entry); item i depends on `args` and seed + i alone."""
        for i, (question, _, solution, entry) in enumerate(self.of.draw(args, seed, size)):
            assert solution is not None, "compact families have solutions"
            text, last, score = shown(solution, Random(f"judge/{seed + i}"))
            answer = f"score:{score}"
            yield f"{question}{text}!", answer, f"{last}:{result(text)};{answer}", entry

    def prompt(self, question: Question) -> Prompt:
        """Build the text the model continues."""
        return EOS + question.text

    def verify(self, question: Question, text: str) -> float:
        """Judge a completion: what stands after its last semicolon must be the score."""
        return float(text.split(EOS, 1)[0].rpartition(";")[2] == question.answer)


def shown(solution: str, random: Random) -> tuple[str, str, int]:
    """Some first steps of a solution, the last of them wrong half of the time; the last one right; their score.

    Example:
      >>> shown("48%18=12,18%12=6,12%6=0#6", Random(5))
      ('48%18=12,18%12=6,12%6=0#6', '12%6=0#6', 10)
      >>> shown("48%18=12,18%12=6,12%6=0#6", Random(0))
      ('48%18=12,18%12=5', '18%12=6', 0)
    """
    steps = re.split(r"(?<=[,;])", solution)
    count = random.randint(1, len(steps))
    before, last = "".join(steps[: count - 1]), steps[count - 1].rstrip(",;")
    if random.random() < 0.5:
        return before + last, last, RIGHT if count == len(steps) else SO_FAR
    # A step from the wrong numbers comes to something else too, nearly always, and is not shown apart.
    chosen = random.choice(list(re.finditer(r"\d+(?!.*=)", last)))
    wrong = last[: chosen.start()] + other_than(chosen.group(), random) + last[chosen.end() :]
    return before + wrong, last, WRONG


def result(text: str) -> str:
    """What the last step of a text comes to.

    Example:
      >>> result("48%18=12,18%12=5"), result("12%6=0#6")
      ('5', '0#6')
    """
    return re.split("[,;=]", text)[-1]


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
