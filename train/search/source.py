"""Solutions by a search in place of plain sampling: `sampling.source: dart | tot | mcts` of a self-improvement run."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

from ..evaluate.answer import join_completion
from ..evaluate.answer import prompts as prompts_of
from ..generate.settings import Settings
from ..log import progress
from ..models.open import Model
from ..runtime.jsonl import Row, write_jsonl
from ..runtime.processes import on_first
from ..runtime.stop import check
from ..tasks import Question, Suite
from ..tasks.code import CodeTask
from .ask import ROLES, Ask
from .driver import Driver
from .examples import whole
from .found import Found
from .kinds import KINDS
from .prompts import Prompt, load_prompts
from .replies import Replies
from .settings import Drawing, Search
from .subject import Subject
from .voice import Voice


def search_solutions(
    model: Model, suite: Suite, questions: list[Question], search: Search, drawing: Drawing, *,
    shots: int, settings: Settings, folder: Path, seed: int, title: str,
) -> tuple[list[Row], int, int, float]:  # fmt: skip
    """Solutions of every question as rows of a sample phase, in the order of the questions.

    Returns (rows, tokens generated for all of it, those generated since this start, seconds spent on these).

    Args:
      drawing: how texts are drawn; a score that is thought about may be as long as a step.
      shots: worked examples before a question that a chain of thought answers.
      settings: stop strings of a chain, precision and mesh of the model.
      folder: of the phase; replies kept there are not drawn again.
    """
    tokenizer, start = model.tokenizer, time.perf_counter()
    code = all(isinstance(suite.tasks[q.family], CodeTask) for q in questions)
    domain = "compact" if suite.style == "compact" else "code" if code else "mathematics"
    prompts = load_prompts(domain, reflects=search.reflects, needs=search.needs)
    # A chain is asked for in the words in which the run samples and evaluates.
    chain = Prompt(prompts.chain.messages, stop=settings.stop)
    prompts = dataclasses.replace(prompts, chain=chain)
    if prompts.score.after:
        drawing = dataclasses.replace(drawing, score=drawing.step)
    asked = {p.id: p.tokens for p in prompts_of(suite, tokenizer, questions, shots)}
    by_id = {q.id: q for q in questions}

    def chain_of(id: str, begun: str) -> tuple[int, ...]:
        if not begun:
            return asked[id]
        head, tail = join_completion(suite, tokenizer, by_id[id], begun, shots)
        return (*head, *tail)

    voice = Voice(
        model, prompts, drawing, seed=seed, dtype=settings.dtype, chain=chain_of, gather=settings.gather
    )  # fmt: skip
    right, wrong = prompts.conclusions
    subjects = [
        Subject(q.id, q.text, search, seed=seed, judged=True, complete=prompts.complete, conclusions=(right, wrong))
        for q in questions
    ]
    found: dict[str, Found] = {}

    def verify(id: str, ask: Ask) -> float | None:
        return on_first(suite.verify, by_id[id], whole(prompts, ask.values))

    def on_end(id: str, result: Found) -> None:
        found[id] = result
        bar.advance(1)

    with Replies(folder / "replies.jsonl") as log, progress(title, total=len(questions), unit="questions") as bar:
        driver: Driver[Found] = Driver(dict.fromkeys(ROLES, voice), verify, log, on_end=on_end)
        driver.run(((c.id, KINDS[search.kind](c)) for c in subjects), between=check)
    rows = []
    for q in questions:
        join = functools.partial(join_completion, suite, tokenizer, q, shots=shots)
        rows += rows_of(q, found[q.id], voice, join)
    on_first(write_jsonl, folder / "batch-0000.jsonl", rows)
    new = driver.counts["tokens"]
    return rows, new + driver.counts["replayed_tokens"], new, time.perf_counter() - start


def rows_of(
    question: Question, found: Found, voice: Voice, join: Callable[[str], tuple[list[int], list[int]]]
) -> list[Row]:
    """Solutions as samples: the whole text, and the end token where it ended by itself.

    A text that answers another prompt than the question's has that prompt with it, and its verdict: the task cannot
    judge it.

    Args:
      join: from a text to the tokens of the question's prompt and of the text behind it.
    """
    rows = []
    for number, solution in enumerate(found.solutions):
        text = whole(voice.prompts, dataclasses.asdict(solution))
        cut = solution.reason in ("length", "context")
        row: Row = {"question_id": question.id, "sample": number, "text": text}
        if solution.prompt:
            prompt = voice.prompts[solution.prompt]
            values = {"question": question.text, "steps": [], "hint": "", "siblings": [], **solution.about}
            spelt, special = voice.spelt(*prompt.render(values), plain=prompt.plain)
            head, tokens = voice.model.tokenizer.join(spelt, text, special=special)
            row |= {"prompt": spelt, "prompt_tokens": head, "verdict": solution.verdict}
        else:
            _, tokens = join(text)
        tokens = tokens if cut else voice.model.tokenizer.close(tokens)
        rows.append({**row, "tokens": tokens, "reason": "length" if cut else "eos"})
    return rows
