"""One example before tokens, whatever it was read from: a conversation, and what is needed to judge an answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..log import UserError

Message = Mapping[str, str]  # {"role": …, "content": …}
ROLES = ("system", "user", "assistant", "tool")
SCORES = ("complexity", "quality", "difficulty")
"""Numbers that a line of any format may have, and what picks examples reads."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One example.

    Attributes:
      messages: the conversation; one that can be learnt from holds an assistant's turn.
      plain: the texts stand as they are (a prompt, then what follows it), without a chat template around them.
      answer: the gold answer alone, where there is one: a number, a letter, a formula.
      choices: the possible answers of a multiple-choice question, in order.
      tests: assertions that a solution in code must pass.
      reward: how good the answer is, for objectives that weigh examples by it.
      rejected: a worse answer than the last of `messages`, to the same; the record is then a pair.
      scores: what scorers gave the example, by their names in `SCORES`; ways of picking examples read them.
      id: a name that is the same in every run; made from the contents where the source gives none.
    """

    messages: tuple[Message, ...]
    plain: bool = False
    answer: str = ""
    choices: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    id: str = ""
    reward: float = 0.0
    rejected: str = ""
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_messages(self.messages, only=("role", "content"))
        if self.answer and self.choices and not 0 <= letter_index(self.answer) < len(self.choices):
            raise UserError(f"answer is {self.answer!r}, and there are {len(self.choices)} choices")
        if not self.id:
            object.__setattr__(self, "id", digest(self))

    @property
    def question(self) -> str:
        """What the first user turn says."""
        return next((m["content"] for m in self.messages if m["role"] == "user"), "")

    @property
    def solution(self) -> str:
        """What the last assistant turn says; empty where there is none."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "assistant"), "")


def check_messages(messages: Any, *, only: Collection[str] = ()) -> None:
    """Refuse what is no conversation: one message or more, each with a role and a text as its content.

    Args:
      only: keys that a message may have; () for any.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UserError(f"messages is {messages!r:.60}; a list of {{role, content}} is wanted")
    if not messages:
        raise UserError("a conversation without messages; give at least a question")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"message {i} is {message!r:.60}; {{role, content}} is wanted")
        unknown = sorted(set(message) - set(only)) if only else []
        if unknown:
            raise UserError(f"message {i}: {', '.join(unknown)} is not understood; a message has role and content")
        if message.get("role") not in ROLES:
            raise UserError(f"message {i}: role is {message.get('role')!r}; choose one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"message {i}: content is {message.get('content')!r:.60}; a text is wanted")


def digest(record: Record) -> str:
    """Twelve hex digits of the SHA-256 of what a record holds."""
    held: list[Any] = [[dict(m) for m in record.messages], record.plain, record.answer, record.choices, record.tests]
    held += [record.rejected] if record.rejected else []
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:12]


def letter_index(letter: str) -> int:
    """A → 0, B → 1, …; −1 for what is no letter.

    Example:
      >>> letter_index("C"), letter_index("7")
      (2, -1)
    """
    return ord(letter) - ord("A") if len(letter) == 1 and "A" <= letter <= "Z" else -1


def turns(question: str, solution: str = "", *, system: str = "") -> tuple[Message, ...]:
    """The messages of one question and, where there is one, its solution."""
    pairs = (("system", system), ("user", question), ("assistant", solution))
    return tuple({"role": role, "content": text} for role, text in pairs if text)


def columns(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records as rows of plain values, which TFDS stores."""
    return [
        {
            "id": r.id,
            "roles": [m["role"] for m in r.messages],
            "contents": [m["content"] for m in r.messages],
            "plain": int(r.plain),
            "answer": r.answer,
            "choices": list(r.choices),
            "tests": list(r.tests),
            "reward": r.reward,
            "rejected": r.rejected,
            "scores": json.dumps(dict(r.scores), sort_keys=True),
        }
        for r in records
    ]


def from_columns(row: Mapping[str, Any]) -> Record:
    """Undo `columns` of one record; TFDS gives text back as bytes."""

    def text(value: Any) -> str:
        return bytes(value).decode() if isinstance(value, bytes) else str(value)

    pairs = zip(row["roles"], row["contents"], strict=True)
    return Record(
        tuple({"role": text(role), "content": text(content)} for role, content in pairs),
        bool(row["plain"]),
        text(row["answer"]),
        tuple(map(text, row["choices"])),
        tuple(map(text, row["tests"])),
        text(row["id"]),
        float(row.get("reward", 0.0)),  # sets written before there was one
        text(row.get("rejected", "")),
        json.loads(text(row.get("scores", "{}"))),
    )
