"""The verb `sft`: one model, one set of examples, one Hugging Face folder at the end."""

from __future__ import annotations

import dataclasses
import shutil
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..data.hub import pin
from ..log import UserError, format_percent, say
from ..models.characters import PAD_ID
from ..models.hf import save_hf
from ..models.open import Model, load_source, with_date, write_model_files
from ..models.tokenizer import DATE
from ..resolve import build, read_yaml, to_dict
from ..runtime import checkpoint, stop
from ..runtime.folder import check_resumable, check_same_config, content, fingerprint, write_config
from ..runtime.journal import Journal
from ..runtime.mesh import make_mesh
from ..runtime.processes import on_first, several
from ..runtime.sinks import check_sinks, follow
from ..tasks import build_suite, held_out, pretraining_rows
from ..tasks.settings import Tasks
from .batches import Rows, RowSource, steps_of, to_drawn, to_rows
from .beside import BLOCKS
from .card import write_cards
from .checkpoints import SftCheckpoints
from .measure import ModelMeasure
from .pairs import check, good, rows_of
from .picks import Measure, Pick
from .settings import Finetune
from .sft import check_patterns, fine_tune, one_epoch
from .teacher import open_teacher
from .watch import hold_out, speed_of

PHASE = "sft"


def finetune(config: Finetune, *, name: str, out: Path | None = None) -> Path:
    """Train, or resume training; the folder of the run, whose `hf/` is the tuned model."""
    folder = out or Path("runs") / f"{name}-{fingerprint(content(config))}"
    config = pin(config, folder, on_first)
    on_first(check_same_config, folder, config)
    with Journal(folder) as journal:
        if journal.committed(PHASE) is None:
            on_first(check_resumable, folder, config)
        on_first(write_config, folder, config)
        journal.reconcile([PHASE])
        record = journal.committed(PHASE) or train(config, journal, folder, name)
    on_first(shutil.rmtree, folder / "checkpoints" / PHASE, ignore_errors=True)
    on_first(write_cards, folder, name, config.model.path, record, (folder / "config.yaml").read_text())
    say(
        f"{record['steps']} steps, {record['tokens']} {config.sft.objective.counts}, loss {record['loss_first']:.3f} → "
        f"{record['loss_last']:.3f}, {record['seconds']:.0f} s"
    )
    say(str(folder / "hf"))
    return folder


def train(config: Finetune, journal: Journal, folder: Path, name: str) -> dict[str, Any]:
    """Train and commit; the record."""
    check_sinks(config.sft.watch.sinks)
    mesh = make_mesh(config.mesh)
    model = load_source(config.model, mesh, seed=config.seed)
    check_patterns(config.sft, model.params)
    if config.data.chat_template:
        from .sources import with_template

        model = dataclasses.replace(model, tokenizer=with_template(model.tokenizer, config.data.chat_template))
    model = with_date(model, folder)
    teacher = open_teacher(config.sft.distill, model, mesh, seed=config.seed)
    rows, held_out, notes = read_rows(config, model, folder / "data")
    for line in describe_rows(rows, notes):
        say(line)
    partial = journal.folder(PHASE)
    start = time.perf_counter()
    steps, sinks = partial / "steps.jsonl", config.sft.watch.sinks
    about = {
        "folder": folder,
        "name": name,
        "config": to_dict(config),
        "total": config.sft.stay.last(steps_of(rows, config.sft)),
    }
    with follow(steps, sinks, **about) as on_step:
        params, log = fine_tune(
            model.config,
            model.params,
            rows,
            config.sft,
            mesh=mesh,
            seed=config.seed,
            dtype=config.model.dtype,
            held_out=held_out,
            teacher=teacher,
            checkpoints=SftCheckpoints(folder / "checkpoints" / PHASE / "state", blocks=folder / BLOCKS),
            trace_to=folder / "trace",
            adapter_to=folder / "adapter",
            on_step=on_step,
            asked_to_stop=stop.asked,
        )
    on_first(write_model_files, model, folder / "model")
    on_first(shutil.rmtree, folder / "hf", ignore_errors=True)
    save_hf(folder / "hf", model.config, params, tokenizer_from=model.tokenizer)
    return journal.commit(
        PHASE,
        {
            "kind": "sft",
            "seconds": time.perf_counter() - start,
            "steps": len(log),
            **rows.summary(),
            "data": notes,
            "tokens": int(sum(m["targets"] for m in log)),
            "loss_first": log[0]["loss"],
            "loss_last": log[-1]["loss"],
            **speed_of(log),
            "digest": checkpoint.digest(params),
        },
    )


