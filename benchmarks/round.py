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
from train.resolve import build

Rows = list[dict[str, Any]]


def improvement(size: Size) -> Iterator[Figure]:
    """Seconds of each phase of one round of IMM, twice: with compiling, and then without."""
    note = "" if importlib.util.find_spec("tensorflow_datasets") else keep_examples_as_lines()
    with tempfile.TemporaryDirectory() as folder:
        config = build(Improve, config_of(size, Path(folder)))
        for turn in ("first", "again"):
            out = improve(config, name=turn, out=Path(folder) / turn, quiet=True)
            summary = json.loads((out / "summary.json").read_text())
            for kind, seconds in summary["phase_seconds"].items():
                yield Figure(f"{turn}: {kind}", seconds, "s", note)
            yield Figure(f"{turn}: in all", summary["seconds"], "s", described(size, turn))


def described(size: Size, turn: str) -> str:
    sizes = size.improved
    compiling = "compiling included" if turn == "first" else "the same again in one process"
    return (
        f"{sizes['num_hidden_layers']} layers of width {sizes['hidden_size']}, {size.questions} questions × 4 samples, "
        f"{size.slots} slots; {compiling}"
    )


def config_of(size: Size, folder: Path) -> dict[str, Any]:
    """One round on sums, in characters; half of the examples are worked solutions, for random weights solve nothing."""
    random = np.random.default_rng(0)
    families, tested = [], size.questions // 4
    # The two for training out of domain are shown as examples, never learnt.
    for domain, digits, learnt in (("id", 20, size.questions), ("ood", 99, 2)):
        counts = {"train": learnt, "test": tested}
        path = folder / f"{domain}.jsonl"
        count = sum(counts.values())
        rows = [(i // digits, i % digits) for i in random.permutation(digits * digits)[:count].tolist()]
        path.write_text("".join(
            json.dumps({"question": f"{a}+{b}", "answer": f"{a}+{b}={a + b}\n#### {a + b}"}) + "\n" for a, b in rows
        ))  # fmt: skip
        families.append({"family": f"gsm8k:{domain}", "domain": domain, "args": {"path": str(path)}, **counts})
    return {
        "model": {"random": size.improved, "dtype": size.dtype},
        "tasks": {"few_shot": 2, "families": families},
        "sampling": {"samples": 4, "temperature": 1.0, "max_new_tokens": 32, "slots": size.slots},
        "selection": {"real_ratio": 0.5},
        "sft": {"learning_rate": 1e-4, "epochs": 1, "batch": max(4, size.questions // 8)},
        "evaluation": {"max_new_tokens": 32, "slots": size.slots},
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
