"""The metrics of rounds, for TensorBoard and W&B: what each method measured and how it was trained, over the rounds.

They are read from committed records, so a run that is gone on with has the same points as one that was never stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..evaluate.rerank import AT_K
from ..report.rows import pooled_rows
from ..resolve import to_dict
from ..runtime.journal import Record
from ..runtime.sinks import open_sinks
from .plan import Outcome
from .session import Session

TRAINED = ("steps", "loss_first", "loss_last", "held_out_loss", "tokens_per_second", "mfu")
"""Of a fine-tuning phase's record."""
POLICY = ("steps", "reward_first", "reward_last", "samples_per_second")
"""Of the record of a phase that learns from fresh samples."""


@contextlib.contextmanager
def follow_rounds(session: Session) -> Iterator[Callable[[], None]]:
    """Yield what a run calls after a phase: it sends the metrics of models that are evaluated now to the sinks.

    The sinks are those of `sft.watch.sinks`; of `step` is the place of an outcome among those of the run, `round` is
    what the curves are drawn over.
    """
    ordered = in_order(session)
    names = session.config.sft.watch.sinks
    if not names:
        yield lambda: None
        return
    about = {"folder": session.journal.root, "name": "rounds", "config": to_dict(session.config), "axis": "round"}
    sent = 0
    with open_sinks(None, names, **about) as write:

        def send() -> None:
            nonlocal sent
            while sent < len(ordered) and session.journal.committed(ordered[sent].evaluate) is not None:
                write({"step": sent, **round_metrics(session, ordered[sent])})
                sent += 1

        send()
        yield send


def in_order(session: Session) -> list[Outcome]:
    """The models of a run in the order in which they are evaluated, without the points of a line between two."""
    places = {phase.name: i for i, phase in enumerate(session.todo.phases)}
    return sorted((o for o in session.outcomes if not o.extra), key=lambda o: places[o.evaluate])


def round_metrics(session: Session, outcome: Outcome) -> dict[str, float]:
    """{round, METHOD/accuracy/DOMAIN with its interval, METHOD/pass@K/DOMAIN, METHOD/loss_last, …} of a model."""
    record = session.journal.committed(outcome.evaluate) or {}
    found = accuracies(record)
    for phase in session.todo.phases:
        made = session.journal.committed(phase.name)
        took_part = outcome.method in (phase.method, *phase.shared_by)
        if made is not None and phase.round == outcome.round and took_part:
            found |= training(phase.kind, made)
    named = {f"{outcome.method}/{key}": float(value) for key, value in found.items() if value is not None}
    return {"round": outcome.round, **named}


def accuracies(record: Record) -> dict[str, Any]:
    """Of each domain: accuracy with its 95 % interval, tokens of an answer, and pass@k, maj@k, rank@k if drawn."""
    found: dict[str, Any] = {}
    for row in pooled_rows(record.get("rows", ())):
        domain = row["domain"]
        found |= {f"accuracy/{domain}": row["accuracy"], f"answer_tokens/{domain}": row.get("tokens")}
        found |= {f"accuracy_{end}/{domain}": row.get(end) for end in ("low", "high")}
        for name in AT_K:
            found |= {f"{name}@{k}/{domain}": value for k, value in row.get(f"{name}_at", {}).items()}
    return found


def training(kind: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """How a phase of the round went: losses and speed of fine-tuning, the share of samples that were right."""
    if kind == "sft":
        # Of a phase that was gone on with, only the seconds since then are known.
        whole = record["seconds"] and not record.get("resumed")
        speed = {"steps_per_second": record["steps"] / record["seconds"]} if whole else {}
        return {key: record[key] for key in TRAINED if key in record} | speed
    if kind == "policy":
        return {key: record[key] for key in POLICY}
    if kind == "select" and record["sampled"]:
        return {"samples_right": record["correct"] / record["sampled"]}
    if kind == "sample" and record.get("tokens_per_second"):
        return {"sampled_tokens_per_second": record["tokens_per_second"]}
    return {}
