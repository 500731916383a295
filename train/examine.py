"""`jaxmerge evaluate MODEL FILE`: accuracy of a model on the questions of one file, without a config."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from . import choices
from .answer import ask, successes, tell_pass_rates
from .generate.rollout import Settings
from .log import UserError, format_percent, progress, say
from .models.open import Model, open_model
from .report.rows import print_table
from .resolve import at_least
from .runtime.jsonl import numbered_jsonl
from .runtime.mesh import make_mesh
from .runtime.settings import Distributed, Mesh
from .tasks import FamilySpec, Question, Suite, build_suite
from .tasks.cot import STOP
from .tasks.local import LOCAL
from .tasks.suite import task_of

TASK_OF = {"gsm8k": "gsm8k", "choices": "choice", "problem": "problem", "mbpp": "mbpp"}
PROGRAMS = ("mbpp", "humaneval")
"""Tasks whose answers are run (docs/code.md)."""


@dataclasses.dataclass(frozen=True)
class QuestionOptions:
    """Keys of `jaxmerge evaluate MODEL FILE.jsonl`."""

    task: Literal["gsm8k", "choice", "problem", "mbpp"] | None = None
    """How answers are judged; null tells it by the keys of the lines."""
    limit: int | None = None
    """Questions, from the beginning of the file; null takes all."""
    prompt: Literal["chat", "cot"] = "chat"
    """gsm8k: in words through the chat template, or after the eight worked examples of Wei et al."""
    extract: Literal["flexible", "strict"] = "flexible"
    """gsm8k: the last number, or the one after `####` or `The answer is`."""
    split: str = "train"
    """Of a TFDS version in place of a file."""
    samples: int = 0
    """Samples a question beside the greedy answer, for pass@k with k up to this."""
    temperature: float = 0.8
    """Of these samples."""
    seed: int = 0
    max_new_tokens: int = 512
    slots: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)

    def __post_init__(self):
        at_least(self, "evaluate", max_new_tokens=1, slots=1, samples=0, temperature=1e-6)
        if self.limit is not None:
            at_least(self, "evaluate", limit=1)


def examine(path: str, source: Path, options: QuestionOptions) -> dict[str, Any]:
    """Ask a model every question of `source`; print the accuracy, return it with every answer.

    Multiple choice is also scored by likelihood (acc, acc_norm), which needs no chat template.
    """
    suite = open_suite(source, options)
    questions = list(suite.all)
    model = open_model(path, make_mesh(options.mesh))
    family = suite.specs[0].family
    asked = family != "choice" or model.tokenizer.has_chat_template
    if family != "choice" and not asked_plainly(options, family) and not model.tokenizer.has_chat_template:
        way = "prompt=cot" if family == "gsm8k" else "a model with one"
        raise UserError(f"{path}: this model has no chat template to ask {family} questions with; take {way}")
    result: dict[str, Any] = {"name": path, "finished": True, "rows": [], "paired": []}
    result["majority"] = [] if family in PROGRAMS else suite.majority_baselines()
    if asked:
        result |= answer(model, suite, questions, options, name=Path(path).name)
        print_table(result)
        if options.samples:
            more = dataclasses.replace(
                settings_of(options, family), samples=options.samples, temperature=options.temperature
            )
            right = successes(model, suite, questions, more, seed=options.seed)
            result["pass_at"] = tell_pass_rates(questions, right, options.samples)
        if failures := suite.unjudged():
            say(f"could not be judged, and so counted as wrong: {failures}")
    if family == "choice":
        with progress("score", total=sum(len(q.entry["choices"]) for q in questions), unit="choices") as bar:
            result["scored"] = choices.choose(model, questions, dtype=options.dtype, on_batch=bar.advance)
        result["likelihood"] = choices.summary(result["scored"])
        for name, row in result["likelihood"].items():
            low, high = format_percent(row["low"]), format_percent(row["high"])
            say(f"{name} {format_percent(row['accuracy'])} [{low}, {high}], n = {row['n']}")
    for row in result["majority"]:
        say(f"always answering {row['answer']!r} would give {format_percent(row['accuracy'])}")
    return result


def asked_plainly(options: QuestionOptions, family: str) -> bool:
    return family == "gsm8k" and options.prompt == "cot"


def open_suite(source: Path, options: QuestionOptions) -> Suite:
    """The questions of a file or of the folder of a TFDS version, each once."""
    from .data.formats import detect

    family = options.task
    if str(source) == "humaneval":
        if family is not None:
            raise UserError(f"task={family}: humaneval is a task of its own; leave task= out")
        family = "humaneval"
    if family is None:
        if source.is_dir():
            raise UserError(f"{source}: a TFDS version does not say how answers are judged; set task=")
        lines = numbered_jsonl(source)
        form = detect(lines[0][1]) if lines else ""
        if form not in TASK_OF:
            raise UserError(
                f"{source}: lines of the format {form or '(none)'} cannot be asked; wanted {', '.join(TASK_OF)}"
            )
        family = TASK_OF[form]
    if family != "gsm8k" and (options.prompt, options.extract) != ("chat", "flexible"):
        raise UserError(f"prompt= and extract= are of gsm8k questions; these are judged as {family}: leave them out")
    if family in PROGRAMS:
        args = {} if family == "humaneval" else {"path": str(source)}
        task = task_of(family, "instruct")
    else:
        settings = {key: getattr(options, key) for key in LOCAL[family].settings}
        args = {"path": str(source), "split": options.split, **settings}
        task = LOCAL[family](family)
    count = len({text for text, *_ in task.draw(args, 0, 0)})
    count = min(count, options.limit or count)
    return build_suite([FamilySpec(family, "id", args, test=count)], seed=0, style="instruct")


def answer(
    model: Model, suite: Suite, questions: list[Question], options: QuestionOptions, *, name: str
) -> dict[str, Any]:
    """Greedy answers to every question: rows of accuracy, and the answers with their scores."""
    settings = settings_of(options, suite.specs[0].family)
    rows, scored = ask(model, suite, questions, settings, seed=options.seed, name=name)
    return {"rows": rows, "answers": scored, "unfinished": sum(row["reason"] == "length" for row in scored)}


def settings_of(options: QuestionOptions, family: str) -> Settings:
    """Greedy decoding."""
    stop = (STOP,) if asked_plainly(options, family) else ()
    return Settings(
        max_new_tokens=options.max_new_tokens, slots=options.slots, dtype=options.dtype, stop=stop,
        gather=options.mesh.gather_to_decode,
    )  # fmt: skip
