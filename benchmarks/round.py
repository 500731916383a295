"""A round of self-improvement by phase, of a model with random weights: the whole of `jaxmerge improve`."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Figure, Size
from train.improve import phases, session
from train.improve.run import improve
from train.improve.settings import Improve
from train.models.characters import EOS
from train.resolve import build
from train.tasks import Question, suite
from train.tasks.task import Unjudged

Rows = list[dict[str, Any]]


def improvement(size: Size) -> Iterator[Figure]:
    """Seconds of each phase of one round of IMM, twice: with compiling, and then without."""
    note = "" if importlib.util.find_spec("tensorflow_datasets") else keep_examples_as_lines()
    suite.TASKS["compact"] = Sums
    config = build(Improve, config_of(size))
    with tempfile.TemporaryDirectory() as folder:
        for turn in ("first", "again"):
            out = improve(config, name=turn, out=Path(folder) / turn, quiet=True)
            summary = json.loads((out / "summary.json").read_text())
            for kind, seconds in summary["phase_seconds"].items():
                yield Figure(f"{turn}: {kind}", seconds, "s", note if kind == "select" else "")
            yield Figure(f"{turn}: in all", summary["seconds"], "s", described(size, turn))


def described(size: Size, turn: str) -> str:
    sizes = size.improved
    compiling = "compiling included" if turn == "first" else "the same again in one process"
    return (
        f"{sizes['num_hidden_layers']} layers of width {sizes['hidden_size']}, {size.questions} questions × 4 samples, "
        f"{size.slots} slots; {compiling}"
    )


class Sums:
    """Sums in symbols, `12+7?19`: a task that needs no package and no file."""

    def __init__(self, name: str):
        self.name, self.unjudged = name, Unjudged()

    def draw(self, args: Any, seed: int, size: int) -> Iterator[tuple[str, str, str | None, dict[str, Any]]]:
        for a, b in np.random.default_rng(seed).integers(0, args["below"], (size, 2)).tolist():
            yield f"{a}+{b}?", str(a + b), str(a + b), {}

    def prompt(self, question: Question) -> str:
        return EOS + question.text

    def verify(self, question: Question, text: str) -> float | None:
        return float(text.split(EOS)[0] == question.answer)


def config_of(size: Size) -> dict[str, Any]:
    """One round on sums, in characters; half of the examples are worked solutions, for random weights solve nothing."""
    tested = size.questions // 4
    return {
        "model": {"random": size.improved, "dtype": size.dtype},
        "tasks": {
            "style": "compact",
            "families": [
                {"family": "sums", "domain": "id", "args": {"below": 100}, "train": size.questions, "test": tested},
                {"family": "sums", "domain": "ood", "args": {"below": 1000}, "test": tested},
            ],
        },
        "sampling": {"samples": 4, "temperature": 1.0, "max_new_tokens": 64, "slots": size.slots},
        "selection": {"real_ratio": 0.5},
        "sft": {"learning_rate": 1e-4, "epochs": 1, "batch": max(4, size.questions // 8)},
        "evaluation": {"max_new_tokens": 64, "slots": size.slots},
        "methods": {"imm": {"merge": {"rule": "imm", "alpha": 0.5}}},
    }


def keep_examples_as_lines() -> str:
    """Where tensorflow-datasets is missing: let a round keep its examples as JSON lines; returns what a figure says."""

    def write(data_dir: Path, name: str, version: str, examples: Rows, provenance: Any) -> None:
        folder = Path(data_dir) / name / version
        folder.mkdir(parents=True)
        (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
        (folder / "metadata.json").write_text(json.dumps(provenance))

    def read(data_dir: Path, name: str, version: str) -> tuple[Rows, dict[str, Any]]:
        folder = Path(data_dir) / name / version
        lines = (folder / "examples.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], json.loads((folder / "metadata.json").read_text())

    phases.write_version, session.read_version = write, read
    return "examples as JSON lines, for tensorflow-datasets is not installed"
