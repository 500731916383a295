"""The shapes in which people keep examples, a function each: a line of JSON in, a record out.

format    keys of a line                                        what it is
prompt    prompt, completion                                    bare texts, no chat template
chat      messages [{role, content}, …]                         conversations of any length
sharegpt  conversations [{from, value}, …]                      the same, older names
alpaca    instruction, output; input                            one instruction, perhaps with an input
gsm8k     question, answer (worked, ending in `#### n`)         word problems
mbpp      text or prompt, code, test_list                       Python functions with assertions
choices   question, choices, answer (a letter or an index)      multiple choice
problem   problem or question, answer; solution                 free-form answers
pairs     chosen, rejected; prompt (pairs.py)                   a better and a worse answer, texts or messages
chosen    the same                                              the better answers alone, never told by the keys
labelled  prompt, completion, label (pairs.py)                  an answer, and whether it is good (KTO)

A line of any format may have a `reward`, a number, which `sft.objective: {name: reward_weighted}` reads, and the
numbers `complexity`, `quality` and `difficulty`, which `data.pick` reads.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from ..log import UserError
from ..runtime.jsonl import Row
from . import pairs
from .records import SCORES, Record, letter_index, turns

# Keys that say where a line came from and change nothing about what it teaches.
PROVENANCE = frozenset({
    "id", "uuid", "unique_id", "source", "source_file", "task_id", "dataset", "category", "subject", "level",
    "question_concept", "prompt_id",
})  # fmt: skip

_CALCULATION = re.compile(r"<<[^<>]*>>")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{2,3}(?!\d))")
_FINAL = re.compile(r"\n?####\s*(.+?)\s*$")


class Format(NamedTuple):
    """One shape of a line: keys it must have (alternatives split by |), keys it may have, and how it is read."""

    required: tuple[str, ...]
    optional: frozenset[str]
    read: Callable[[Row], Record]

    @property
    def known(self) -> frozenset[str]:
        return frozenset(k for names in self.required for k in names.split("|")) | self.optional | PROVENANCE


def read_row(row: Row, name: str | None = None, *, ignore: Collection[str] = ()) -> Record:
    """Read one line.

    Args:
      row: the object of the line.
      name: of its format; None tells it by the keys.
      ignore: keys to pass over; any other key that the format does not know is an error.

    Raises:
      UserError: no format, or more than one, has these keys; a key is unknown; a value is of the wrong kind.

    Example:
      >>> read_row({"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\\n#### 5"}).answer
      '5'
    """
    if name is not None and name not in FORMATS:
        raise UserError(f"no format {name!r}; choose one of {', '.join(FORMATS)}")
    row = {key: value for key, value in row.items() if key not in ignore}
    reward = {"reward": _number("reward", row.pop("reward"))} if "reward" in row else {}
    scores = {key: _number(key, row.pop(key)) for key in SCORES if key in row}
    name = name or detect(row)
    form = FORMATS[name]
    missing = [names for names in form.required if not any(key in row for key in names.split("|"))]
    if missing:
        raise UserError(
            f"format {name}: {missing[0].replace('|', ' or ')} is missing; found {', '.join(row) or 'none'}"
        )
    unknown = sorted(set(row) - form.known)
    if unknown:
        raise UserError(
            f"format {name}: the key {unknown[0]!r} is not understood (known: {', '.join(sorted(form.known))});"
            f" pass over it with data.ignore=[{', '.join(unknown)}]"
        )
    return dataclasses.replace(form.read(row), **reward, scores=scores)


def detect(row: Row) -> str:
    """Tell the format of a line by its keys; refused where no format or more than one fits."""
    fits = [
        name
        for name, form in FORMATS.items()
        if name != "chosen" and all(any(key in row for key in names.split("|")) for names in form.required)
    ]
    if fits == ["prompt", "labelled"]:
        return "labelled"
    if len(fits) > 1 and set(fits) <= {"gsm8k", "problem", "choices"}:
        # All three have a question and an answer; choices and #### tell them apart.
        gsm8k = isinstance(row["answer"], str) and _FINAL.search(row["answer"]) is not None
        return "choices" if "choices" in fits else "gsm8k" if gsm8k else "problem"
    if len(fits) != 1:
        shapes = "; ".join(f"{name}: {', '.join(form.required)}" for name, form in FORMATS.items())
        raise UserError(
            f"the keys {', '.join(sorted(row)) or '(none)'} fit {' and '.join(fits) or 'no format'};"
            f" set data.format. Formats: {shapes}"
        )
    return fits[0]


def _text(row: Row, *names: str, default: str | None = None) -> str:
    for name in names:
        if name in row:
            if not isinstance(row[name], str):
                raise UserError(f"{name} is {row[name]!r:.60}; a text is wanted")
            return row[name]
    if default is None:
        raise UserError(f"{' or '.join(names)} is missing")
    return default


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{key} is {value!r:.60}; a finite number is wanted")
    return float(value)


def _id(row: Row) -> str:
    """The line's own name, if it has one."""
    return str(next((row[key] for key in ("id", "uuid", "unique_id", "task_id") if row.get(key) is not None), ""))


def prompt(row: Row) -> Record:
    return Record(turns(_text(row, "prompt"), _text(row, "completion")), plain=True, id=_id(row))


def chat(row: Row) -> Record:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise UserError(f"messages is {messages!r:.60}; a list of {{role, content}} is wanted")
    return Record(tuple(dict(m) for m in messages), id=_id(row))


SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def sharegpt(row: Row) -> Record:
    messages = []
    for i, turn in enumerate(row["conversations"]):
        if not isinstance(turn, Mapping) or set(turn) != {"from", "value"} or turn["from"] not in SHAREGPT:
            raise UserError(
                f"conversations[{i}] is {turn!r:.60}; wanted {{from, value}}, from one of {', '.join(SHAREGPT)}"
            )
        messages.append({"role": SHAREGPT[turn["from"]], "content": turn["value"]})
    return Record(tuple(messages), id=_id(row))


def alpaca(row: Row) -> Record:
    """The input stands under the instruction, as one turn of the user."""
    asked, given = _text(row, "instruction"), _text(row, "input", default="")
    system = _text(row, "system", default="")
    return Record(turns(f"{asked}\n\n{given}" if given else asked, _text(row, "output"), system=system), id=_id(row))


def gsm8k(row: Row) -> Record:
    """The worked solution, its calculator annotations `<<48/2=24>>` taken out, ending in `#### n` as published."""
    solution = _CALCULATION.sub("", _text(row, "answer"))
    final = _FINAL.search(solution)
    if final is None:
        raise UserError(f"answer ends in {solution[-40:]!r}; GSM8K's end in `#### ` and the number")
    return Record(turns(_text(row, "question"), solution), answer=_THOUSANDS.sub("", final.group(1)), id=_id(row))


def mbpp(row: Row) -> Record:
    """The task with its assertions, which name the function, as MBPP's authors put it to a model."""
    tests = row["test_list"]
    if not isinstance(tests, list) or not all(isinstance(t, str) for t in tests):
        raise UserError(f"test_list is {tests!r:.60}; a list of texts is wanted")
    setup = [line for key in ("test_setup_code", "test_imports") for line in _lines(row.get(key, "")) if line]
    shown = "\n".join(tests)
    asked = f"{_text(row, 'text', 'prompt')}\nYour code should pass these tests:\n\n{shown}"
    code = _text(row, "code").replace("\r\n", "\n").strip("\n")
    return Record(turns(asked, f"```python\n{code}\n```"), tests=(*setup, *tests), id=_id(row))


def _lines(value: Any) -> list[str]:
    return list(value) if isinstance(value, list) else str(value).splitlines()


def choices(row: Row) -> Record:
    """The answer is a letter, a number from 0, or one of the choices word for word."""
    options = row["choices"]
    if isinstance(options, Mapping):  # ARC's {"text": […], "label": […]}
        labels = [str(label) for label in options.get("label", ())]
        options = options.get("text")
    else:
        labels = []
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) for o in options):
        raise UserError(f"choices is {row['choices']!r:.60}; a list of two or more texts is wanted")
    return choice_record(_text(row, "question"), options, row.get("answer", row.get("answerKey")), labels, id=_id(row))


def choice_record(
    question: str,
    options: list[str],
    answer: Any,
    labels: list[str] | None = None,
    *,
    reason: str = "",
    id: str = "",
) -> Record:
    """A multiple-choice question; its solution is the letter, after the reason where there is one."""
    labels = labels or [chr(ord("A") + i) for i in range(len(options))]
    index = -1
    if isinstance(answer, int) and not isinstance(answer, bool):
        index = answer
    elif isinstance(answer, str):
        matches = [i for i, known in enumerate(labels) if known == answer]
        matches = matches or [i for i, known in enumerate(options) if known == answer]
        index = matches[0] if len(matches) == 1 else letter_index(answer)
    if not 0 <= index < len(options):
        raise UserError(f"answer is {answer!r}; wanted one of {', '.join(labels)}, an index from 0, or a choice")
    letter = chr(ord("A") + index)
    solution = f"{reason}\nAnswer: {letter}" if reason else letter
    return Record(turns(question, solution), answer=letter, choices=tuple(options), id=id)


def problem(row: Row) -> Record:
    """A question with a gold answer to be compared as mathematics, and perhaps a worked solution."""
    answer = row["answer"]
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str):
        raise UserError(f"answer is {row['answer']!r:.60}; a text or a number is wanted")
    solution = _text(row, "solution", default="") or f"Answer: {answer}"
    return Record(turns(_text(row, "problem", "question"), solution), answer=answer, id=_id(row))


FORMATS: dict[str, Format] = {
    "prompt": Format(("prompt", "completion"), frozenset(), prompt),
    "chat": Format(("messages",), frozenset(), chat),
    "sharegpt": Format(("conversations",), frozenset(), sharegpt),
    "alpaca": Format(("instruction", "output"), frozenset({"input", "system"}), alpaca),
    "gsm8k": Format(("question", "answer"), frozenset(), gsm8k),
    "mbpp": Format(
        ("text|prompt", "code", "test_list"),
        frozenset({"test_setup_code", "test_imports", "challenge_test_list"}),
        mbpp,
    ),
    "choices": Format(("question", "choices", "answer|answerKey"), frozenset(), choices),
    "problem": Format(("problem|question", "answer"), frozenset({"solution"}), problem),
    "pairs": Format(("chosen", "rejected"), frozenset({"prompt"}), pairs.pair),
    "chosen": Format(("chosen", "rejected"), frozenset({"prompt"}), pairs.chosen),
    "labelled": Format(("prompt", "completion", "label"), frozenset(), pairs.labelled),
}
