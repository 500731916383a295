"""Datasets that TFDS already has, mapped to records: math_qa, ai2_arc, openbookqa, lbpp.

TFDS downloads and writes them; here is what a record of each means. Text comes back as bytes and class labels as
numbers, whichever file format the set was prepared in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..log import UserError
from ..runtime.jsonl import Row
from .formats import choice_record
from .records import Record, turns

_OPTION = re.compile(r"([a-e]) \)")


def _text(value: Any) -> str:
    return bytes(value).decode() if isinstance(value, bytes) else str(value)


def math_qa(row: Row) -> Record:
    """Arithmetic word problems with five options in one text, and a rationale.

    Example:
      >>> row = {"Problem": "2 + 3 ?", "Rationale": "\\"5\\"", "correct": "b", "options": "a ) 4 , b ) 5 , c ) 6"}
      >>> record = math_qa(row)
      >>> record.choices, record.answer
      (('4', '5', '6'), 'B')
    """
    options = split_options(_text(row["options"]))
    reason = _text(row["Rationale"]).strip().strip('"').strip()
    return choice_record(_text(row["Problem"]), options, _text(row["correct"]).strip().upper(), reason=reason)


def split_options(text: str) -> list[str]:
    """Take MathQA's options apart: `a ) 4 , b ) 5`, or a printed list of such texts."""
    text = text.strip()
    listed = text.startswith("[") and text.endswith("]")
    # A printed list is `['a ) 4', 'b ) 5']`: the quotes go, the commas between options go with the others.
    body = text[1:-1].replace("'", "").replace('"', "") if listed else text
    marks = list(_OPTION.finditer(body))
    if [m.group(1) for m in marks] != [chr(ord("a") + i) for i in range(len(marks))] or len(marks) < 2:
        raise UserError(f"options is {text!r:.80}; wanted `a ) … , b ) …` in this order")
    ends = [m.start() for m in marks[1:]] + [len(body)]
    return [body[m.end() : end].strip().rstrip(",").strip() for m, end in zip(marks, ends, strict=True)]


def ai2_arc(row: Row) -> Record:
    """Science questions for schools; three to five choices."""
    choices = row["choices"]
    if isinstance(choices, Mapping):
        options, labels = choices["text"], choices["label"]
    else:  # a sequence of records, as a data source gives it
        options, labels = [c["text"] for c in choices], [c["label"] for c in choices]
    # Labels are numbers of the class (0 is A); what counts is which choice has the answer's.
    index = [int(label) for label in labels].index(int(row["answerKey"]))
    return choice_record(_text(row["question"]), [_text(o) for o in options], index, id=_text(row["id"]))


def openbookqa(row: Row) -> Record:
    """Elementary science; the fact a question is made from is not shown."""
    question = row["question"]
    options = [_text(question[f"choice_{letter}"]) for letter in "ABCD"]
    return choice_record(_text(question["stem"]), options, int(row["answerKey"]))


def lbpp(row: Row) -> Record:
    """Less basic programming problems with tests; the fence around the solution names its language."""
    language, tests = _text(row["language"]), tuple(_text(t) for t in row["test_list"])
    setup = _text(row["test_setup"]).strip()
    asked = [_text(row["instruction"]).strip()]
    if signature := _text(row["signature"]).strip():
        asked.append(f"Signature:\n{signature}")
    if tests:
        asked.append("Your code should pass these tests:\n\n" + "\n".join(tests))
    solution = f"```{language}\n{_text(row['completion']).strip()}\n```"
    return Record(
        turns("\n\n".join(asked), solution), tests=(*([setup] if setup else []), *tests), id=_text(row["task_id"])
    )


SETS: dict[str, Callable[[Row], Record]] = {
    "math_qa": math_qa,
    "ai2_arc": ai2_arc,
    "openbookqa": openbookqa,
    "lbpp": lbpp,
}


def read_set(name: str, rows: Any) -> Iterator[Record]:
    """Map the rows of a TFDS set; an unknown set, or a row without what it should hold, is an error."""
    if name not in SETS:
        raise UserError(f"no mapping for the TFDS set {name!r}; there are: {', '.join(SETS)}")
    for i in range(len(rows)):
        try:
            yield SETS[name](rows[i])
        except (KeyError, ValueError) as error:
            raise UserError(f"{name}, example {i}: {error} is not as this set's features say") from error
        except UserError as error:
            raise UserError(f"{name}, example {i}: {error}") from error
