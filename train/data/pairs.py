"""Examples of preference: a better and a worse answer to the same, or an answer with a label, as the hub has them.

    {"prompt": "…", "chosen": "…", "rejected": "…"}                          texts: bare, no chat template
    {"prompt": [{role, content}, …], "chosen": […], "rejected": […]}         messages; the answer is one turn
    {"chosen": […], "rejected": […]}                                         whole conversations with a shared beginning
    {"prompt": …, "completion": …, "label": true}                            one answer, good or bad

A prompt may be a text where the answers are messages; it is then the user's turn.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..log import UserError
from ..runtime.jsonl import Row
from .records import Message, Record, check_messages, turns


def pair(row: Row) -> Record:
    """The record of the chosen answer, the rejected one beside it."""
    chosen, rejected = row["chosen"], row["rejected"]
    kinds = {type(value) for value in (chosen, rejected)}
    if kinds == {str}:
        record = of_texts(row.get("prompt"), chosen, rejected)
    elif kinds == {list}:
        record = of_messages(row.get("prompt"), _messages("chosen", chosen), _messages("rejected", rejected))
    else:
        raise UserError(
            f"chosen is {chosen!r:.40} and rejected is {rejected!r:.40}; two texts or two lists of {{role, content}} "
            "are wanted"
        )
    if not record.rejected:
        raise UserError("the rejected answer is empty; a pair needs two answers")
    if record.rejected == record.solution:
        raise UserError(f"chosen and rejected are the same answer, {record.rejected!r:.60}; leave such pairs out")
    return dataclasses.replace(record, id=_id(row, record))


def chosen(row: Row) -> Record:
    """The chosen answer alone."""
    return dataclasses.replace(pair(row), rejected="", id=_id(row))


def labelled(row: Row) -> Record:
    """One answer; `reward` is 1 where the label says that it is good, else −1."""
    label = row["label"]
    if not isinstance(label, bool) and label not in (0, 1):
        raise UserError(f"label is {label!r:.60}; true or false is wanted")
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(completion, str) and isinstance(prompt, str):
        record = Record(turns(prompt, completion), plain=True)
    else:
        record = Record((*_prompt(prompt), _answer("completion", _turns("completion", completion))))
    return dataclasses.replace(record, reward=1.0 if label else -1.0, id=_id(row, record))


def of_texts(prompt: Any, chosen: str, rejected: str) -> Record:
    """Bare texts; without a prompt it is their shared beginning, up to a space before the first difference."""
    if prompt is None:
        least = min(len(chosen), len(rejected))
        shared = next((i for i in range(least) if chosen[i] != rejected[i]), least)
        shared -= shared > 0 and chosen[shared - 1] == " "
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise UserError("there is no prompt, and chosen and rejected begin otherwise; a pair answers the same")
    if isinstance(prompt, list):
        return Record((*_prompt(prompt), {"role": "assistant", "content": chosen}), rejected=rejected)
    if not isinstance(prompt, str):
        raise UserError(f"prompt is {prompt!r:.60}; a text or a list of {{role, content}} is wanted")
    return Record(turns(prompt, chosen), plain=True, rejected=rejected)


def of_messages(prompt: Any, chosen: list[Message], rejected: list[Message]) -> Record:
    """Messages: answers after a prompt, or whole conversations."""
    if chosen[0]["role"] == "assistant":
        if prompt is None:
            raise UserError("chosen begins with the assistant's turn and there is no prompt; give one")
        context, better, worse = _prompt(prompt), chosen, rejected
    else:
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen))
        shared = min(shared, len(chosen) - 1)
        context, better, worse = chosen[:shared], chosen[shared:], rejected[shared:]
        asked = [m["content"] for m in context]
        if prompt is not None and (prompt not in asked if isinstance(prompt, str) else _prompt(prompt) != context):
            raise UserError("chosen is a whole conversation, and prompt is not its beginning; pass over it with"
                            " data.ignore=[prompt]")  # fmt: skip
    return Record((*context, _answer("chosen", better)), rejected=_answer("rejected", worse)["content"])


def _prompt(value: Any) -> list[Message]:
    return [{"role": "user", "content": value}] if isinstance(value, str) else _messages("prompt", value)


def _turns(name: str, value: Any) -> list[Message]:
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else _messages(name, value)


def _messages(name: str, value: Any) -> list[Message]:
    try:
        check_messages(value, only=("role", "content"))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return [dict(m) for m in value]


def _answer(name: str, messages: list[Message]) -> Message:
    """The one turn of the assistant that an answer is."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        found = ", ".join(m["role"] for m in messages) or "nothing"
        raise UserError(f"{name}: after what the two answers share come the turns {found}; one of the assistant's is"
                        " wanted")  # fmt: skip
    return messages[0]


def _id(row: Row, record: Record | None = None) -> str:
    """The line's own name; else that of the record, or "" for one made from what it holds."""
    named = (str(row[key]) for key in ("id", "uuid", "unique_id", "task_id", "prompt_id") if row.get(key) is not None)
    return next(named, "" if record is None else record.id)
