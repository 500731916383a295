"""Put questions to a model and judge what it says: the one place where that is done.

Every program that wants answers calls `ask`; `generate` is `ask` without the judging. Both take the model as an
argument and can commit their rows to a folder, so that a call that was cut off goes on where it ended.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ..generate.rollout import Prompt, Sample, batched, rollout
from ..generate.settings import Settings
from ..log import UserError, format_percent, progress, say
from ..models.open import Model
from ..models.tokenizer import DATE, Tokenizer
from ..report.rows import DOMAIN_NAMES
from ..runtime.jsonl import Row, read_jsonl, write_jsonl
from ..runtime.processes import on_first
from ..runtime.stop import check
from ..tasks import Question, Suite, demonstrated, few_shot
from . import accuracy
from .diversity import Answered
from .rerank import AT_K


class Answers(NamedTuple):
    """What a model said.

    Attributes:
      rows: one a sample, by question, then sample: {question_id, sample, text, tokens, logprob, reason}, and from `ask`
        score.
      tokens: generated since this start; rows that an earlier start committed are not counted.
      seconds: spent on generating them.
    """

    rows: list[Row]
    tokens: int
    seconds: float


def generate(
    model: Model,
    suite: Suite,
    questions: Sequence[Question],
    settings: Settings,
    key: jax.Array,
    *,
    shots: int = 0,
    demonstrate: bool = False,
    batch: int | None = None,
    folder: Path | None = None,
    title: str = "sample",
    unit: str = "samples",
) -> Answers:
    """Let a model answer every question `settings.samples` times.

    Args:
      key: PRNG key; sample s of question q draws from fold_in(fold_in(key, crc32(q.id)), s), in any company.
      shots: worked examples put before each question.
      demonstrate: show the model each question's own worked solution.
      batch: questions generated and committed at once; None takes all.
      folder: where the rows of each batch are committed; those found there are not generated again.
      title, unit: of the progress bar.
    """
    asked = prompts(suite, model.tokenizer, questions, shots, demonstrate=demonstrate)
    groups = list(batched(asked, batch or max(1, len(asked))))
    paths = [folder / f"batch-{i:04d}.jsonl" if folder else None for i in range(len(groups))]
    there = on_first(lambda: [path is not None and path.exists() for path in paths])
    done = sum(len(group) for group, is_there in zip(groups, there, strict=True) if is_there) * settings.samples
    rows, start, tokens = [], time.perf_counter(), 0
    with progress(title, total=len(asked) * settings.samples, unit=unit, done=done) as bar:
        for group, path, is_there in zip(groups, paths, there, strict=True):
            made: list[Row] = []
            if not is_there:
                samples = rollout(
                    model.config, model.params, model.tokenizer, group, settings, key,
                    on_sample=lambda tokens: bar.advance(1), between=check,
                )  # fmt: skip
                made = [sample_row(s) for s in samples]
                tokens += sum(len(s.tokens) for s in samples)
                if path is not None:
                    on_first(write_jsonl, path, made)
            rows.append(made if path is None else path)
    found = [row for part in rows for row in (read_jsonl(part) if isinstance(part, Path) else part)]
    return Answers(found, tokens, time.perf_counter() - start)


def ask(
    model: Model, suite: Suite, questions: Sequence[Question], settings: Settings, key: jax.Array, **how: Any
) -> Answers:
    """Put questions to a model and judge what it says: the rows of `generate`, which takes `how`, with a score.

    score: 1.0 right, 0.0 wrong, None where the task could not judge.
    """
    answers = generate(model, suite, questions, settings, key, **how)
    return answers._replace(rows=verify(suite, {q.id: q for q in questions}, answers.rows))


def go_on(
    model: Model,
    suite: Suite,
    begun: Sequence[tuple[Question, str]],
    settings: Settings,
    key: jax.Array,
    *,
    shots: int = 0,
    title: str = "go on",
) -> list[str | None]:
    """Let a model go on with completions that are begun; None where there is no room for `max_new_tokens` more.

    Args:
      begun: (question, beginning of its completion, which may be empty).
    """
    asked = []
    for number, (question, text) in enumerate(begun):
        head, tail = join_completion(suite, model.tokenizer, question, text, shots)
        if len(head) + len(tail) + settings.max_new_tokens <= model.config.context:
            asked.append(Prompt(str(number), (*head, *tail)))
    with progress(title, total=len(asked), unit="completions") as bar:
        samples = rollout(
            model.config, model.params, model.tokenizer, asked, settings, key,
            on_sample=lambda tokens: bar.advance(1), between=check,
        )  # fmt: skip
    said = {int(sample.prompt_id): sample.text for sample in samples}
    return [said.get(number) for number in range(len(begun))]


def right(rows: Sequence[Row]) -> dict[str, int]:
    """Count the right samples of each question, by its id; what cannot be judged counts as wrong."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["question_id"]] = counts.get(row["question_id"], 0) + (row["score"] == 1.0)
    return counts


def is_right(rows: Sequence[Row]) -> dict[str, float]:
    """Whether the answer to each question is right, 1.0 or 0.0, of rows with one sample a question."""
    return {id: float(count) for id, count in right(rows).items()}


def lengths(rows: Sequence[Row]) -> dict[str, int]:
    """Tokens of the answer to each question, of rows with one sample a question."""
    return {row["question_id"]: len(row["tokens"]) for row in rows}


