"""The steps of one round as functions of values: prompts, verified samples, training examples, merged weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import numpy as np

import jaxmerge

from .config import Selection
from .generate.rollout import Prompt
from .log import UserError
from .models.decoder import Params
from .models.tokenizer import DATE, Tokenizer
from .runtime.jsonl import Row
from .tasks import Question, Suite, few_shot

SHOWN = 4
"""Accepted and rejected samples kept in the metrics, each, for the report."""


def prompt_text(suite: Suite, tokenizer: Tokenizer, question: Question, shots: int = 0) -> str:
    """What the model reads: few-shot text, the chat template's rendering, or the bare prompt."""
    if shots:
        examples = [q for q in suite.questions("train", family=question.family) if q.solution and q.id != question.id]
        if len(examples) < shots:
            raise UserError(
                f"tasks.few_shot={shots}: family {question.family} has {len(examples)} training questions with "
                "solutions; lower it or give the family more"
            )
        return few_shot(question, examples[:shots])
    prompt = suite.prompt(question)
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.has_chat_template:
        raise UserError(
            "this model has no chat template and tasks.style is instruct; set tasks.few_shot to 2 or more "
            "(base models continue worked examples)"
        )
    # Templates that print a date would make a run depend on the day it is resumed.
    return tokenizer.chat(prompt, date_string=DATE)


def prompt_tokens(suite: Suite, tokenizer: Tokenizer, question: Question, shots: int = 0) -> list[int]:
    """The tokens of `prompt_text`; a chat template writes its own special tokens, bare text gets the tokenizer's."""
    rendered = not shots and not isinstance(suite.prompt(question), str)
    return tokenizer.encode(prompt_text(suite, tokenizer, question, shots), special=not rendered)


def prompts(suite: Suite, tokenizer: Tokenizer, questions: Sequence[Question], shots: int = 0) -> list[Prompt]:
    """Tokenised prompts of `questions`, under the questions' ids."""
    return [Prompt(q.id, tuple(prompt_tokens(suite, tokenizer, q, shots))) for q in questions]


def verify(suite: Suite, questions: Mapping[str, Question], samples: Sequence[Row]) -> list[Row]:
    """Samples with `score`: 1.0 right, 0.0 wrong, None where the task could not judge."""
    return [{**row, "score": suite.verify(questions[row["question_id"]], row["text"])} for row in samples]


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


def change(params: Params, base: Params) -> dict[str, float]:
    """‖θ − θ_0‖/‖θ_0‖ for every layer."""
    return jaxmerge.to_floats(jax.jit(jaxmerge.change)(params, base))
