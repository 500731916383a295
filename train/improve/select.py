"""The steps of one round as functions of values: prompts, verified samples, training examples, merged weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..evaluate.answer import is_bare, prompt_text, prompt_tokens
from ..log import UserError
from ..models.tokenizer import DATE, Tokenizer
from ..runtime.jsonl import Row
from ..tasks import Question, Suite
from .pairs import pair_up
from .rewrites import Draft, Judged, text_of
from .settings import Selection

SHOWN = 4
"""Accepted and rejected samples kept in the metrics, each, for the report: of as many different questions."""


class Choice:
    """Examples chosen so far from the samples of some questions, in order, with what decides the next.

    Attributes:
      examples: (question id, prompt and text with single spaces, score) → example; first those of earlier rounds.
      memory: question id → the example of an earlier round that the rewrite remembers; it is none of `examples`.
      real: ids of the questions learnt from their worked solutions.
    """

    def __init__(
        self, suite: Suite, tokenizer: Tokenizer, questions: Sequence[Question], config: Selection, *,
        shots: int, seed: int, earlier: Sequence[Row],
    ):  # fmt: skip
        self.suite, self.tokenizer, self.config = suite, tokenizer, config
        self.by_id = {q.id: q for q in questions}
        self.real = real_questions(questions, config.real_ratio, seed)
        self.prompt_of = {q.id: prompt_text(suite, tokenizer, q, shots) for q in questions}
        self.tokens_of = {q.id: prompt_tokens(suite, tokenizer, q, shots) for q in questions}
        self.bare = {q.id for q in questions if is_bare(suite, q, shots)}
        remembers = config.rewrite.remembers
        self.memory = {row["question_id"]: row for row in earlier if row["score"] == 1.0} if remembers else {}
        learnt = [] if remembers else earlier
        self.examples = {
            self.key(row["question_id"], row["prompt"], row["completion"], row["score"]): row for row in learnt
        }
        self.seen = {self.kind_of(row) for row in learnt}
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
        if self.kind_of(row) in self.seen:
            return "duplicate"
        if limit is not None and self.kept_of[id] >= limit:
            return "over per_question"
        return "kept"

    def key(self, id: str, prompt: str, text: str, score: float) -> tuple[str, str, float]:
        return id, one_spaced(f"{prompt}\n{text}"), round(score, 5)  # of earlier rounds it is in 32 bits

    def keep(self, row: Row) -> None:
        """Note that a sample is kept, so that the next like it is a duplicate."""
        self.kept_of[row["question_id"]] += 1
        self.seen.add(self.kind_of(row))

    def whole(self, row: Row) -> list[int]:
        """Tokens of the prompt and of a sample's text, closed."""
        id = row["question_id"]
        draft = Draft(id, row["text"], row=row)
        return self.tokens_of[id] + self.completion(draft, self.prompt_of[id], id in self.bare)

    def kind_of(self, row: Row) -> tuple[str, str, str]:
        """What two samples share that are duplicates."""
        prompt = row.get("prompt", self.prompt_of[row["question_id"]])
        return row["question_id"], prompt, self.config.rewrite.distinct(text_of(row))

    def write(self, draft: Draft) -> None:
        """Make an example of a draft, unless there is one like it."""
        id, row = draft.question_id, draft.row
        prompt, tokens, bare = self.prompt_of[id], self.tokens_of[id], id in self.bare
        if row is not None and "prompt_tokens" in row:  # it answers another prompt
            prompt, tokens = row["prompt"], list(row["prompt_tokens"])
        elif draft.asked is not None:
            prompt = self.asking(id, draft.asked)
            tokens = self.tokenizer.encode(prompt, special=bare)
        example = {
            "question_id": id,
            "family": self.by_id[id].family,
            "prompt": prompt,
            "completion": draft.text,
            "tokens": tokens + self.completion(draft, prompt, bare),
            "prompt_length": len(tokens),
            "score": draft.score,
            "weight": draft.weight,
            "sample": draft.sample,
        }
        self.examples.setdefault(self.key(id, prompt, draft.text, draft.score), example)

    def completion(self, draft: Draft, prompt: str, bare: bool) -> list[int]:
        """The tokens learnt; each example ends by saying that it ends, unless a sample was cut off."""
        row = draft.row
        if row is None or row.get("reason") == "stop":  # tokens of a sample cut at a stop string go on past its text
            return self.tokenizer.close(self.tokenizer.join(prompt, draft.text, special=bare)[1])
        if "prompt_length" in row:  # an example of an earlier round
            return list(row["tokens"][row["prompt_length"] :])
        return list(row["tokens"]) if row["reason"] == "length" else self.tokenizer.close(row["tokens"])

    def asking(self, id: str, text: str) -> str:
        """The prompt that puts a text in a question's place."""
        if id not in self.bare:
            return self.tokenizer.chat([{"role": "user", "content": text}], date_string=DATE)
        before, found, after = self.prompt_of[id].rpartition(self.by_id[id].text)
        if not found:
            raise UserError(
                f"selection.rewrite={self.config.rewrite.name} asks something in place of the question, and the prompt "
                f"of {id} does not hold its text; take a model with a chat template and tasks.few_shot=0"
            )
        return before + text + after


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

    A sample is kept if it is right, finished, and no repetition of another of its question; what examples are made
    of those kept and of the others, `config.rewrite` says. For a share `real_ratio` of the questions, chosen by `seed`,
    the generator's worked solution takes the samples' place.
    """
    paired = bool(config.pairs)
    choice = Choice(
        suite, tokenizer, questions, config, shots=shots, seed=seed, earlier=() if paired else earlier
    )  # fmt: skip
    before = len(choice.examples)
    reasons: Counter[str] = Counter()
    families: dict[str, Row] = {}
    shown: dict[bool, dict[str, Row]] = {True: {}, False: {}}
    fates: dict[str, list[tuple[Row, str]]] = {}
    for row in scored:
        reason, question = choice.reason_of(row), choice.by_id[row["question_id"]]
        if reason == "kept":
            choice.keep(row)
        fates.setdefault(question.id, []).append((row, reason))
        reasons[reason] += 1
        family = families.setdefault(question.family, {"sampled": 0, "correct": 0})
        family["sampled"] += 1
        family["correct"] += row["score"] == 1.0
        there = shown[reason == "kept"]
        if len(there) < SHOWN and question.id not in there and reason not in ("duplicate", "over per_question"):
            there[question.id] = to_show(question, row, reason)
    judged = [Judged(choice.by_id[id], samples, choice.memory.get(id)) for id, samples in fates.items()]
    for draft in config.rewrite.drafts(judged, suite.verify, seed):
        choice.write(draft)
    for question in questions:
        if question.id in choice.real:
            choice.write(Draft(question.id, str(question.solution)))
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
