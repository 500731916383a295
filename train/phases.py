"""The phases of a run: each computes one step from what earlier ones made and returns what its record says.

`folder` is the phase's own: what is written there before a kill is found there after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxmerge

from . import combine, evaluate, probes, round
from .analysis.importance import loss_of, of_layers, taylor_importance
from .analysis.texts import batches as text_batches
from .config import Merge, Sampling, Selection
from .data.versions import write_version
from .generate.rollout import Settings
from .learn.batches import steps_of, to_rows
from .learn.checkpoints import SftCheckpoints
from .learn.settings import Sft
from .learn.sft import fine_tune, one_epoch
from .learn.watch import hold_out, speed_of
from .log import UserError, say
from .models.decoder import Params
from .models.open import describe
from .plan import BASE, Phase, spell
from .rehearse import read_reference, rehearse
from .resolve import build, to_dict
from .run import Row, Run, dataset_of
from .runtime import checkpoint, stop
from .runtime.jsonl import read_jsonl, write_jsonl
from .runtime.processes import on_first
from .runtime.sinks import followed


def load(run: Run, phase: Phase, folder: Path) -> Row:
    del phase, folder
    references = rehearse(run)
    jaxmerge.check_finite(run.model.params, name=run.config.model.path or "model.random")
    on_first(describe, run.model, run.journal.root / "model")
    count = sum(x.size for x in jax.tree.leaves(run.model.params))
    digest = checkpoint.digest(run.model.params)
    say(f"{run.config.model.path or 'random model'}: {count / 1e6:.1f} M parameters on {run.mesh.size} device(s)")
    return {
        "parameters": count,
        "digest": digest,
        "questions": run.suite.digests(),
        **({"references": references} if references else {}),
        "majority": run.suite.majority_baselines(),
    }


def sample(run: Run, phase: Phase, folder: Path) -> Row:
    config: Sampling = phase.settings
    questions = run.suite.questions("train", domain="id")
    settings = Settings(
        config.samples,
        config.temperature,
        config.top_k,
        config.top_p,
        config.max_new_tokens,
        run.stops(config.stop),
        config.slots,
        run.config.model.dtype,
        run.config.mesh.gather_to_decode,
    )
    key = jax.random.fold_in(run.key, phase.round)
    if config.source == "plain":
        rows, new, seconds = run.generate(
            phase.inputs["model"], questions, settings, key, folder, batch=config.batch, title=phase.name
        )
        generated = sum(len(r["tokens"]) for r in rows)
    else:
        from .search.source import searched

        seed = run.config.seed * 1000 + phase.round
        rows, generated, new, seconds = searched(
            run, phase.inputs["model"], questions, config, settings.stop, folder, seed=seed, title=phase.name
        )
    return {
        "questions": len(questions),
        "samples": len(rows),
        "tokens": sum(len(r["tokens"]) for r in rows),
        "generated": generated,
        # Of what this start generated: a phase that was cut off found the rest there.
        "tokens_per_second": new / seconds if new else None,
    }


def select(run: Run, phase: Phase, folder: Path) -> Row:
    config: Selection = phase.settings
    questions = run.suite.questions("train", domain="id")
    source = run.todo[phase.inputs["samples"]]
    rows = [
        row
        for path in sorted(run.journal.committed_folder(source.name).glob("batch-*.jsonl"))
        for row in read_jsonl(path)
    ]
    scored = round.verify(run.suite, {q.id: q for q in questions}, rows)
    earlier = [
        row
        for role, name in phase.inputs.items()
        if role.startswith("earlier")
        for row in run.read_examples(run.todo[name])
    ]
    examples, counts = round.select(
        run.suite,
        run.model.tokenizer,
        questions,
        scored,
        config,
        shots=run.config.tasks.few_shot,
        seed=run.config.seed * 1000 + phase.round,
        earlier=earlier,
    )
    if not examples:
        failures = run.suite.unjudged()
        raise UserError(
            f"{phase.name}: none of {len(rows)} samples can be trained on ({counts['correct']} right, "
            f"{counts['unjudged']} could not be judged{f': {failures}' if failures else ''}, "
            f"{counts['unfinished']} unfinished); take an easier family, more samples, a higher "
            "sampling.max_new_tokens, or selection.real_ratio above 0"
        )
    on_first(
        write_jsonl, folder / "scored.jsonl", [{k: r[k] for k in ("question_id", "sample", "score")} for r in scored]
    )
    provenance = {
        "round": phase.round,
        "method": phase.method,
        "model": run.digest(source.inputs["model"]),
        "seed": run.config.seed,
        "sampling": to_dict(source.settings),
        "selection": to_dict(config),
        "counts": {k: v for k, v in counts.items() if isinstance(v, int)},
    }
    name, version = dataset_of(phase)
    on_first(write_version, run.journal.root / "samples", name, version, examples, provenance)
    return {**counts, "dataset": f"{name}/{version}"}


def sft(run: Run, phase: Phase, folder: Path) -> Row:
    config: Sft = phase.settings
    seed = run.config.seed * 1000 + phase.round
    examples = run.read_examples(run.todo[phase.inputs["data"]])
    (learnt,), held = hold_out([examples], config.watch.held_out, seed=seed, question=lambda e: e["question_id"])
    pad = run.model.tokenizer.pad_id or 0
    rows = to_rows(learnt, config, pad, seed=seed)
    home = run.checkpoints(phase.name)
    kept = SftCheckpoints(home / "state", home / "snapshots")
    steps, root = folder / "steps.jsonl", run.journal.root
    about = {
        "folder": root,
        "name": phase.name,
        "config": to_dict(run.config),
        "total": config.stay.last(steps_of(rows, config)),
    }
    with followed(steps, config.watch.sinks, **about) as on_step:
        params, log = fine_tune(
            run.model.config,
            run.weights(phase.inputs["model"]),
            rows,
            config,
            mesh=run.mesh,
            seed=seed,
            dtype=run.config.model.dtype,
            held_out=to_rows(held, one_epoch(config), pad, seed=seed) if held else None,
            anchor=run.weights(BASE) if config.stay.penalised else None,
            checkpoints=kept,
            trace_to=root / "trace" / phase.name,
            on_step=on_step,
            asked_to_stop=stop.asked,
        )
    thin = max(1, len(log) // 200)
    return {
        "steps": len(log),
        "epochs": config.epochs,
        **rows.summary(),
        "tokens": int(sum(m["targets"] for m in log)),
        "learning_rate": config.learning_rate,
        "loss": [[m["step"], m["loss"]] for m in log[::thin]],
        "loss_first": log[0]["loss"],
        "loss_last": log[-1]["loss"],
        **speed_of(log),
        **run.keep_weights(phase, params),
    }


def merge(run: Run, phase: Phase, folder: Path) -> Row:
    config = build(Merge, phase.settings["merge"], "merge")
    tuned = run.weights(phase.inputs["tuned"])
    anchor = combine.running_average([run.weights(m) for role, m in phase.inputs.items() if role.startswith("anchor")])
    key = jax.random.fold_in(jax.random.fold_in(run.key, phase.round), np.uint32(0xDA2E))
    reference = None if config.reference == "anchor" else read_reference(run, config.reference)

    def merged(alpha):
        try:
            return combine.merged(anchor, tuned, config, alpha, reference=reference, key=key)
        except ValueError as error:
            raise UserError(f"{phase.name}: {error}") from error

    searched: Row = {}
    candidates = combine.candidates(config, phase.round, run.config.rounds)
    if len(candidates) > 1:
        scores = {}
        for alpha in candidates:
            run.held["candidate"] = merged(alpha)
            name = spell(alpha)
            scores[alpha] = run.validate("candidate", folder / f"alpha-{name}", f"{phase.name} α={name}")
        run.held.pop("candidate", None)
        alpha = max(scores, key=lambda a: (scores[a], -a))
        searched = {"searched": {spell(a): s for a, s in scores.items()}}
    else:
        (alpha,) = candidates
        if span := combine.importance_span(alpha):
            alpha, searched = adapted(run, anchor, tuned, span)
    return {
        "rule": config.rule,
        "coefficients": {"alpha": alpha, "drop": config.drop, **config.parameters, **searched},
        "anchor": phase.inputs["anchor"],
        **run.keep_weights(phase, merged(alpha)),
    }


def adapted(run: Run, anchor: Params, tuned: Params, span: Sequence[float]) -> tuple[dict[str, Any], Row]:
    """α by layer, from the anchor's importance on validation questions and the round's change."""
    count = run.model.config.num_hidden_layers
    loss = loss_of(run.model.config, run.config.model.dtype)
    found = taylor_importance(loss, anchor, text_batches(run.worked("validation"), run.model.tokenizer.pad_id or 0))
    moved = round.change(tuned, anchor)
    importance, change = of_layers(found, count), of_layers(moved, count)
    alpha = combine.by_layer(combine.layer_alphas(importance, change, span))
    return alpha, {"importance": importance, "change": change}


def rank(run: Run, phase: Phase, folder: Path) -> Row:
    """Order the snapshots of a fine-tuning run by their accuracy on validation."""
    paths = run.snapshots(phase.inputs["snapshots"])
    scores = []
    for index, path in enumerate(paths):
        run.held["candidate"] = run.read_weights(path)
        scores.append(run.validate("candidate", folder / f"snapshot-{index}", f"{phase.name} {index}"))
    run.held.pop("candidate", None)
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return {"scores": scores, "best": best}


def probe(run: Run, phase: Phase, folder: Path) -> Row:
    make = probes.search(run, phase, folder) if phase.settings.get("search") else probes.made(run, phase)
    run.held[phase.name], notes = make
    record = {"change": round.change(run.held[phase.name], run.weights(BASE)), **notes}
    return {"rule": phase.settings["kind"], "digest": checkpoint.digest(run.held[phase.name]), **record}


def evaluate_model(run: Run, phase: Phase, folder: Path) -> Row:
    questions = [q for split in run.config.evaluation.splits for q in run.suite.questions(split)]
    if not questions:
        raise UserError(f"evaluation.splits={list(run.config.evaluation.splits)}: no family has such questions")
    scores, seconds = run.answer(phase.inputs["model"], questions, folder, phase.name)
    outcome = next(o for o in run.outcomes if o.evaluate == phase.name)
    table = evaluate.rows(questions, scores, method=phase.method, round=phase.round, seconds=seconds, **outcome.extra)
    config = run.config.evaluation
    if config.samples and (config.sampled == "all" or phase.round in (0, run.config.rounds)):
        asked = [q for q in questions if q.split == "test"]
        right = run.successes(phase.inputs["model"], asked, folder / "sampled", f"{phase.name} pass@k")
        evaluate.add_pass_at(table, asked, right, config.samples)
    on_first(write_jsonl, folder / "scores.jsonl", [{"question_id": q.id, "score": scores[q.id]} for q in questions])
    return {"model": phase.inputs["model"], "rows": table}


STEPS: dict[str, Callable[[Run, Phase, Path], Row]] = {
    "load": load,
    "sample": sample,
    "select": select,
    "sft": sft,
    "merge": merge,
    "rank": rank,
    "probe": probe,
    "evaluate": evaluate_model,
}