SHOWN, SHOWN_OF_FAMILY = 12, 2
"""Answers that a record keeps for the report, in all and of a family in a domain."""


def to_show(questions: Sequence[Question], rows: Sequence[Row]) -> list[Row]:
    """Choose answers that a report shows: to the first questions of each family, whatever became of them.

    Test questions are taken, or those of another split where a family has no such ones. The choice looks at the
    questions alone, so that all models of a run are seen with the same.

    Args:
      questions: those that were asked.
      rows: of `ask`, one a question.

    Returns:
      Rows {question_id, family, domain, question, answer, text, score}; `answer` is the expected one.
    """
    groups: dict[tuple[str, str], list[Question]] = {}
    for q in sorted(questions, key=lambda q: q.split != "test"):
        groups.setdefault((q.domain, q.family), []).append(q)
    # By turns, so that of many families each is seen once before one is seen twice.
    chosen = [group[i] for i in range(SHOWN_OF_FAMILY) for group in groups.values() if i < len(group)][:SHOWN]
    said = {row["question_id"]: row for row in rows}
    return [
        {
            "question_id": q.id, "family": q.family, "domain": q.domain, "question": q.text, "answer": q.answer,
            "text": said[q.id]["text"], "score": said[q.id]["score"],
        }
        for q in chosen
    ]  # fmt: skip


def tell_pass_rates(questions: Sequence[Question], drawn: Mapping[str, Answered], samples: int) -> list[dict[str, Any]]:
    """pass@k, maj@k and rank@k of each family, said and returned."""
    rows = accuracy.pass_rates(questions, drawn, samples)
    for row in rows:
        told = []
        for name in AT_K:
            if row[name] is not None:
                mean, low, high = map(format_percent, row[name])
                told.append(f"{name}@{row['k']} {mean} [{low}, {high}]")
        name = f"{row['family']} ({DOMAIN_NAMES[row['domain']]})"
        say(f"{name}  {', '.join(told)}, {row['n']} questions × {samples} samples")
    return rows


def prompt_text(
    suite: Suite, tokenizer: Tokenizer, question: Question, shots: int = 0, *, demonstrate: bool = False
) -> str:
    """What the model reads: few-shot text, the chat template's rendering, or the bare prompt.

    Args:
      demonstrate: show the question's worked solution, or its answer where it has none, before it is asked.
    """
    said = question.solution or question.answer
    if shots:
        examples = [q for q in suite.questions("train", family=question.family) if q.solution and q.id != question.id]
        if len(examples) < shots:
            raise UserError(
                f"tasks.few_shot={shots}: family {question.family} has {len(examples)} training questions with "
                "solutions; lower it or give the family more"
            )
        own = [dataclasses.replace(question, solution=said)] if demonstrate else []
        return few_shot(question, [*examples[:shots], *own])
    prompt = suite.prompt(question)
    if demonstrate:
        prompt = demonstrated(prompt, said)
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.has_chat_template:
        raise UserError(
            "this model has no chat template and tasks.style is instruct; set tasks.few_shot to 2 or more "
            "(base models continue worked examples)"
        )
    # Templates that print a date would make a run depend on the day it is resumed.
    return tokenizer.chat(prompt, date_string=DATE)


def prompt_tokens(
    suite: Suite, tokenizer: Tokenizer, question: Question, shots: int = 0, *, demonstrate: bool = False
) -> list[int]:
    """The tokens of `prompt_text`; a chat template writes its own special tokens, bare text gets the tokenizer's."""
    text = prompt_text(suite, tokenizer, question, shots, demonstrate=demonstrate)
    return tokenizer.encode(text, special=is_bare(suite, question, shots))


def is_bare(suite: Suite, question: Question, shots: int = 0) -> bool:
    """Whether a question is put as a text, in no chat."""
    return bool(shots) or isinstance(suite.prompt(question), str)


def join_completion(
    suite: Suite, tokenizer: Tokenizer, question: Question, completion: str, shots: int = 0
) -> tuple[list[int], list[int]]:
    """The tokens of `prompt_text` and of a text that follows it."""
    prompt, bare = prompt_text(suite, tokenizer, question, shots), is_bare(suite, question, shots)
    head, tail = tokenizer.join(prompt, completion, special=bare)
    return head, tail


def prompts(
    suite: Suite, tokenizer: Tokenizer, questions: Sequence[Question], shots: int = 0, *, demonstrate: bool = False
) -> list[Prompt]:
    """Tokenised prompts of `questions`, under the questions' ids; demonstrate: as for `prompt_text`."""
    return [Prompt(q.id, tuple(prompt_tokens(suite, tokenizer, q, shots, demonstrate=demonstrate))) for q in questions]


def verify(suite: Suite, questions: Mapping[str, Question], samples: Sequence[Row]) -> list[Row]:
    """Samples with `score`: 1.0 right, 0.0 wrong, None where the task could not judge.

    A sample that brings its verdict with it is no answer to its question, and keeps it.
    """
    return [
        {
            **row,
            "score": row["verdict"] if "verdict" in row else suite.verify(questions[row["question_id"]], row["text"]),
        }
        for row in samples
    ]


def sample_row(sample: Sample) -> Row:
    return {
        "question_id": sample.prompt_id,
        "sample": sample.index,
        "text": sample.text,
        "tokens": list(sample.tokens),
        "logprob": round(sum(sample.logprobs), 4),
        "reason": sample.reason,
    }
