"""reasoning-gym families in the `compact` style: `prompt?work#answer` in at most 64 symbols, for the miniature.

family           prompt          work                               answer
chain_sum        12+7-5?         12+7=19,19-5=14#                   14
products         23*47?          23*40=920,23*7=161,920+161=1081#   1081
gcd              g48,18?         48%18=12,18%12=6,12%6=0#           6
number_sorting   s31,5,12<?      5:31,12;12:31;31#                  5,12,31   (< ascending, > descending)
simple_geometry  t50,60?         180-50=130,130-60=70#              70        (any convex polygon)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any

from ..log import UserError
from ..models.characters import EOS
from .reasoning import open_generator
from .task import Prompt, Question, Unjudged

Rendering = tuple[str, str, str]  # prompt with its `?`, work with its `#`, answer


class CompactTask:
    """One family in symbols."""

    def __init__(self, name: str):
        if name not in RENDERERS:
            raise UserError(
                f"tasks: family {name!r} has no compact rendering; choose among {', '.join(sorted(RENDERERS))},"
                " or style: instruct"
            )
        self.name = name
        self.unjudged = Unjudged()

    def draw(self, args: Mapping[str, Any], seed: int, size: int) -> Iterator[tuple[str, str, str | None, dict]]:
        """Yield (prompt, answer, work and answer, entry)."""
        dataset = open_generator(self.name, args, seed=seed, size=size)
        for i in range(size):
            entry = dataset[i]
            prompt, work, answer = render(entry)
            yield prompt, answer, work + answer, entry

    def prompt(self, question: Question) -> Prompt:
        """Build the text the model continues: the end of a line, as before every example, then the prompt."""
        return EOS + question.text

    def verify(self, question: Question, text: str) -> float | None:
        """Judge a completion by what stands after its `#`, up to the end of the line: it must be the answer."""
        try:
            _, found, answer = text.split(EOS, 1)[0].partition("#")
            return float(bool(found) and answer == question.answer)
        except Exception as error:  # recorded, never hidden: a verifier may not stop a run
            self.unjudged.add(error, question)
            return None


def render(entry: Mapping[str, Any]) -> Rendering:
    """Render a reasoning-gym entry from its metadata.

    Returns:
      (prompt, work, answer); the full text is their concatenation, and a line of the pretraining data is that
      followed by `EOS`.

    Example:
      >>> "".join(render({"metadata": {"source_dataset": "gcd", "numbers": [48, 18]}}))
      'g48,18?48%18=12,18%12=6,12%6=0#6'
    """
    metadata = entry["metadata"]
    family = metadata["source_dataset"]
    if family not in RENDERERS:
        raise UserError(
            f"tasks: family {family!r} has no compact rendering; choose among {', '.join(sorted(RENDERERS))}"
        )
    return RENDERERS[family](metadata)


def _chain_sum(metadata: Mapping[str, Any]) -> Rendering:
    """Add and subtract from left to right, each partial sum written out."""
    expression = metadata["expression"].replace(" ", "")
    first, *rest = re.findall(r"(?:^|[+-])-?\d+", expression)
    total, steps = int(first), []
    for term in rest:
        sign, number = term[0], int(term[1:])
        following = total + number if sign == "+" else total - number
        steps.append(f"{total}{term}={following}")
        total = following
    return f"{expression}?", ",".join(steps) + "#", str(total)


def _products(metadata: Mapping[str, Any]) -> Rendering:
    """Multiply by each digit of the next factor with its place, then add up the partial products."""
    expression = metadata["expression"].replace(" ", "")
    total, *rest = map(int, expression.split("*"))
    steps = []
    for factor in rest:
        digits = str(abs(factor))
        sign = -1 if factor < 0 else 1
        parts = [sign * int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits) if d != "0"] or [0]
        products = [total * part for part in parts]
        steps += [f"{total}*{part}={product}" for part, product in zip(parts, products, strict=True)]
        running = products[0]
        for product in products[1:]:
            steps.append(f"{running}+{product}={running + product}")
            running += product
        total = running
    return f"{expression}?", ",".join(steps) + "#", str(total)


def _gcd(metadata: Mapping[str, Any]) -> Rendering:
    """Euclid's algorithm, each remainder written out; more than two numbers are taken one after another."""
    numbers = [int(n) for n in metadata["numbers"]]
    steps, a = [], numbers[0]
    for b in numbers[1:]:
        while b:
            steps.append(f"{a}%{b}={a % b}")
            a, b = b, a % b
    if a != reduce(math.gcd, numbers):
        raise ValueError(f"Euclid's algorithm gave {a} for {numbers}")
    return f"g{','.join(map(str, numbers))}?", ",".join(steps) + "#", str(a)


def _lcm(metadata: Mapping[str, Any]) -> Rendering:
    """The product, divided by the greatest common divisor. The miniature is never pretrained on this family."""
    numbers = [int(n) for n in metadata["numbers"]]
    steps, a = [], numbers[0]
    for b in numbers[1:]:
        divisor = math.gcd(a, b)
        steps += [f"{a}*{b}={a * b}", f"{a * b}/{divisor}={a * b // divisor}"]
        a = a * b // divisor
    return f"l{','.join(map(str, numbers))}?", ",".join(steps) + "#", str(a)


def _number_sorting(metadata: Mapping[str, Any]) -> Rendering:
    """Take out the next number in order, one after another, keeping the rest: `5:31,12;12:31;31`."""
    ascending = metadata["direction"] == "ascending"
    rest = [_short(n) for n in metadata["original_numbers"]]
    prompt = f"s{','.join(rest)}{'<' if ascending else '>'}?"
    done, steps = [], []
    while rest:
        pick = (min if ascending else max)(rest, key=float)
        rest.remove(pick)
        done.append(pick)
        steps.append(f"{pick}:{','.join(rest)}" if rest else pick)
    return prompt, ";".join(steps) + "#", ",".join(done)


def _simple_geometry(metadata: Mapping[str, Any]) -> Rendering:
    """Subtract the known angles from the sum of all angles, (n − 2)·180, one after another."""
    angles = [_short(a) for a in metadata["known_angles"]]
    left, steps = 180 * (len(angles) - 1), []
    for angle in angles:
        steps.append(f"{left}-{angle}={left - int(angle)}")
        left -= int(angle)
    return f"t{','.join(angles)}?", ",".join(steps) + "#", str(left)


def _short(number: Any) -> str:
    """Write a number without a fraction of zero.

    Example:
      >>> _short("16.0"), _short(-3.25)
      ('16', '-3.25')
    """
    value = float(number)
    return str(int(value)) if value == int(value) else str(value)


RENDERERS: dict[str, Callable[[Mapping[str, Any]], Rendering]] = {
    "chain_sum": _chain_sum,
    "gcd": _gcd,
    "lcm": _lcm,
    "number_sorting": _number_sorting,
    "products": _products,
    "simple_geometry": _simple_geometry,
}
