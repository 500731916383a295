"""The steps of one round as functions of values: prompts, verified samples, training examples, merged weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..evaluate.answer import is_bare, prompt_text, prompt_tokens
from ..log import UserError
from ..models.tokenizer import Tokenizer
from ..runtime.jsonl import Row
from ..tasks import Question, Suite
from .pairs import pair_up
from .settings import Selection

SHOWN = 4
"""Accepted and rejected samples kept in the metrics, each, for the report: of as many different questions."""


class Choice:
    """Examples chosen so far from the samples of some questions, in order, with what decides the next.

    Attributes:
      examples: (question id, text with single spaces) → example; first those of earlier rounds.
      real: ids of the questions learnt from their worked solutions.
    """

    def __init__(
        self, suite: Suite, tokenizer: Tokenizer, questions: Sequence[Question], config: Selection, *,
        shots: int, seed: int, earlier: Sequence[Row],
    ):  # fmt: skip
        self.tokenizer, self.config = tokenizer, config
        self.by_id = {q.id: q for q in questions}
        self.real = real_questions(questions, config.real_ratio, seed)
        self.prompt_of = {q.id: prompt_text(suite, tokenizer, q, shots) for q in questions}
        self.tokens_of = {q.id: prompt_tokens(suite, tokenizer, q, shots) for q in questions}
        self.bare = {q.id for q in questions if is_bare(suite, q, shots)}
        self.examples = {(row["question_id"], one_spaced(row["completion"])): row for row in earlier}
        # At most `per_question` of the model's own, of all rounds whose examples are learnt.
        self.kept_of = Counter(row["question_id"] for row in self.examples.values() if row["sample"] >= 0)

    def reason_of(self, row: Row) -> str:
        """Why a verified sample is left out, or `kept`."""
        id, limit = row["question_id"], self.config.per_question
        if row["score"] is None:
            return "unjudged"
        if row["score"] != 1.0:
            return "wrong" if row["reason"] != "length" or not self.config.pairs else "unfinished"
        if row["reason"] == "length":
            return "unfinished"
        if id in self.real:
            return "replaced by the worked solution"
        if (id, one_spaced(row["text"])) in self.examples:
            return "duplicate"
        if limit is not None and self.kept_of[id] >= limit:
            return "over per_question"
        return "kept"

    def keep(self, row: Row) -> None:
        """Take a sample as an example."""
        self.kept_of[row["question_id"]] += 1
        self.examples[row["question_id"], one_spaced(row["text"])] = self.example(row, self.completion(row))

    def completion(self, row: Row) -> Sequence[int]:
        """Tokens of a sample's text; those of one cut at a stop string go on past it."""
        return self.follow(row["question_id"], row["text"]) if row["reason"] == "stop" else row["tokens"]

    def whole(self, row: Row) -> list[int]:
        """Tokens of the prompt and of a sample's text, closed."""
        return self.tokens_of[row["question_id"]] + self.tokenizer.close(self.completion(row))

    def keep_solution(self, question: Question) -> None:
        """Take a question's worked solution as an example, unless an earlier round did."""
        text = str(question.solution)
        row = {"question_id": question.id, "text": question.solution, "sample": -1}
        self.examples.setdefault((question.id, one_spaced(text)), self.example(row, self.follow(question.id, text)))

    def follow(self, id: str, text: str) -> list[int]:
        """Tokens of a text that follows a question's prompt."""
        return self.tokenizer.join(self.prompt_of[id], text, special=id in self.bare)[1]

    def example(self, row: Row, completion: Sequence[int]) -> Row:
        prompt = self.tokens_of[row["question_id"]]
        return {
            "question_id": row["question_id"],
            "family": self.by_id[row["question_id"]].family,
            "prompt": self.prompt_of[row["question_id"]],
            "completion": row["text"],
            # Every example ends by saying that it ends.
            "tokens": prompt + self.tokenizer.close(completion),
            "prompt_length": len(prompt),
            "score": 1.0,
            "weight": 1.0,
            "sample": row["sample"],
        }


def one_spaced(text: str) -> str:
    return " ".join(text.split())


def select(
    suite: Suite,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    scored: Sequence[Row],
    config: Selection,
    *,
    shots: int = 0,
    seed: int,
    earlier: Sequence[Row] = (),
) -> tuple[list[Row], Row]:
    """Training examples from verified samples, in a fixed order, and the counts of what was left out and why.

    A sample is kept if it is right, finished, and no repetition of another of its question. For a share
    `real_ratio` of the questions, chosen by `seed`, the generator's worked solution takes the samples' place.
    """
    paired = bool(config.pairs)
    choice = Choice(
        suite, tokenizer, questions, config, shots=shots, seed=seed, earlier=() if paired else earlier
    )  # fmt: skip
    before = len(choice.examples)
    reasons: Counter[str] = Counter()
    families: dict[str, Row] = {}
    shown: dict[bool, dict[str, Row]] = {True: {}, False: {}}
    for row in scored:
        reason, question = choice.reason_of(row), choice.by_id[row["question_id"]]
        if reason == "kept":
            choice.keep(row)
        reasons[reason] += 1
        family = families.setdefault(question.family, {"sampled": 0, "correct": 0})
        family["sampled"] += 1
        family["correct"] += row["score"] == 1.0
        there = shown[reason == "kept"]
        if len(there) < SHOWN and question.id not in there and reason not in ("duplicate", "over per_question"):
            there[question.id] = to_show(question, row, reason)
    for question in questions:
        if question.id in choice.real:
            choice.keep_solution(question)
    examples = list(choice.examples.values())
    if paired:
        wrong = {(r["question_id"], one_spaced(r["text"])): r for r in scored if choice.reason_of(r) == "wrong"}
        examples = pair_up(examples, [(id, choice.whole(r)) for (id, _), r in wrong.items()], config.pairs, earlier)
    counts = {
        "sampled": len(scored),
        "correct": sum(f["correct"] for f in families.values()),
        "unjudged": reasons["unjudged"],
        "unfinished": reasons["unfinished"],
        "duplicates": reasons["duplicate"],
        "over_limit": reasons["over per_question"],
        "kept": reasons["kept"],
        "real": len(choice.real),
        "earlier": before,
        "examples_written": len(examples),
        "questions_solved": len({r["question_id"] for r in scored if r["score"] == 1.0}),
        "families": families,
        "examples": [*shown[True].values(), *shown[False].values()],
    }
    return examples, counts


def to_show(question: Question, row: Row, reason: str) -> Row:
    """A sample as the report shows it."""
    return {
        "question": question.text,
        "answer": question.answer,
        "text": row["text"],
        "score": row["score"],
        "accepted": reason == "kept",
        "reason": reason,
    }


def real_questions(questions: Sequence[Question], ratio: float, seed: int) -> frozenset[str]:
    """The ids of the share `ratio` of `questions` that are learnt from their worked solutions."""
    wanted = round(ratio * len(questions))
    if not wanted:
        return frozenset()
    solved = [q.id for q in questions if q.solution]
    if len(solved) < wanted:
        raise UserError(
            f"selection.real_ratio={ratio} wants {wanted} worked solutions, the families give {len(solved)}; lower it"
        )
    order = np.random.Generator(np.random.Philox(key=[seed, 0x5EA1])).permutation(len(solved))
    return frozenset(solved[i] for i in order[:wanted])
