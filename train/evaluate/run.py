"""`jaxmerge evaluate`: accuracy of a model on the questions of a file (`examine`) or of a config (`evaluate_model`)."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..generate.settings import Settings
from ..generate.together import compose
from ..log import UserError, format_percent, progress, say
from ..models.open import Model, open_model
from ..report.rows import print_table
from ..runtime.jsonl import Row
from ..runtime.mesh import make_mesh
from ..runtime.settings import Mesh
from ..tasks import STOP_STRINGS, FamilySpec, Question, Suite, build_suite
from ..tasks.cot import STOP
from ..tasks.local import LOCAL, TASK_OF
from ..tasks.settings import Tasks
from ..tasks.suite import task_of
from . import accuracy, choices
from .answer import ask, is_right, lengths, tell_pass_rates
from .rerank import drawn
from .settings import Evaluation, QuestionOptions

PROGRAMS = ("mbpp", "humaneval")
"""Tasks whose answers are run (docs/code.md)."""


def opened(model: Model | str, mesh: Mesh) -> tuple[Model, str]:
    """A model from what names it, or as it is in memory, and what it is called."""
    if isinstance(model, str):
        return open_model(model, make_mesh(mesh)), model
    return model, getattr(model, "path", None) or "model"


def examine(path: Model | str, source: Path, options: QuestionOptions) -> dict[str, Any]:
    """Ask a model every question of `source`; print the accuracy, return it with every answer.

    Multiple choice is also scored by likelihood (acc, acc_norm), which needs no chat template.
    """
    suite = open_suite(source, options)
    questions = list(suite.all)
    model, name = opened(path, options.mesh)
    model = compose(model, options.decode)
    family = suite.specs[0].family
    asked = family != "choice" or model.tokenizer.has_chat_template
    if family != "choice" and not asked_plainly(options, family) and not model.tokenizer.has_chat_template:
        way = "prompt=cot" if family == "gsm8k" else "a model with one"
        raise UserError(f"{name}: this model has no chat template to ask {family} questions with; take {way}")
    result: dict[str, Any] = {"name": name, "finished": True, "rows": [], "paired": []}
    result["majority"] = [] if family in PROGRAMS else suite.majority_baselines()
    if asked:
        result |= answer(model, suite, questions, options, name=Path(name).name)
        print_table(result)
        if options.samples:
            more = dataclasses.replace(
                settings_of(options, family), samples=options.samples, temperature=options.temperature
            )
            result["pass_at"] = pass_at(model, suite, questions, more, seed=options.seed)
        if failures := suite.describe_unjudged():
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
    """The questions of a file, of the folder of a TFDS version or of a dataset on the hub, each once."""
    from ..data.formats import detect
    from ..data.hub import is_hub, one_split
    from ..data.rows import is_rows, read_rows

    family = options.task
    if str(source) == "humaneval":
        if family is not None:
            raise UserError(f"task={family}: humaneval is a task of its own; leave task= out")
        family = "humaneval"
    if family is None:
        if not is_rows(source):
            raise UserError(f"{source}: a TFDS version does not say how answers are judged; set task=")
        lines = read_rows(source, options.split)
        form = detect(lines[0][1]) if lines else ""
        if form not in TASK_OF:
            raise UserError(
                f"{source}: lines of the format {form or '(none)'} cannot be asked; wanted {', '.join(TASK_OF)}"
            )
        family = TASK_OF[form]
    if family != "gsm8k" and (options.prompt, options.extract) != ("chat", "flexible"):
        raise UserError(f"prompt= and extract= are of gsm8k questions; these are judged as {family}: leave them out")
    split = {"split": one_split(source, options.split) if is_hub(source) else options.split}
    if family in PROGRAMS:
        args = {} if family == "humaneval" else {"path": str(source), **split}
        task = task_of(family, "instruct")
    else:
        settings = {key: getattr(options, key) for key in LOCAL[family].settings}
        args = {"path": str(source), **split, **settings}
        task = LOCAL[family](family)
    count = len({text for text, *_ in task.draw(args, 0, 0)})
    count = min(count, options.limit or count)
    return build_suite([FamilySpec(family, "id", args, test=count)], seed=0, style="instruct")


def answer(
    model: Model, suite: Suite, questions: list[Question], options: QuestionOptions, *, name: str
) -> dict[str, Any]:
    """Greedy answers to every question: rows of accuracy, and the answers with their scores."""
    settings = settings_of(options, suite.specs[0].family)
    rows, scored = answer_once(model, suite, questions, settings, seed=options.seed, name=name)
    answers = [{key: row[key] for key in ("question_id", "text", "reason", "score")} for row in scored]
    return {"rows": rows, "answers": answers, "unfinished": sum(row["reason"] == "length" for row in scored)}


def answer_once(
    model: Model, suite: Suite, questions: list[Question], settings: Settings, *, seed: int, name: str, shots: int = 0
) -> tuple[list[Row], list[Row]]:
    """Answer every question once: rows of accuracy under `name`, and the answers with their scores."""
    start, key = time.perf_counter(), jax.random.key(seed)
    scored = ask(model, suite, questions, settings, key, shots=shots, title="evaluate", unit="questions").rows
    seconds = time.perf_counter() - start
    about = {"method": name, "number": 0, "seconds": seconds, "lengths": lengths(scored)}
    return accuracy.rows(questions, is_right(scored), **about), scored


def pass_at(
    model: Model, suite: Suite, questions: list[Question], settings: Settings, *, seed: int, shots: int = 0
) -> list[Row]:
    """Draw `settings.samples` samples of each question; pass@k, maj@k and rank@k of each family, said and returned."""
    key = jax.random.fold_in(jax.random.key(seed), np.uint32(accuracy.SAMPLED))
    rows = ask(model, suite, questions, settings, key, shots=shots, title="sample for pass@k").rows
    return tell_pass_rates(questions, drawn(suite, questions, rows), settings.samples)


def settings_of(options: QuestionOptions, family: str) -> Settings:
    """Greedy decoding."""
    stop = (STOP,) if asked_plainly(options, family) else ()
    return Settings(
        max_new_tokens=options.max_new_tokens, slots=options.slots, dtype=options.dtype, stop=stop,
        gather=options.mesh.gather_to_decode,
    )  # fmt: skip


def evaluate_model(
    path: Model | str, tasks: Tasks, evaluation: Evaluation, *, mesh: Mesh, dtype: str, seed: int
) -> dict[str, Any]:
    """Rows of accuracy of a model on the questions of `tasks`; printed as a table.

    Args:
      path: anything that `open_model` reads, or a model.
      mesh: where it is decoded. dtype: operands of its products. seed: of the samples for pass@k.
    """
    suite = build_suite(tasks.families, seed=tasks.seed, style=tasks.style)
    questions = [q for split in evaluation.splits for q in suite.questions(split)]
    if not questions:
        raise UserError(f"evaluation.splits={list(evaluation.splits)}: no family has such questions")
    model, name = opened(path, mesh)
    shots = tasks.few_shot
    stop = evaluation.stop + (STOP_STRINGS if shots else ())
    settings = evaluation.settings(dtype=dtype, gather=mesh.gather_to_decode, stop=stop)
    rows, _ = answer_once(model, suite, questions, settings, seed=seed, name=Path(name).name, shots=shots)
    result = {"name": name, "finished": True, "rows": rows, "paired": [], "majority": suite.majority_baselines()}
    print_table(result)
    if evaluation.samples:
        sampled = evaluation.sampling(settings)
        result["pass_at"] = pass_at(model, suite, questions, sampled, seed=seed, shots=shots)
    return result
