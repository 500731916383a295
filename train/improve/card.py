"""The model card of an exported model: what it was trained from, by which method, and what the run measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmerge.files import model_card
from jaxmerge.files.model_card import Card, origin

from ..log import format_percent
from ..report.rows import DOMAIN_NAMES, format_interval, pooled_rows

Rows = Sequence[Mapping[str, Any]]


def exported_card(out: Path, path: str) -> Card:
    """The card of a model that `export` wrote again as it was."""
    made_of = origin(path)
    file = gguf_file(out)
    return Card(
        title=out.name,
        summary=f"{made_of.name}, written as {'a GGUF file' if file else 'a Hugging Face folder'} by jaxmerge.",
        usage=model_card.gguf_usage(file.name, out.name) if file else model_card.usage(out, out.name),
        ingredients=[made_of],
        tags=("gguf",) if file else (),
        relation="quantized" if file else "finetune",
        library="gguf" if file else "transformers",
    )


def gguf_file(out: Path) -> Path | None:
    """The GGUF file of an exported folder, if it is one of GGUF."""
    return next(iter(sorted(out.glob("*.gguf"))), None)


def run_card(out: Path, path: str, *, method: str, round: int, settings: str, rows: Rows, base: Rows) -> Card:
    """The card of a model of a run.

    Args:
      out: the exported folder.
      path: the model that the run began with, "" if with random weights.
      method, round: which model of the run it is.
      settings: the run's own, in YAML.
      rows: accuracies of this model.
      base: accuracies of the model that the run began with.
    """
    made_of, file = origin(path), gguf_file(out)
    return Card(
        title=out.name,
        summary=f"{made_of.name} after round {round} of the method `{method}` of a self-improvement run by jaxmerge.",
        usage=model_card.gguf_usage(file.name, out.name) if file else model_card.usage(out, out.name),
        ingredients=[made_of],
        sections={
            "Accuracies": accuracies(rows, base),
            "Settings of the run": model_card.folded("config.yaml", settings),
        },
        tags=("self-improvement", *(("gguf",) if file else ())),
        library="gguf" if file else "transformers",
    )


def accuracies(rows: Rows, base: Rows) -> str:
    """Return a table of accuracies, beside those of the base; nothing if none were measured."""
    before = {row["domain"]: row for row in pooled(base)}
    lines = [
        (
            DOMAIN_NAMES.get(row["domain"], row["domain"]),
            format_percent(row["accuracy"]),
            format_interval(row),
            row["n"],
            format_percent(before.get(row["domain"], {}).get("accuracy")),
        )
        for row in pooled(rows)
    ]
    return model_card.table(("domain", "accuracy", "95 % interval", "n", "before"), lines) if lines else ""


def pooled(rows: Rows) -> list[dict[str, Any]]:
    """The rows over all families, of one model."""
    return pooled_rows([{**row, "method": "", "round": 0} for row in rows])
