"""Questions from files and from the hub: GSM8K, multiple choice, and free-form answers compared as mathematics.

A family is `gsm8k`, `choice` or `problem`, or one of these with a name of its own behind a colon (`choice:arc_easy`);
its args say where the questions are:

    {family: gsm8k, domain: id, train: 64, test: 100, args: {path: gsm8k.jsonl, prompt: chat, extract: flexible}}

`path` is a JSONL file, the folder of a TFDS version, or a dataset of the hub; the last two have splits (origin.py).
Questions come in the order of the file, so `test: 100` takes the first hundred that are not asked for elsewhere.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from jaxmerge import install

from ..log import UserError
from . import cot, letters, numbers, wording
from .origin import stamp
from .task import Prompt, Question, Unjudged

_UNIT = re.compile(r"\s*(\$?-?[\d.,]+)\s+[A-Za-z][A-Za-z /]*\.?\s*")


class LocalTask:
    """One family whose questions stand in a file."""

    formats: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Further args with their possible values, the first being the default."""

    def __init__(self, name: str):
        self.name = name
        self.unjudged = Unjudged()

    def draw(self, args: Mapping[str, Any], seed: int, size: int) -> Iterator[tuple[str, str, str | None, dict]]:
        """Yield (text, answer, solution, entry) of every question of the file, whatever the seed."""
        del seed, size
        chosen = self.options(args)
        path, split, ignore = str(args["path"]), args.get("split") or "train", tuple(args.get("ignore", ()))
        for number, record in enumerate(read(path, split, self.formats, ignore, stamp(path)), start=1):
            try:
                self.check_gold(record.answer)
            except (UserError, ValueError) as error:
                raise UserError(f"{path}, example {number} ({record.question[:40]!r}): {error}") from error
            entry = {"question": record.question, "choices": list(record.choices), **chosen}
            yield self.text(record), record.answer, record.solution or None, entry

    def check_gold(self, answer: str) -> None:
        """Raise an error that names a gold answer against which nothing can be judged."""

    def text(self, record: Any) -> str:
        """What makes a question that question."""
        return record.question

    def options(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """The settings, checked."""
        known = {"path", "split", "ignore", *self.settings}
        unknown = sorted(set(args) - known)
        if unknown:
            raise UserError(
                f"tasks: family {self.name} has no setting {unknown[0]!r}; its settings: {', '.join(sorted(known))}"
            )
        if not isinstance(args.get("path"), (str, os.PathLike)):
            raise UserError(f"tasks: family {self.name} needs args: {{path: FILE.jsonl}}, found {dict(args)}")
        ignore = args.get("ignore", ())
        if not isinstance(ignore, list | tuple) or not all(isinstance(key, str) for key in ignore):
            raise UserError(f"tasks: family {self.name}: ignore is {ignore!r}; a list of keys is wanted")
        for key, values in self.settings.items():
            if args.get(key, values[0]) not in values:
                raise UserError(f"tasks: family {self.name}: {key} is {args[key]!r}; choose one of {', '.join(values)}")
        return {key: args.get(key, values[0]) for key, values in self.settings.items()}

    def prompt(self, question: Question) -> Prompt:
        raise NotImplementedError

    def verify(self, question: Question, text: str) -> float | None:
        """Judge a completion: 1.0 right, 0.0 wrong, None if it could not be judged. Never raises."""
        try:
            return float(self.right(question, self.said(question, wording.spoken(text))))
        except Exception as error:  # recorded, never hidden: a verifier may not stop a run
            self.unjudged.add(error, question)
            return None

    def said(self, question: Question, text: str) -> str:
        """A completion up to where the model, its answer given, goes on with a question of its own.

        One that was shown examples does so at their next mark; one asked in a chat may be restating the question.
        """
        for mark in (cot.STOP, *wording.STOP_STRINGS):
            before, found, _ = text.partition(mark)
            if found and (question.entry.get("prompt") == "cot" or self.answers(question, before)):
                text = before
        return text

    def answers(self, question: Question, text: str) -> bool:
        """Whether a text gives an answer already."""
        del question
        return wording.marks_answer(text) or numbers.strict(text) is not None

    def right(self, question: Question, text: str) -> bool:
        raise NotImplementedError


class Gsm8kTask(LocalTask):
    """Word problems whose answer is a number. `prompt: cot` gives the eight usual examples, `chat` asks in words."""

    formats = ("gsm8k", "problem")
    settings: ClassVar = {"prompt": ("chat", "cot"), "extract": ("flexible", "strict")}

    def prompt(self, question: Question) -> Prompt:
        if question.entry["prompt"] == "cot":
            return cot.prompt(question.text)
        return [{"role": "user", "content": wording.GSM8K.format(text=question.text.strip())}]

    def right(self, question: Question, text: str) -> bool:
        extract = {"flexible": numbers.flexible, "strict": numbers.strict}[question.entry["extract"]]
        gold = numbers.read_gold(question.answer)
        return numbers.same(extract(text, ratio=numbers.is_ratio(gold)), gold)

    def check_gold(self, answer: str) -> None:
        numbers.read_gold(answer)


class ChoiceTask(LocalTask):
    """Multiple choice, answered with a letter. (`train/evaluate/choices.py` scores the choices by their likelihood.)"""

    formats = ("choices",)

    def text(self, record: Any) -> str:
        return wording.lettered(record.question, record.choices)

    def prompt(self, question: Question) -> Prompt:
        return [{"role": "user", "content": wording.CHOICE.format(text=question.text)}]

    def answers(self, question: Question, text: str) -> bool:
        return letters.extract_letter(text, len(question.entry["choices"])) is not None

    def right(self, question: Question, text: str) -> bool:
        return letters.extract_letter(text, len(question.entry["choices"])) == question.answer


class ProblemTask(LocalTask):
    """Free-form answers, compared as mathematics by `math-verify`: 1/2, 0.5 and \\frac{1}{2} are one."""

    formats = ("problem", "gsm8k")

    def __init__(self, name: str):
        super().__init__(name)
        mathematics()  # missing, it is named before any compute

    def prompt(self, question: Question) -> Prompt:
        return [{"role": "user", "content": wording.PROBLEM.format(text=question.text.strip())}]

    def check_gold(self, answer: str) -> None:
        if not any(map(str.isalnum, answer)):  # math-verify reads a thousand in a second or two, and these never
            read_mathematics(answer)

    def right(self, question: Question, text: str) -> bool:
        return equal_mathematics(text, question.answer)


def equal_mathematics(text: str, gold: str, *, seconds: int = 5) -> bool:
    r"""Whether the last answer in a text equals `gold` as mathematics.

    Args:
      text: a completion; `\boxed{…}`, `$…$` or a plain number or formula in it counts.
      gold: the answer alone.
      seconds: for reading and for comparing, each. The limit is an alarm signal, so this runs in the main thread only.

    Raises:
      TimeoutError, or what the comparison raised.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math-verify keeps its time limit by an alarm signal: call it in the main thread")
    parse, verify = mathematics()
    wanted, text = read_mathematics(gold, seconds), without_currency(text)

    def equals(said: str) -> bool:
        found = parse(said, parsing_timeout=seconds, raise_on_error=True)
        return bool(found) and verify(wanted, found, timeout_seconds=seconds, raise_on_error=True)

    # Two boxes close together are read as one set; a model that thought better of it means the last alone.
    return equals(text) or (text.count("\\boxed") > 1 and equals(text[text.rindex("\\boxed") :]))


def read_mathematics(gold: str, seconds: int = 5) -> Any:
    """A gold answer as math-verify reads it."""
    parse, _ = mathematics()
    gold = without_currency(gold)
    if with_unit := _UNIT.fullmatch(gold):  # in words it would be a product of letters
        gold = with_unit.group(1)
    delimited = "$" in gold or "\\boxed" in gold
    found = parse(gold if delimited else f"${gold}$", parsing_timeout=seconds, raise_on_error=True)
    if not found:
        raise ValueError(f"the gold answer {gold!r} is no mathematics")
    return found


def without_currency(text: str) -> str:
    """A text as math-verify can read it: with ASCII's minus and no dollar sign, which would be a formula's."""
    for minus in "\u2212\ufe63\uff0d":  # between words a dash is none
        text = text.replace(minus, "-")
    return numbers.group(text.replace("\\$", ""))


@functools.cache
def mathematics() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError(
            f"tasks: comparing free-form answers needs math-verify ({error}); {install.extra('math')}"
        ) from error
    return parse, verify


@functools.lru_cache(maxsize=8)
def read(path: str, split: str, formats: tuple[str, ...], ignore: tuple[str, ...], written: int) -> tuple[Any, ...]:
    """Records of a file, folder or dataset, of the formats a task understands; read once unless it is written again."""
    del written
    from ..data.builders import read_folder, records_of
    from ..data.formats import detect
    from ..data.rows import is_rows, read_rows

    if not is_rows(path):
        return tuple(read_folder(path, split))
    rows = read_rows(path, split)
    form = detect({key: value for key, value in rows[0][1].items() if key not in ignore}) if rows else ""
    if form not in formats:
        raise UserError(f"{path}: its lines are of the format {form or '(none)'}; wanted {' or '.join(formats)}")
    return tuple(records_of(rows, form, ignore=ignore, source=path))


TASK_OF = {"gsm8k": "gsm8k", "choices": "choice", "problem": "problem", "mbpp": "mbpp"}
"""Format of a file's lines → the task by which they are asked and judged."""
LOCAL: dict[str, type[LocalTask]] = {"gsm8k": Gsm8kTask, "choice": ChoiceTask, "problem": ProblemTask}


def local_task(family: str) -> LocalTask | None:
    """The task of a family whose questions stand in a file; None where the family is a generator's."""
    kind = family.partition(":")[0]
    return LOCAL[kind](family) if kind in LOCAL else None