def read_rows(config: Finetune, model: Model, home: Path) -> tuple[RowSource, RowSource | None, list[dict[str, Any]]]:
    """The examples of `config.data` as rows, those held out, and what each source gave.

    Args:
      home: folder where files and suites are kept as TFDS versions.
    """
    data = config.data
    if data.pretraining_tokens:
        excluded: frozenset[str] = frozenset()
        if data.exclude:
            tasks = build(Tasks, read_yaml(Path(data.exclude)).get("tasks", {}), "tasks")
            excluded = held_out(build_suite(tasks.families, seed=tasks.seed, style=tasks.style))
        tokens, mask = pretraining_rows(
            data.ingredients, data.pretraining_tokens, seed=config.seed, excluded=excluded, row=data.row
        )
        (learnt,), held = hold_out([range(len(tokens))], config.sft.watch.held_out, seed=config.seed)
        return text_rows(tokens[learnt], mask[learnt]), text_rows(tokens[held], mask[held]) if held else None, []
    # Imported here: TFDS takes seconds, and text made on the spot does not need it.
    from .sources import load_sources

    def read():
        return load_sources(data, model.tokenizer, home=home, seed=config.seed, date_string=DATE)

    if several():
        on_first(lambda: read() and None)  # it writes the TFDS versions that all then read
    examples, notes = read()
    measure = ModelMeasure(lambda: model, list(chain(*examples)), dtype=config.model.dtype)
    examples = pick(examples, notes, data.pick, measure)
    pad = model.tokenizer.pad_id or 0
    # The samples of a run may have several solutions of a question.
    examples, held = hold_out(
        examples, config.sft.watch.held_out, seed=config.seed, question=lambda e: e.get("question_id")
    )
    unseen = to_rows(good(held), one_epoch(config.sft), pad, seed=config.seed) if held else None
    rates = [part.rate for part in data.sources if part.rate is not None]
    stages = [part.stages for part in data.sources if part.stages]
    grouped = config.sft.objective.learns in ("pairs", "labels")
    if grouped and (rates or stages or data.draws is not None):
        raise UserError(
            f"data: rates, stages and draws mix single answers, and {config.sft.objective.name} compares them; leave "
            "them out"
        )
    if grouped or (len(examples) == 1 and data.draws is None and not stages):
        return rows_of(list(chain(*examples)), config.sft, pad, seed=config.seed), unseen, notes
    for found in examples:
        check(found, config.sft.objective.learns, config.sft.objective.name)
    rows = to_drawn(examples, config.sft, pad, rates=rates, draws=data.draws, stages=stages, seed=config.seed)
    return rows, unseen, notes


def pick(
    sources: list[list[dict[str, Any]]], notes: list[dict[str, Any]], way: Pick, measure: Measure
) -> list[list[dict[str, Any]]]:
    """The examples of each source that are picked of all, noted with each source."""
    chosen, first = set(way.choose(list(chain(*sources)), measure)), 0
    picked = []
    for examples, note in zip(sources, notes, strict=True):
        picked.append([e for i, e in enumerate(examples, start=first) if i in chosen])
        first += len(examples)
        if len(picked[-1]) < len(examples):
            note["picked"] = len(picked[-1])
        if not picked[-1]:
            raise UserError(
                f"data.pick: none of the {len(examples)} examples of {note['source']} is picked; raise its keys"
            )
    return picked


def text_rows(tokens: np.ndarray, learnt: np.ndarray) -> Rows:
    """Rows of plain text, of which the tokens of `learnt` are learnt."""
    return Rows(tokens.astype(np.int32), learnt.astype(np.float32), lengths=(tokens != PAD_ID).sum(axis=1))


def describe_rows(rows: RowSource, notes: list[dict[str, Any]]) -> list[str]:
    """What is learnt from, for the person watching: sources, how full the rows are, what was left out or cut."""
    lines = [
        f"{note['source']}: {note['examples']:,} examples, {note['tokens']:,} tokens"
        + ("" if note["rate"] is None else f", rate {note['rate']:g}")
        + (f", {note['picked']:,} examples picked" if "picked" in note else "")
        for note in notes
    ]
    found = rows.summary()
    line = (
        f"{found['examples']:,} examples an epoch in {found['rows']:,} rows, {format_percent(found['efficiency'])} full"
    )
    if "unpacked" in found and found["examples"] != found["rows"]:
        line += f" ({format_percent(found['unpacked'])} unpacked)"
    if found["dropped"] or found["truncated"]:
        line += f"; longer than sft.max_length: {found['dropped']} dropped, {found['truncated']} cut"
    return [*lines, line]
