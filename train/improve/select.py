"""The steps of one round as functions of values: prompts, verified samples, training examples, merged weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..evaluate.answer import prompt_text, prompt_tokens
from ..log import UserError
from ..models.tokenizer import Tokenizer
from ..runtime.jsonl import Row
from ..tasks import Question, Suite
from .settings import Selection

SHOWN = 4
"""Accepted and rejected samples kept in the metrics, each, for the report."""


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
    real = real_questions(questions, config.real_ratio, seed)
    by_id = {q.id: q for q in questions}
    prompt_of = {q.id: prompt_text(suite, tokenizer, q, shots) for q in questions}
    tokens_of = {q.id: prompt_tokens(suite, tokenizer, q, shots) for q in questions}
    eos = tokenizer.eos_ids[0]

    def example(row: Row, completion: Sequence[int], score: float) -> Row:
        prompt, tail = tokens_of[row["question_id"]], list(completion)
        return {
            "question_id": row["question_id"],
            "family": by_id[row["question_id"]].family,
            "prompt": prompt_of[row["question_id"]],
            "completion": row["text"],
            # Every example ends by saying that it ends.
            "tokens": prompt + tail + ([] if tail and tail[-1] in tokenizer.eos_ids else [eos]),
            "prompt_length": len(prompt),
            "score": score,
            "weight": 1.0,
            "sample": row["sample"],
        }

    examples = {(row["question_id"], " ".join(row["completion"].split())): row for row in earlier}
    before = len(examples)
    # At most `per_question` of the model's own, of all rounds whose examples are learnt.
    kept_of = Counter(row["question_id"] for row in examples.values() if row["sample"] >= 0)
    reasons: Counter[str] = Counter()
    families: dict[str, Row] = {}
    shown: dict[bool, list[Row]] = {True: [], False: []}
    for row in scored:
        question = by_id[row["question_id"]]
        text = " ".join(row["text"].split())
        if row["score"] is None:
            reason = "unjudged"
        elif row["score"] != 1.0:
            reason = "wrong"
        elif row["reason"] == "length":
            reason = "unfinished"
        elif question.id in real:
            reason = "replaced by the worked solution"
        elif (question.id, text) in examples:
            reason = "duplicate"
        elif config.per_question is not None and kept_of[question.id] >= config.per_question:
            reason = "over per_question"
        else:
            reason = "kept"
            kept_of[question.id] += 1
            # The tokens of a sample cut at a stop string go on past its text.
            completion = tokenizer.encode(row["text"]) if row["reason"] == "stop" else row["tokens"]
            examples[question.id, text] = example(row, completion, 1.0)
        reasons[reason] += 1
        family = families.setdefault(question.family, {"sampled": 0, "correct": 0})
        family["sampled"] += 1
        family["correct"] += row["score"] == 1.0
        accepted = reason == "kept"
        if len(shown[accepted]) < SHOWN and reason not in ("duplicate", "over per_question"):
            shown[accepted].append(
                {
                    "question": question.text,
                    "answer": question.answer,
                    "text": row["text"],
                    "score": row["score"],
                    "accepted": accepted,
                    "reason": reason,
                }
            )
    for question in questions:
        if question.id in real:
            row = {"question_id": question.id, "text": question.solution, "sample": -1}
            key = (question.id, " ".join(str(question.solution).split()))
            examples.setdefault(key, example(row, tokenizer.encode(str(question.solution)), 1.0))
    counts = {
        "sampled": len(scored),
        "correct": sum(f["correct"] for f in families.values()),
        "unjudged": reasons["unjudged"],
        "unfinished": reasons["unfinished"],
        "duplicates": reasons["duplicate"],
        "over_limit": reasons["over per_question"],
        "kept": reasons["kept"],
        "real": len(real),
        "earlier": before,
        "examples_written": len(examples),
        "questions_solved": len({r["question_id"] for r in scored if r["score"] == 1.0}),
        "families": families,
        "examples": shown[True] + shown[False],
    }
    return list(examples.values()), counts


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
