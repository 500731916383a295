"""Questions of several families, split so that no question is in two places."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from ..log import UserError
from .code import CodeTask, MbppTask
from .compact import CompactTask
from .functions import code_task
from .judged import PREFIX, JudgedTask
from .local import LocalTask, local_task
from .origin import args_of
from .reasoning import InstructTask
from .settings import FamilySpec
from .task import (
    DOMAINS,
    SPLITS,
    STYLES,
    Domain,
    Prompt,
    Question,
    Split,
    Style,
    Task,
    majority_answer,
    normalise,
    question_id,
    reward,
)

TASKS: dict[Style, Callable[[str], Task]] = {"instruct": InstructTask, "compact": CompactTask}

# The test questions are drawn first, of every family, so that a larger training pool leaves them as they are.
DRAW_ORDER: tuple[Split, ...] = ("test", "validation", "train")


@dataclasses.dataclass(frozen=True)
class Suite:
    """The questions of a run, with the tasks that ask and judge them.

    Attributes:
      style: `instruct` (words, for chat models) or `compact` (symbols, for the miniature).
      seed: what the draw depended on, beside the specs.
      specs: as given.
      all: every question, ordered by spec, then train, validation, test, then as drawn.
      tasks: one task a family.
    """

    style: Style
    seed: int
    specs: tuple[FamilySpec, ...]
    all: tuple[Question, ...]
    tasks: Mapping[str, Task]

    def questions(
        self, split: Split | None = None, *, domain: Domain | None = None, family: str | None = None
    ) -> list[Question]:
        """Select questions; None selects all of them."""
        return [
            q
            for q in self.all
            if split in (None, q.split) and domain in (None, q.domain) and family in (None, q.family)
        ]

    def families(self, domain: Domain | None = None) -> list[str]:
        """List the families of a domain, each once, in the order of the specs."""
        return list(dict.fromkeys(s.family for s in self.specs if domain in (None, s.domain)))

    def prompt(self, question: Question) -> Prompt:
        """Build what the model is given for `question`."""
        return self.tasks[question.family].prompt(question)

    def verify(self, question: Question, text: str) -> float | None:
        """Judge a completion: 1.0 right, 0.0 wrong, None if it could not be judged, which `unjudged` counts."""
        task = self.tasks[question.family]
        try:
            return task.verify(question, text)
        except Exception as error:  # counted, never hidden: one answer may not stop a run
            task.unjudged[type(error).__name__] += 1
            return None

    def reward(self, question: Question, text: str) -> float:
        """Give the reward of a completion: 1 for right, 0 otherwise."""
        return reward(self.verify(question, text))

    def unjudged(self) -> dict[str, dict[str, int]]:
        """Count, a family, the exception classes that kept answers from being judged."""
        return {name: dict(task.unjudged) for name, task in self.tasks.items() if task.unjudged}

    def describe_unjudged(self) -> str:
        """Say which exceptions kept answers from being judged, with an example of each; empty if none did."""
        return "; ".join(f"{name}: {task.unjudged}" for name, task in self.tasks.items() if task.unjudged)

    def digests(self) -> dict[str, str]:
        """Tell the questions of each family by 32 hex digits: of ids, splits, texts, answers, solutions.

        Of files also what else a verdict rests on, tests say; generators' own notes may differ between processes.
        """
        found = {}
        for family in self.families():
            task, total = self.tasks[family], hashlib.sha256()
            read = isinstance(task, LocalTask | CodeTask)
            for q in self.questions(family=family):
                # The name of a problem may be its line's number.
                entry = {key: value for key, value in q.entry.items() if key != "id"} if read else None
                row = [q.id, q.domain, q.split, q.text, q.answer, q.solution, entry]
                total.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
            found[family] = total.hexdigest()[:32]
        return found

    def majority_baselines(self) -> list[dict[str, Any]]:
        """Compute what always giving the most common gold answer would score, a family and split.

        Returns:
          Rows {domain, family, split, answer, accuracy, n}, in the order of the specs; an accuracy near its
          baseline shows no skill.
        """
        rows: list[dict[str, Any]] = []
        pairs: list[tuple[Domain, str]] = [(s.domain, s.family) for s in self.specs]
        for domain, family in dict.fromkeys(pairs):
            for split in SPLITS:
                pool = self.questions(split, domain=domain, family=family)
                if pool:
                    answer, accuracy = majority_answer(pool)
                    rows.append(
                        {
                            "domain": domain,
                            "family": family,
                            "split": split,
                            "answer": answer,
                            "accuracy": accuracy,
                            "n": len(pool),
                        }
                    )
        return sorted(rows, key=lambda row: DOMAINS.index(row["domain"]))


def build_suite(specs: Sequence[FamilySpec], *, seed: int, style: Style) -> Suite:
    """Draw the questions of `specs`, without one in common between splits, domains or specs of a family.

    Each (family, domain, split) draws with a seed of its own, far from the others; what two seeds may still
    have in common is removed by comparing normalised texts. Families of files may read one file under two names
    (`gsm8k:chat`, `gsm8k:cot`): they may have questions of one split in common, and none of different splits.
    Equal arguments give equal suites in every process.

    Args:
      specs: families with their ranges and counts.
      seed: of the draw; another seed gives other questions.
      style: `instruct` or `compact`.

    Raises:
      UserError: unknown family or setting, or fewer distinct questions than asked for.

    Example:
      >>> spec = FamilySpec("chain_sum", "id", {"max_terms": 2, "max_digits": 2}, train=4, test=2)
      >>> suite = build_suite([spec], seed=0, style="compact")
      >>> len(suite.questions("train")), suite.verify(suite.all[0], suite.all[0].solution)
      (4, 1.0)
    """
    if style not in STYLES:
        raise UserError(f"tasks: style is {style!r}; choose one of {', '.join(STYLES)}")
    if not specs:
        raise UserError("tasks: no families given; list at least one with domain id")
    tasks: dict[str, Task] = {s.family: task_of(s.family, style) for s in specs}
    taken: dict[str, set[str]] = {s.family: set() for s in specs}
    of_files: dict[Split, set[str]] = {split: set() for split in SPLITS}
    drawn: dict[tuple[int, Split], list[Question]] = {}
    for split in DRAW_ORDER:
        for i, spec in enumerate(specs):
            task, of_file = tasks[spec.family], isinstance(tasks[spec.family], LocalTask | MbppTask)
            elsewhere = set().union(*(of_files[s] for s in SPLITS if s != split)) if of_file else frozenset()
            # Two specs of one family, domain and split differ in their ranges; the ranges keep the seeds apart.
            found = _draw(task, spec, split, seed=seed, taken=taken[spec.family], elsewhere=elsewhere)
            if of_file:
                of_files[split].update(normalise(q.text) for q in found)
            drawn[i, split] = found
    questions = [q for i in range(len(specs)) for split in SPLITS for q in drawn[i, split]]
    ids = Counter(q.id for q in questions)
    twice = [name for name, n in ids.items() if n > 1]
    if twice:  # two texts with one digest: 2^-48 a pair
        raise UserError(f"tasks: two questions share the id {twice[0]}; choose another seed")
    return Suite(style=style, seed=seed, specs=tuple(specs), all=tuple(questions), tasks=tasks)


def task_of(family: str, style: Style) -> Task:
    """The task of a family: one whose answers are programs, one whose questions stand in a file, or a generator's."""
    program = code_task(family, style)
    if program is not None:
        return program
    if family.startswith(PREFIX) and style == "compact":
        return JudgedTask(family)
    task = local_task(family)
    if task is None:
        return TASKS[style](family)
    if style != "instruct":
        raise UserError(f"tasks: family {family} is asked in words; set tasks.style to instruct")
    return task


