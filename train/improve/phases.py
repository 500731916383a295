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

from ..data.versions import write_version
from ..evaluate import accuracy
from ..evaluate.answer import generate, is_right, lengths, to_show, verify
from ..evaluate.change import by_layer
from ..evaluate.importance import loss_of, of_layers, taylor_importance
from ..evaluate.texts import batches as text_batches
from ..learn.batches import steps_of, to_rows
from ..learn.beside import BLOCKS
from ..learn.checkpoints import SftCheckpoints
from ..learn.measure import ModelMeasure
from ..learn.pairs import rows_of
from ..learn.settings import Sft
from ..learn.sft import fine_tune, one_epoch
from ..learn.watch import hold_out, speed_of
from ..log import UserError, say
from ..models.decoder import Params
from ..models.open import write_model_files
from ..resolve import build, to_dict
from ..runtime import checkpoint, stop
from ..runtime.jsonl import Row, read_jsonl, write_jsonl
from ..runtime.processes import on_first
from ..runtime.sinks import follow
from ..search.settings import Drawing, Search
from ..search.source import search_solutions
from . import merge as combine
from . import probes
from .branch import part_of
from .gate import gate
from .on_policy import policy
from .plan import BASE, Phase, spell
from .rehearse import join_models, read_reference, rehearse
from .select import select as select_examples
from .session import Session, dataset_of
from .settings import Merge, Sampling, Selection


def load(session: Session, phase: Phase, folder: Path) -> Row:
    del phase, folder
    references = rehearse(session)
    jaxmerge.check_finite(session.model.params, name=session.config.model.path or "model.random")
    on_first(write_model_files, session.model, session.journal.root / "model")
    count = sum(x.size for x in jax.tree.leaves(session.model.params))
    digest = checkpoint.digest(session.model.params)
    name = session.config.model.path or "random model"
    say(f"{name}: {count / 1e6:.1f} M parameters on {session.mesh.size} device(s)")
    return {
        "parameters": count,
        "digest": digest,
        "questions": session.suite.digests(),
        **({"references": references} if references else {}),
        "majority": session.suite.majority_baselines(),
    }


def sample(session: Session, phase: Phase, folder: Path) -> Row:
    config: Sampling = phase.settings
    questions = session.suite.questions("train", domain="id")
    settings = config.settings(
        dtype=session.config.model.dtype, gather=session.config.mesh.gather_to_decode, stop=session.stops(config.stop)
    )
    key = jax.random.fold_in(session.key, phase.round)
    model = join_models(session.weights, session.weights.model_of(phase.inputs["model"]), config.decode)
    if config.source == "plain":
        rows, new, seconds = generate(
            model, session.suite, questions, settings, key,
            shots=session.config.tasks.few_shot, batch=config.batch, folder=folder, title=phase.name,
        )  # fmt: skip
        generated = sum(len(r["tokens"]) for r in rows)
    else:
        search = build(Search, {**config.search, "kind": config.source}, "sampling.search")
        rows, generated, new, seconds = search_solutions(
            model, session.suite, questions, search, drawing_of(config),
            shots=session.config.tasks.few_shot, settings=settings, folder=folder,
            seed=session.config.seed * 1000 + phase.round, title=phase.name,
        )  # fmt: skip
    return {
        "questions": len(questions),
        "samples": len(rows),
        "tokens": sum(len(r["tokens"]) for r in rows),
        "generated": generated,
        # Of what this start generated: a phase that was cut off found the rest there.
        "tokens_per_second": new / seconds if new else None,
    }


def select(session: Session, phase: Phase, folder: Path) -> Row:
    config: Selection = phase.settings
    questions = session.suite.questions("train", domain="id")
    # A warm-up has none: it learns worked solutions.
    source = session.todo[phase.inputs["samples"]] if "samples" in phase.inputs else None
    folders = [session.journal.committed_folder(source.name)] if source is not None else []
    rows = [row for at in folders for path in sorted(at.glob("batch-*.jsonl")) for row in read_jsonl(path)]
    scored = verify(session.suite, {q.id: q for q in questions}, rows)
    earlier = [
        row
        for role, name in phase.inputs.items()
        if role.startswith("earlier")
        for row in session.read_examples(session.todo[name])
    ]
    examples, counts = select_examples(
        session.suite,
        session.model.tokenizer,
        questions,
        scored,
        config,
        shots=session.config.tasks.few_shot,
        seed=session.config.seed * 1000 + phase.round,
        earlier=earlier,
    )
    made, examples = len(examples), pick(session, phase, examples, scored)
    counts |= {"picked": len(examples)} if len(examples) < made else {}
    failures = session.suite.describe_unjudged()
    if not examples:
        raise UserError(
            f"{phase.name}: none of {len(rows)} samples can be trained on ({counts['correct']} right, "
            f"{counts['unjudged']} could not be judged{f': {failures}' if failures else ''}, "
            f"{counts['unfinished']} unfinished); take an easier family, more samples, a higher "
            "sampling.max_new_tokens, or selection.real_ratio above 0"
            + ("; a pair needs a right and a wrong sample of one question" if config.pairs else "")
        )
    if counts["unjudged"]:
        say(f"{phase.name}: {counts['unjudged']} samples could not be judged and are not learnt from: {failures}")
    on_first(
        write_jsonl, folder / "scored.jsonl", [{k: r[k] for k in ("question_id", "sample", "score")} for r in scored]
    )
    provenance = {
        "round": phase.round,
        "method": phase.method,
        "model": session.weights.digest(BASE if source is None else source.inputs["model"]),
        "seed": session.config.seed,
        "sampling": to_dict(source.settings) if source is not None else None,
        "selection": to_dict(config),
        "counts": {k: v for k, v in counts.items() if isinstance(v, int)},
    }
    name, version = dataset_of(phase)
    on_first(write_version, session.journal.root / "samples", name, version, examples, provenance)
    return {**counts, "dataset": f"{name}/{version}"}


