"""`improve`, `finetune` and `evaluate` with the keys of their configs as arguments.

Each makes the settings that the command makes of a config and calls the same program with them, so that a run
begun here goes on from the command and the other way round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluate.run import evaluate_model, examine
from ..evaluate.settings import Evaluation, QuestionOptions, is_questions
from ..improve.export import find_outcome
from ..improve.run import improve as run_rounds
from ..improve.settings import Improve
from ..learn.run import finetune as train
from ..learn.settings import Finetune
from ..log import UserError, set_quiet
from ..report.rows import pooled_rows
from ..resolve import build, place_of, read_yaml, to_dict
from ..runtime.disk import write_durably
from ..runtime.settings import Mesh
from ..runtime.start import start_jax
from ..runtime.stop import Stopped, interruptible
from ..tasks.settings import Tasks
from .model import Model

Named = str | os.PathLike[str]
Config = Named | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run of self-improvement, read from its folder."""

    path: Path

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: every accuracy with its interval, the paired differences, seconds, versions."""
        return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """A row for each method, round and domain: method, round, domain, accuracy, low, high, n; for a data frame."""
        return pooled_rows(self.summary["rows"])

    @property
    def report(self) -> Path:
        """The page report.html; in a notebook `IPython.display.IFrame(run.report, 900, 600)` shows it."""
        return self.path / "report.html"

    def model(self, method: str, round: int | None = None) -> Model:
        """Load the model that a method ended a round with, by default its last; `base` is the one it began with."""
        start_jax()
        found = find_outcome(self.path, method, round)
        loaded = found.model()
        return Model(loaded.config, loaded.params, loaded.tokenizer)


def improve(config: Config | None = None, /, *, out: Named | None = None, quiet: bool = False, **keys: Any) -> Run:
    """Let a model improve itself for some rounds; a call with the same keys goes on with the run that it began.

    Args:
      config: the path or name of a config, or its contents as a dictionary, which `keys` are put into.
      out: the folder of the run; by default one in `runs/`, named after the keys.
      quiet: print nothing.
      keys: the keys of `jaxmerge improve` (docs/config.md): model, tasks, methods, rounds, sampling, sft, ….
        `model` may be a path or a `Model` that has one, `tasks` a list of families. A key replaces the block of its
        name; a name with dots, as in `**{"sft.epochs": 3}`, replaces one key of a block.

    Returns:
      The run: `summary`, `rounds`, `report`, `path`, and `model(method)`.

    Raises:
      UserError: a key is not known or does not fit; names it.
      KeyboardInterrupt: stopped by the user, and saved; the same call goes on.

    Example:
      >>> run = improve(  # doctest: +SKIP
      ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
      ...     tasks=[{"family": "chain_sum", "domain": "id", "train": 128, "test": 64}],
      ...     methods={"plain": {}, "imm": {"merge": {"rule": "imm", "alpha": 0.5}}},
      ...     rounds=2,
      ... )
    """
    values, name = gathered(config, keys, name="improve")
    if "sweep" in values:
        raise UserError("sweep: an experiment is many runs; begin it with `jaxmerge improve CONFIG`")
    settings = build(Improve, values)
    with program(settings, quiet=quiet, resumes=True):
        folder = run_rounds(settings, name=name, out=None if out is None else Path(out), quiet=quiet)
    return Run(folder)


def finetune(
    model: Named | Model | Mapping[str, Any],
    data: Named | Sequence[Mapping[str, Any]] | Mapping[str, Any],
    *,
    out: Named | None = None,
    quiet: bool = False,
    **keys: Any,
) -> Model:
    """Fine-tune a model on examples; a call with the same arguments goes on with the run that it began.

    Args:
      model: a path as of `Model.load`, a `Model` that has one, or the `model` block of a config.
      data: a file of JSON lines or the folder of a TFDS version; a list of examples (messages, prompt and completion,
        …: docs/data.md), which is written beside the run's folder; or the `data` block of a config.
      out: the folder of the run; by default one in `runs/`.
      quiet: print nothing.
      keys: the other keys of `jaxmerge sft`: sft, mesh, seed.

    Returns:
      The tuned model. Its path is the Hugging Face folder in the run's folder, beside which the metrics are.

    Example:
      >>> tuned = finetune(base, [{"prompt": "2+2?", "completion": "4"}], sft={"epochs": 3})  # doctest: +SKIP
    """
    if not isinstance(data, str | os.PathLike | Mapping):
        data = write_examples(data, Path("runs") if out is None else Path(out).parent)
    block = dict(data) if isinstance(data, Mapping) else {"path": os.fspath(data)}
    values, _ = gathered({"model": model, "data": block}, keys, name="finetune")
    settings = build(Finetune, values)
    with program(settings, quiet=quiet, resumes=True):
        name = "finetune" if out is None else Path(out).name
        folder = train(settings, name=name, out=None if out is None else Path(out))
    return Model.load(folder / "hf")


def evaluate(
    model: Named | Model, questions: Config | Sequence[Mapping[str, Any]], *, quiet: bool = False, **keys: Any
) -> dict[str, Any]:
    """Measure how many questions a model answers right.

    Args:
      model: a path as of `Model.load`, or a `Model`.
      questions: a file of JSON lines, the folder of a TFDS version or the word `humaneval`; the path or name of a
        config of `improve`, whose tasks are asked; a `tasks` block, or its list of families.
      quiet: print nothing.
      keys: for a file those of `jaxmerge evaluate MODEL FILE` (limit, max_new_tokens, samples, …); for tasks those of
        the `evaluation` block, and seed, dtype and mesh.

    Returns:
      `rows`, one for each family and domain with accuracy, low, high and n; for a file also `answers`.

    Example:
      >>> evaluate(model, "gsm8k-test.jsonl", limit=100)["rows"][0]["accuracy"]  # doctest: +SKIP
      0.31
    """
    asked = model if isinstance(model, Model) else os.fspath(model)
    if isinstance(questions, str | os.PathLike) and is_questions(os.fspath(questions)):
        options = build(QuestionOptions, plain(keys), "evaluate")
        with program(options, quiet=quiet):
            return examine(asked, Path(questions), options)
    if isinstance(questions, str | os.PathLike):
        values = read_yaml(Path(questions))
    else:
        values = {"tasks": families_of(plain(questions))}
    block = {**values.get("evaluation", {}), **plain(keys)}
    own = {key: block.pop(key, values.get(key)) for key in ("seed", "dtype", "mesh")}
    source = values.get("model") or {}
    mesh = build(Mesh, own["mesh"] or {}, "mesh")
    go = functools.partial(
        evaluate_model,
        asked,
        build(Tasks, values.get("tasks", {}), "tasks"),
        build(Evaluation, block, "evaluation"),
        mesh=mesh,
        dtype=own["dtype"] or source.get("dtype", "float32"),
        seed=own["seed"] or 0,
    )
    with program(None, quiet=quiet):
        return go()


# --- from arguments to settings ----------------------------------------------------------------------------


def gathered(config: Config | None, keys: Mapping[str, Any], *, name: str) -> tuple[dict[str, Any], str]:
    """What a config and keys say together, as the plain data of a config, and what the run is called."""
    if isinstance(config, str | os.PathLike):
        values, name = read_yaml(Path(config)), Path(config).stem
    else:
        values = dict(plain(config or {}))
    for key, value in keys.items():
        place_of(values, key, key)[key.rpartition(".")[2]] = plain(value)
    if "tasks" in values:
        values["tasks"] = families_of(values["tasks"])
    if isinstance(values.get("model"), str):
        values["model"] = {"path": values["model"]}
    return values, name


def families_of(tasks: Any) -> Any:
    """A `tasks` block; a list is its families."""
    return {"families": tasks} if isinstance(tasks, list) else tasks


def plain(value: Any) -> Any:
    """Plain data: dictionaries, lists, texts and numbers; a model or a path becomes the text that names it."""
    if isinstance(value, Model):
        if value.path is None:
            raise UserError("the model is in memory alone; write it with model.save(FOLDER) and give what that returns")
        return value.path
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return to_dict(value)


def write_examples(examples: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write examples as JSON lines under a name made of their contents: the same examples are the same file."""
    text = "".join(json.dumps(plain(example), ensure_ascii=False) + "\n" for example in examples)
    if not text:
        raise UserError("data is an empty list; give examples")
    path = folder / f"data-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    if not path.exists():
        write_durably(path, text)
    return path


@contextlib.contextmanager
def program(settings: Any, *, quiet: bool, resumes: bool = False) -> Iterator[None]:
    """Run a program as the command does: jax made ready; one that resumes is interrupted at its next safe point."""
    before = set_quiet(True) if quiet else None
    try:
        with interruptible():
            start_jax(settings, may_stop=resumes)
            yield
    except Stopped:
        raise KeyboardInterrupt("stopped as asked, and saved; the same call goes on from here") from None
    finally:
        if before is not None:
            set_quiet(before)