def draw_seed(seed: int, *parts: object) -> int:
    """Derive a seed in [0, 2^31) from `seed` and what it is for; the same in every process."""
    text = ":".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def _draw(
    task: Task, spec: FamilySpec, split: Split, *, seed: int, taken: set[str], elsewhere: Set[str]
) -> list[Question]:
    wanted = spec.count(split)
    found: list[Question] = []
    if not wanted:
        return found
    allowed = getattr(task, "splits", SPLITS)
    if split not in allowed:
        raise UserError(
            f"tasks: family {spec.family} is for {', '.join(allowed)} only, and {wanted} questions are asked for"
            f" {split}; set {split} to 0"
        )
    ranges = sorted((k, repr(v)) for k, v in spec.args.items())
    start = draw_seed(seed, spec.family, spec.domain, split, ranges)
    useless = 0
    args = args_of(spec.args, split, spec.family) if isinstance(task, LocalTask | MbppTask) else spec.args
    for text, answer, solution, entry in _blocks(task, args, start, limit=200 * wanted + 20_000):
        key = normalise(text)
        if key in taken or key in elsewhere:
            useless += 1
            # a coupon collector of n kinds waits n·(ln n + 3) draws for the last one, nearly surely
            if useless > 20 * (len(taken) + len(elsewhere) + 50):
                break
            continue
        useless = 0
        taken.add(key)
        name = question_id(spec.family, text)
        found.append(Question(name, spec.family, spec.domain, split, text, answer, solution, entry))
        if len(found) == wanted:
            return found
    others = f"; {len(elsewhere)} are in other splits of families of files" if elsewhere else ""
    raise UserError(
        f"tasks: family {spec.family} ({spec.domain}) with {dict(spec.args)} has only {len(found)} distinct"
        f" questions left for {split}, and {wanted} are asked for ({len(taken)} distinct ones seen over all its"
        f" splits{others}); widen its ranges or ask for fewer"
    )


def _blocks(
    task: Task, args: Mapping[str, Any], start: int, *, limit: int, block: int = 1000
) -> Iterator[tuple[str, str, str | None, dict]]:
    """Draw up to `limit` items in blocks: some generators refuse to be opened for many at once."""
    for offset in range(0, limit, block):
        yield from task.draw(args, start + offset, block)