def part(session: Session, phase: Phase, folder: Path) -> Row:
    """The examples of one branch, as a dataset of their own."""
    del folder
    examples = session.read_examples(session.todo[phase.inputs["data"]])
    settings = phase.settings
    mine = part_of(examples, settings["part"], settings["of"], seed=session.config.seed * 1000 + phase.round)
    if not mine:
        raise UserError(
            f"{phase.name}: {len({e['question_id'] for e in examples})} questions with examples cannot be split into "
            f"{settings['of']} parts; lower branch.count, or give more questions or samples"
        )
    name, version = dataset_of(phase)
    provenance = {"round": phase.round, "method": phase.method, "seed": session.config.seed, **settings}
    on_first(write_version, session.journal.root / "samples", name, version, mine, provenance)
    return {**settings, "examples": len(mine), "dataset": f"{name}/{version}"}


def join(session: Session, phase: Phase, folder: Path) -> Row:
    """Merge the branches of a round's fine-tuning."""
    del folder
    kept = session.weights.keep(phase, session.weights.join(phase))
    return {"rule": phase.settings["rule"], "coefficients": phase.settings["parameters"], **kept}


def pick(session: Session, phase: Phase, examples: Sequence[Row], scored: Sequence[Row]) -> list[Row]:
    """The examples that `selection.pick` chooses; the difficulty of a question is the share of its wrong samples."""
    wrong: dict[str, list[bool]] = {}
    for row in scored:
        wrong.setdefault(row["question_id"], []).append(row["score"] != 1.0)
    shown = [e | {"difficulty": float(np.mean(wrong.get(e["question_id"], [True])))} for e in examples]
    measure = ModelMeasure(
        lambda: session.weights.model_of(phase.inputs["model"]), shown, dtype=session.config.model.dtype
    )
    return [examples[i] for i in phase.settings.pick.choose(shown, measure)]


def sft(session: Session, phase: Phase, folder: Path) -> Row:
    config: Sft = phase.settings
    seed = session.config.seed * 1000 + phase.round
    examples = session.read_examples(session.todo[phase.inputs["data"]])
    (learnt,), held = hold_out([examples], config.watch.held_out, seed=seed, question=lambda e: e["question_id"])
    pad = session.model.tokenizer.pad_id or 0
    rows = rows_of(learnt, config, pad, seed=seed)
    home = session.weights.folder(phase.name)
    kept = SftCheckpoints(home / "state", home / "snapshots", home / BLOCKS)
    steps, root = folder / "steps.jsonl", session.journal.root
    about = {
        "folder": root,
        "name": phase.name,
        "config": to_dict(session.config),
        "total": config.stay.last(steps_of(rows, config)),
    }
    with follow(steps, config.watch.sinks, **about) as on_step:
        params, log = fine_tune(
            session.model.config,
            session.weights.get(phase.inputs["model"]),
            rows,
            config,
            mesh=session.mesh,
            seed=seed,
            dtype=session.config.model.dtype,
            held_out=to_rows(held, one_epoch(config), pad, seed=seed) if held else None,
            anchor=session.weights.get(BASE) if config.reads_original else None,
            teacher=session.teacher_of(config.distill),
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
        **session.weights.keep(phase, params),
    }


