"""The verb `sft`: one model, one set of examples, one Hugging Face folder at the end."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from . import checkpoint, export
from .config import Finetune, Improve
from .improve import check_same_config
from .journal import Journal, write_durably
from .learn.batches import Rows, steps_of, to_rows
from .learn.dataset import read_jsonl, write_jsonl
from .learn.sft import fine_tune
from .log import UserError, progress, say
from .mesh import make_mesh
from .models.hf import save_hf
from .models.load import Model
from .models.source import load_source
from .resolve import fingerprint, load, to_dict
from .tasks import PAD_ID, build_suite, held_out, pretraining_rows

PHASE = "sft"


def finetune(config: Finetune, *, name: str, out: Path | None = None) -> Path:
    """Train, or resume training; the folder of the run, whose `hf/` is the tuned model."""
    folder = out or Path("runs") / f"{name}-{fingerprint(config)}"
    check_same_config(folder, config)
    with Journal(folder) as journal:
        write_durably(folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
        journal.reconcile([PHASE])
        record = journal.committed(PHASE) or train(config, journal, folder, name)
    shutil.rmtree(folder / "checkpoints" / PHASE, ignore_errors=True)
    say(
        f"{record['steps']} steps, {record['tokens']} tokens, loss {record['loss_first']:.3f} → "
        f"{record['loss_last']:.3f}, {record['seconds']:.0f} s"
    )
    say(str(folder / "hf"))
    return folder


def train(config: Finetune, journal: Journal, folder: Path, name: str) -> dict[str, Any]:
    """Train and commit; the record."""
    mesh = make_mesh(config.mesh)
    model = load_source(config.model, mesh, seed=config.seed)
    rows = read_rows(config, model)
    partial = journal.folder(PHASE)
    start = time.perf_counter()
    with progress(name, total=steps_of(rows, config.sft), unit="steps") as bar:
        params, log = fine_tune(
            model.config,
            model.params,
            rows,
            config.sft,
            mesh=mesh,
            seed=config.seed,
            dtype=config.model.dtype,
            checkpoints=checkpoint.SftCheckpoints(folder / "checkpoints" / PHASE / "state"),
            on_step=lambda m: bar.advance(1, note=f"loss {m['loss']:.3f}"),
        )
    write_jsonl(partial / "steps.jsonl", log)
    export.describe(model, folder / "model")
    shutil.rmtree(folder / "hf", ignore_errors=True)
    save_hf(folder / "hf", model.config, params, tokenizer_from=model.tokenizer)
    return journal.commit(
        PHASE,
        {
            "kind": "sft",
            "seconds": time.perf_counter() - start,
            "steps": len(log),
            "examples": len(rows.tokens),
            "dropped": rows.dropped,
            "tokens": int(sum(m["targets"] for m in log)),
            "loss_first": log[0]["loss"],
            "loss_last": log[-1]["loss"],
            "digest": checkpoint.digest(params),
        },
    )


def read_rows(config: Finetune, model: Model) -> Rows:
    """The examples of `config.data` as arrays."""
    data = config.data
    if data.pretraining_tokens:
        excluded: frozenset[str] = frozenset()
        if data.exclude:
            tasks = load(Improve, data.exclude).tasks
            excluded = held_out(build_suite(tasks.families, seed=tasks.seed, style=tasks.style))
        tokens = pretraining_rows(
            data.ingredients, data.pretraining_tokens, seed=config.seed, excluded=excluded, row=data.row
        ).astype(np.int32)
        return Rows(tokens, (tokens != PAD_ID).astype(np.float32))
    examples = [to_example(model, line, f"{data.path} line {i}") for i, line in enumerate(read_jsonl(data.path), 1)]
    return to_rows(examples, config.sft, model.tokenizer.pad_id or 0)


def to_example(model: Model, line: dict[str, Any], where: str) -> dict[str, Any]:
    """Tokens of a line; what is learnt is the completion, or the last message, and the end after it."""
    tokenizer = model.tokenizer
    if "messages" in line:
        if not isinstance(line["messages"], list) or len(line["messages"]) < 2:
            raise UserError(f"{where}: messages must be a list of two or more; the last is learnt")
        *context, last = line["messages"]
        prompt, completion, rendered = tokenizer.chat(context), last["content"], True
    elif "prompt" in line and "completion" in line:
        prompt, completion, rendered = line["prompt"], line["completion"], False
    else:
        raise UserError(f"{where}: found the keys {sorted(line)}; wanted prompt and completion, or messages")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise UserError(f"{where}: prompt and completion must be texts")
    head = tokenizer.encode(prompt, special=not rendered)
    return {"tokens": head + tokenizer.encode(completion) + [tokenizer.eos_ids[0]], "prompt_length": len(head)}
