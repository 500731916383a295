"""Small functions to be written, made by a seed: in words for chat models, in symbols for the miniature.

kind      prompt (compact)      work                          answer
numbers   x:add3,mul2,mod7?     x+3,(x+3)*2,(x+3)*2%7#        (x+3)*2%7
lists     a:even,mul3,sum?      v%2<1,v*3#                    sum(v*3 for v in a if v%2<1)

The answer is the body of a function of x, or of a list a; any body that gives the same values is right. The verdict is
the sandbox's, on arguments that the model is not told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any, ClassVar, Literal

from ..log import UserError
from ..models.characters import EOS
from . import wording
from .code import CodeProblem, CodeTask, HumanEvalTask, MbppTask
from .task import Prompt, Question, Style

Kind = Literal["numbers", "lists"]

NUMBERS = (-9, -2, -1, 0, 1, 2, 3, 5, 8, 13, 29, 100)
LISTS = ([], [4], [3, -1, 2], [7, 7, 0, 12], [-5, -4, 9, 6, 1], [10, 2, 33, 8, 5, -6])


@dataclasses.dataclass(frozen=True)
class Made:
    """One problem: its prompt in symbols and in words, the work, and the body of the function."""

    symbols: str
    words: str
    work: str
    body: str
    argument: str


@dataclasses.dataclass(frozen=True)
class Ranges:
    """What is drawn from.

    Attributes:
      kind: functions of a number, or of a list.
      min_ops, max_ops: steps of a function of a number.
      max_constant: constants are 2 … this.
    """

    kind: Kind = "numbers"
    min_ops: int = 2
    max_ops: int = 3
    max_constant: int = 9

    def __post_init__(self):
        if self.kind not in ("numbers", "lists"):
            raise UserError(f"tasks: family functions: kind is {self.kind!r}; choose numbers or lists")
        if not 1 <= self.min_ops <= self.max_ops <= 6 or self.max_constant < 2:
            raise UserError(
                f"tasks: family functions: min_ops {self.min_ops}, max_ops {self.max_ops}, max_constant"
                f" {self.max_constant}; wanted 1 ≤ min_ops ≤ max_ops ≤ 6 and max_constant ≥ 2"
            )


def make(ranges: Ranges, random: Random) -> Made:
    """Draw one problem."""
    return {"numbers": _of_number, "lists": _of_list}[ranges.kind](ranges, random)


# name: (in words, what follows the expression, whether a sum must be bracketed before it)
STEPS: dict[str, tuple[str, str, bool]] = {
    "add": ("adds {k}", "+{k}", False),
    "sub": ("subtracts {k}", "-{k}", False),
    "mul": ("multiplies by {k}", "*{k}", True),
    "mod": ("takes the remainder of dividing by {k}", "%{k}", True),
    "sq": ("squares", "**2", True),
}
FILTERS: dict[str, tuple[str, str]] = {
    "even": ("keeps the even numbers", "v%2<1"),
    "odd": ("keeps the odd numbers", "v%2>0"),
    "over": ("keeps the numbers over {k}", "v>{k}"),
    "under": ("keeps the numbers under {k}", "v<{k}"),
}
MAPS: dict[str, tuple[str, str]] = {
    "add": ("adds {k} to each", "v+{k}"),
    "sub": ("subtracts {k} from each", "v-{k}"),
    "mul": ("multiplies each by {k}", "v*{k}"),
    "sq": ("squares each", "v*v"),
}
ENDS: dict[str, tuple[str, str]] = {
    "sum": ("returns their sum", "sum({inside})"),
    "sort": ("returns them in ascending order", "sorted({inside})"),
    "list": ("returns them as a list", "[{inside}]"),
}


def _of_number(ranges: Ranges, random: Random) -> Made:
    body, is_sum, is_plain = "x", False, True
    symbols, words, stages = [], [], []
    for _ in range(random.randint(ranges.min_ops, ranges.max_ops)):
        name = random.choice(list(STEPS))
        said, written, binds = STEPS[name]
        k = random.randint(2, ranges.max_constant)
        # `x*2**2` would square the 2 alone, and `x**2**2` from the right
        bracket = is_sum if binds and name != "sq" else binds and not is_plain
        body = (f"({body})" if bracket else body) + written.format(k=k)
        is_sum, is_plain = not binds, False
        symbols.append(name + ("" if name == "sq" else str(k)))
        words.append(said.format(k=k))
        stages.append(body)
    told = ", then ".join(words)
    return Made(f"x:{','.join(symbols)}?", f"takes a whole number x, {told}, and returns the result",
                ",".join(stages) + "#", body, "x")  # fmt: skip


def _of_list(ranges: Ranges, random: Random) -> Made:
    keep = random.choice(["", *FILTERS])
    change = random.choice(["", *MAPS])
    end = random.choice(list(ENDS))
    symbols, words, stages = [], ["takes a list of whole numbers a"], []
    for name, table in ((keep, FILTERS), (change, MAPS)):
        if name:
            k = random.randint(2, ranges.max_constant)
            said, written = table[name]
            symbols.append(name + (str(k) if "{k}" in said else ""))
            words.append(said.format(k=k))
            stages.append(written.format(k=k))
    condition = stages[0] if keep else ""
    element = stages[-1] if change else "v"
    inside = f"{element} for v in a" + (f" if {condition}" if condition else "")
    said, written = ENDS[end]
    return Made(f"a:{','.join([*symbols, end])}?", ", ".join(words) + f", and {said}",
                ",".join(stages) + "#", written.format(inside=inside), "a")  # fmt: skip


def problem_of(made: Made) -> CodeProblem:
    """The problem with its hidden tests, whose values the body itself gives, run here: we wrote it."""
    arguments = list(NUMBERS if made.argument == "x" else LISTS)
    function = eval(f"lambda {made.argument}: {made.body}")
    values = [function(argument) for argument in arguments]
    return CodeProblem(
        id=made.symbols, prompt=made.words, entry_point="f", calls=("f",), timeout=2.0,
        tests=f"assert [f(v) for v in {arguments}] == {values}", solution=as_function(made.argument, made.body),
    )  # fmt: skip


def as_function(argument: str, body: str) -> str:
    """A body made a function; one with line ends of its own would end it early, which none of the symbols can."""
    return f"def f({argument}):\n    return {body}\n"


class FunctionsTask(CodeTask):
    """The family `functions`, in one style."""

    styles: ClassVar[tuple[Style, ...]] = ("instruct", "compact")

    def __init__(self, name: str, style: Style = "instruct"):
        super().__init__(name)
        self.style = style

    def draw(self, args: Mapping[str, Any], seed: int, size: int) -> Iterator[tuple[str, str, str | None, dict]]:
        """Yield `size` of (text, answer, solution, entry); item i depends on `args` and seed + i alone."""
        fields = [f.name for f in dataclasses.fields(Ranges)]
        unknown = sorted(set(args) - set(fields))
        if unknown:
            raise UserError(
                f"tasks: family {self.name} has no setting {unknown[0]!r}; its settings: {', '.join(fields)}"
            )
        ranges = Ranges(**args)
        for i in range(size):
            made = make(ranges, Random(seed + i))
            problem = problem_of(made)
            entry = {**dataclasses.asdict(problem), "argument": made.argument}
            if self.style == "compact":
                yield made.symbols, made.body, made.work + made.body, entry
            else:
                yield made.words, made.body, f"```python\n{problem.solution}```", entry

    def prompt(self, question: Question) -> Prompt:
        if self.style == "compact":
            return EOS + question.text
        asked = wording.FUNCTION.format(argument=question.entry["argument"], text=question.text)
        return [{"role": "user", "content": asked}]

    def code(self, question: Question, text: str) -> str | None:
        if self.style == "instruct":
            return super().code(question, text)
        _, found, body = text.split(EOS, 1)[0].partition("#")
        return as_function(question.entry["argument"], body) if found and body.strip() else None


def code_task(family: str, style: Style) -> CodeTask | None:
    """The task of a family whose answers are programs; None where it is not one."""
    if family == "functions":
        return FunctionsTask(family, style)
    kinds: dict[str, type[CodeTask]] = {"humaneval": HumanEvalTask, "mbpp": MbppTask}
    kind = kinds.get(family.partition(":")[0])
    if kind is None:
        return None
    if style != "instruct":
        raise UserError(f"tasks: family {family} is asked in words; set tasks.style to instruct")
    return kind(family)
