"""Solutions for `jaxmerge improve` by a search in place of plain sampling: `sampling.source: dart | tot | mcts`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import round
from ..config import Sampling
from ..log import progress
from ..models.open import Model
from ..resolve import build
from ..runtime.jsonl import write_jsonl
from ..runtime.processes import on_first
from ..runtime.stop import check
from ..tasks import Question
from ..tasks.code import CodeTask
from .ask import ROLES, Ask
from .driver import Driver
from .examples import whole
from .kinds import KINDS, Found
from .prompts import Prompt, Prompts, load_prompts
from .replies import Replies
from .settings import Drawing, Search
from .subject import Subject
from .voice import Voice

if TYPE_CHECKING:
    from ..run import Run

Row = dict[str, Any]


def searched(
    run: Run, weights: str, questions: list[Question], config: Sampling, stop: tuple[str, ...], folder: Path, *,
    seed: int, title: str,
) -> tuple[list[Row], int, int, float]:  # fmt: skip
    """Solutions of every question as rows of a sample phase, in the order of the questions.

    Returns (rows, tokens generated for all of it, those generated since this start, seconds spent on these).

    Args:
      weights: the phase that made the model.
      stop: strings at which a chain ends.
      folder: of the phase; replies kept there are not drawn again.
    """
    suite, tokenizer, start = run.suite, run.model.tokenizer, time.perf_counter()
    search = build(Search, {**config.search, "kind": config.source}, "sampling.search")
    code = all(isinstance(suite.tasks[q.family], CodeTask) for q in questions)
    domain = "compact" if suite.style == "compact" else "code" if code else "mathematics"
    prompts = load_prompts(domain, reflects=search.reflects)
    # A chain is asked for in the words in which the run samples and evaluates.
    chain = Prompt(prompts.chain.messages, stop=stop)
    prompts = dataclasses.replace(prompts, chain=chain)
    asked = round.prompts(suite, tokenizer, questions, run.config.tasks.few_shot)
    voice = Voice(
        Model(run.model.config, run.weights(weights), tokenizer), prompts, drawing(config, prompts), seed=seed,
        dtype=run.config.model.dtype, chains={p.id: p.tokens for p in asked}, gather=run.config.mesh.gather_to_decode,
    )  # fmt: skip
    by_id = {q.id: q for q in questions}
    subjects = [Subject(q.id, q.text, search, seed=seed, judged=True, complete=prompts.complete) for q in questions]
    found: dict[str, Found] = {}

    def verify(id: str, ask: Ask) -> float | None:
        return on_first(suite.verify, by_id[id], whole(prompts, ask.values))

    def on_end(id: str, result: Found) -> None:
        found[id] = result
        bar.advance(1)

    with Replies(folder / "replies.jsonl") as log, progress(title, total=len(questions), unit="questions") as bar:
        driver: Driver[Found] = Driver(dict.fromkeys(ROLES, voice), verify, log, on_end=on_end)
        driver.run(((c.id, KINDS[search.kind](c)) for c in subjects), between=check)
    rows = [row for q in questions for row in rows_of(q.id, found[q.id], prompts, tokenizer)]
    on_first(write_jsonl, folder / "batch-0000.jsonl", rows)
    new = driver.counts["tokens"]
    return rows, new + driver.counts["replayed_tokens"], new, time.perf_counter() - start


def drawing(config: Sampling, prompts: Prompts) -> Drawing:
    """Each kind of text may be as long as a sample, a score where it is thought about."""
    most = config.max_new_tokens
    score = most if prompts.score.after else Drawing.score
    return Drawing(
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, slots=config.slots,
        step=most, chain=most, write=most, score=score,
    )  # fmt: skip


def rows_of(id: str, found: Found, prompts: Prompts, tokenizer: Any) -> list[Row]:
    """Solutions as samples: the whole text, and the end token where it ended by itself."""
    rows = []
    for number, solution in enumerate(found.solutions):
        text = whole(prompts, dataclasses.asdict(solution))
        cut = solution.reason in ("length", "context")
        tokens = [*tokenizer.encode(text), *([] if cut else tokenizer.eos_ids[:1])]
        reason = "length" if cut else "eos"
        rows.append({"question_id": id, "sample": number, "text": text, "tokens": tokens, "reason": reason})
    return rows