def merge(session: Session, phase: Phase, folder: Path) -> Row:
    config = build(Merge, phase.settings["merge"], "merge")
    tuned = session.weights.get(phase.inputs["tuned"])
    anchor = combine.running_average(
        [session.weights.get(m) for role, m in phase.inputs.items() if role.startswith("anchor")]
    )
    key = combine.key_of(session.key, phase.round)
    reference = None if config.reference == "anchor" else read_reference(session.weights, config.reference)

    def merged(alpha):
        try:
            return combine.merged(anchor, tuned, config, alpha, reference=reference, key=key)
        except ValueError as error:
            raise UserError(f"{phase.name}: {error}") from error

    searched: Row = {}
    candidates = combine.candidates(config, phase.round, session.config.rounds)
    if len(candidates) > 1:
        scores = {}
        for alpha in candidates:
            model, name = session.weights.with_params(merged(alpha)), spell(alpha)
            scores[alpha] = session.validate(model, folder / f"alpha-{name}", f"{phase.name} α={name}")
        alpha = max(scores, key=lambda a: (scores[a], -a))
        searched = {"searched": {spell(a): s for a, s in scores.items()}}
    else:
        (alpha,) = candidates
        if span := combine.importance_span(alpha):
            alpha, searched = adapt_alpha(session, anchor, tuned, span)
    return {
        "rule": config.rule,
        "coefficients": {"alpha": alpha, "drop": config.drop, **config.parameters, **searched},
        "anchor": phase.inputs["anchor"],
        **session.weights.keep(phase, merged(alpha)),
    }


def adapt_alpha(session: Session, anchor: Params, tuned: Params, span: Sequence[float]) -> tuple[dict[str, Any], Row]:
    """α by layer, from the anchor's importance on validation questions and the round's change."""
    count = session.model.config.num_hidden_layers
    loss = loss_of(session.model.config, session.config.model.dtype)
    found = taylor_importance(
        loss, anchor, text_batches(session.worked("validation"), session.model.tokenizer.pad_id or 0)
    )
    moved = by_layer(tuned, anchor)
    importance, changes = of_layers(found, count), of_layers(moved, count)
    alpha = combine.by_layer(combine.layer_alphas(importance, changes, span))
    return alpha, {"importance": importance, "change": changes}


def rank(session: Session, phase: Phase, folder: Path) -> Row:
    """Order the snapshots of a fine-tuning run by their accuracy on validation."""
    paths = session.weights.snapshots(phase.inputs["snapshots"])
    scores = []
    for index, path in enumerate(paths):
        model = session.weights.with_params(session.weights.read(path))
        scores.append(session.validate(model, folder / f"snapshot-{index}", f"{phase.name} {index}"))
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return {"scores": scores, "best": best}


def probe(session: Session, phase: Phase, folder: Path) -> Row:
    searched = phase.settings.get("search")
    params, notes = probes.search(session, phase, folder) if searched else session.weights.make_probe(phase)
    session.weights.held[phase.name] = params
    record = {"change": by_layer(params, session.weights.get(BASE)), **notes}
    return {"rule": phase.settings["kind"], "digest": checkpoint.digest(params), **record}


def evaluate_model(session: Session, phase: Phase, folder: Path) -> Row:
    questions = [q for split in session.config.evaluation.splits for q in session.suite.questions(split)]
    if not questions:
        raise UserError(f"evaluation.splits={list(session.config.evaluation.splits)}: no family has such questions")
    model = session.weights.model_of(phase.inputs["model"])
    answers = session.answer(model, questions, folder, phase.name)
    scores = is_right(answers.rows)
    outcome = next(o for o in session.outcomes if o.evaluate == phase.name)
    about = {"method": phase.method, "number": phase.round, "seconds": answers.seconds, **outcome.extra}
    table = accuracy.rows(questions, scores, lengths=lengths(answers.rows), **about)
    config = session.config.evaluation
    if config.samples and (config.sampled == "all" or phase.round in (0, session.config.rounds)):
        asked = [q for q in questions if q.split == "test"]
        drawn = session.drawn(model, asked, folder / "sampled", f"{phase.name} pass@k")
        accuracy.add_at_k(table, asked, drawn, config.samples)
    on_first(write_jsonl, folder / "scores.jsonl", [{"question_id": q.id, "score": scores[q.id]} for q in questions])
    return {"model": phase.inputs["model"], "rows": table, "examples": to_show(questions, answers.rows)}


STEPS: dict[str, Callable[[Session, Phase, Path], Row]] = {
    "load": load,
    "sample": sample,
    "select": select,
    "part": part,
    "sft": sft,
    "gate": gate,
    "policy": policy,
    "join": join,
    "merge": merge,
    "rank": rank,
    "graft": probes.graft,
    "probe": probe,
    "evaluate": evaluate_model,
}


def drawing_of(config: Sampling) -> Drawing:
    """How a search draws texts in place of samples: each may be as long as a sample."""
    most = config.max_new_tokens
    return Drawing(
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, slots=config.slots,
        step=most, chain=most, write=most,
    )  # fmt: skip
