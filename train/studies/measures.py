"""Each measure on a study: the models it takes, what it calls, plain data for `analysis.json`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmerge

from ..evaluate.agreement import agreement
from ..evaluate.answer import verify
from ..evaluate.change import by_kind, by_layer, by_layer_and_kind
from ..evaluate.diversity import diversity, grouped, interval, pass_curve
from ..evaluate.faithful import faithfulness
from ..evaluate.importance import of_layers, skip_importance, taylor_importance
from ..evaluate.line import along_line, grid, over_points, plane
from ..evaluate.memorise import memorisation, twins
from ..evaluate.rank import ranks
from ..evaluate.texts import batches
from ..evaluate.tuco import tuco
from ..log import UserError, progress
from ..runtime.jsonl import read_jsonl
from ..tasks.code import CodeTask
from .stats import permutation_test
from .study import Study

Found = Any
LAMBDAS = tuple(i / 4 for i in range(9))
EXTRAPOLATED = 0.5


def importance(study: Study) -> Found:
    """How much each layer of the base matters for held-out solutions of all domains; rank correlation with change."""
    given = batches([text for texts in study.texts.values() for text in texts])
    base, count = study.base, study.config.num_hidden_layers
    skip, nll = None, None
    if count > 1:
        with progress("importance", total=count, unit="layers") as bar:
            skip, nll = skip_importance(study.config, base, given, dtype=study.dtype, on_layer=lambda: bar.advance(1))
    else:
        study.notes.append("The model has one layer: none can be left out.")
    groups = taylor_importance(study.loss, base, given)
    scores = {"skip": skip, "taylor": of_layers(groups, count)}
    correlation = []
    for r in study.rounds:
        moved = of_layers(by_layer(study.weights(r.tuned), base), count)
        for name, values in scores.items():
            if values is not None and count > 1:
                test = permutation_test(values, moved, seed=study.seed)
                found = {"rho": test.rho, "p": test.p, "permutations": test.permutations, "exact": test.exact}
                correlation.append({"round": r.number, "importance": name, **found})
    return {**scores, "nll": nll, "taylor_groups": groups, "correlation": correlation}


def change(study: Study) -> Found:
    """How far each round's models are from the base, before and after the merge."""
    rows, base = [], study.base
    for r in study.rounds:
        for model, name in (("tuned", r.tuned), ("merged", r.end)):
            if model == "tuned" or r.merged:
                params = study.weights(name)
                tables = {"kinds": by_kind(params, base), "map": by_layer_and_kind(params, base)}
                rows.append({"round": r.number, "model": model, "layers": by_layer(params, base), **tables})
    return rows


def agree(study: Study) -> Found:
    """Cosines and conflicts of sign: of the rounds' changes from the base, and of what each round alone added."""
    if len(study.rounds) < 2:
        study.notes.append("One round: there are no two task vectors to compare.")
        return None
    table = {}
    for name, rounds in (("from the base", study.rounds), ("of the round alone", study.with_start())):
        deltas = []
        for r in rounds:
            start = study.base if name == "from the base" else study.weights(r.start)
            deltas.append(jax.device_get(jaxmerge.task_vector(study.weights(r.tuned), start)))
        if len(deltas) > 1:
            cosine, conflict = agreement(deltas)
            table[name] = {"rounds": [r.number for r in rounds], "cosine": cosine, "conflict": conflict}
    return table


def rank(study: Study) -> Found:
    """Effective and stable rank of what each round's fine-tuning changed, from what the round began with."""
    return [
        {"round": r.number, "kinds": ranks(study.weights(r.tuned), study.weights(r.start))} for r in study.with_start()
    ]


def contribution(study: Study) -> Found:
    """TuCo of each round's models on held-out prompts, by domain."""
    rows, base = [], study.base
    for r in study.rounds:
        for model, name in (("tuned", r.tuned), ("merged", r.end)):
            if model == "tuned" or r.merged:
                params = study.weights(name)
                for domain, texts in study.texts.items():
                    values, layers = tuco(study.config, params, base, [t.prompt for t in texts])
                    found = {
                        "value": interval(values.tolist(), seed=study.seed),
                        "layers": np.mean(layers, axis=0).tolist(),
                    }
                    rows.append({"round": r.number, "model": model, "domain": domain, **found})
    return rows


def line(study: Study) -> Found:
    """Loss of base + λ·(tuned − base) on each domain, for the last round's fine-tuned model."""
    last = study.rounds[-1]
    given = {domain: batches(texts) for domain, texts in study.texts.items()}
    losses = along_line(study.loss, study.base, study.weights(last.tuned), LAMBDAS, given)
    return {"round": last.number, "coefficients": list(LAMBDAS), "losses": losses}


def terrain(study: Study) -> Found:
    """Loss over the plane of the base and the run's models."""
    last, first = study.rounds[-1], study.rounds[0]
    base, tuned = study.base, study.weights(last.tuned)
    models = {f"tuned {last.number}": tuned}
    if last.merged:
        models[f"merged {last.number}"] = study.weights(last.end)
    models["extrapolated"] = jaxmerge.extrapolate([tuned], base=base, alpha=jnp.float32(EXTRAPOLATED))
    if first is not last:
        models[f"tuned {first.number}"] = study.weights(first.tuned)
    elif (early := study.snapshot(last)) is not None:
        models["half-way"] = early
    found = plane(base, models)
    if found is None:
        study.notes.append(
            f"{', '.join(models)} lie on one line through the base: there is no plane, the line above is all of it."
        )
        return None
    u, v = grid(found.places, study.options.grid)
    given = {domain: batches(texts) for domain, texts in study.texts.items() if domain in ("id", "ood")}
    points = [(a, b) for b in v for a in u]
    flat = over_points(study.loss, base, found.directions, points, given)
    losses = {domain: np.reshape(values, (len(v), len(u))).tolist() for domain, values in flat.items()}
    return {"round": last.number, "u": u, "v": v, "losses": losses, "places": found.places}


def variety(study: Study) -> Found:
    """Entropy and number of answers, distinct solutions, and pass@k: of the run's samples, or of samples drawn now."""
    rows = drawn_now(study) if study.options.samples else drawn_by_the_run(study)
    source = study.session.config.block(study.method, "sampling").source
    chosen = source != "plain" and not study.options.samples
    table = []
    for about, samples, questions in rows:
        found = grouped(samples, questions, study.session.config.tasks.style)
        if not found:  # a search may find nothing
            continue
        curve = [] if chosen else pass_curve([answered.counts for answered in found.values()], seed=study.seed)
        row = {**about, **diversity(found, seed=study.seed), "pass": curve}
        table.append(row | ({"solved": None} if chosen else {}))
    if chosen:
        study.notes.append(
            f"Solutions come from sampling.source: {source}, which chooses what it keeps: the variety of samples is of "
            "what was kept, and pass@k and the share solved are not told from it; samples=N draws plain samples."
        )
    return table


def drawn_by_the_run(study: Study):
    """The training samples of each round, drawn from the model that the round began with."""
    questions = {q.id: q for q in study.session.suite.questions("train", domain="id")}
    for r in study.rounds:
        if r.sample is None:
            study.notes.append(
                f"Round {r.number} learnt from samples drawn at every step, which are not kept; samples=N draws some."
            )
            continue
        folder = study.session.journal.committed_folder(r.sample.name)
        rows = [row for path in sorted(folder.glob("batch-*.jsonl")) for row in read_jsonl(path)]
        about = {"round": r.number - 1, "domain": "id", "of": "the run's samples of training questions"}
        yield about, verify(study.session.suite, questions, rows), questions


def drawn_now(study: Study):
    """Samples of held-out questions, from the base and from what each round ended with."""
    count = study.options.samples
    if study.session.config.block(study.method, "sampling").temperature == 0:
        raise UserError(f"samples={count}: method {study.method} samples at temperature 0, they would all be the same")
    for domain in ("id", "ood"):
        questions = study.held_out(domain, study.options.questions)
        for number, name, phase in study.ends() if questions else ():
            rows = study.sample(phase, questions, count, f"samples of {name} ({domain})")
            about = {"round": number, "domain": domain, "of": "samples of held-out questions drawn for the analysis"}
            yield about, rows, {q.id: q for q in questions}


def limem(study: Study) -> Found:
    """Memorisation of training questions by the base and by the last round's models; None unless asked for."""
    if not study.options.limem:
        return None
    questions = study.session.suite.questions("train", domain="id")[: study.options.questions]
    pairs = twins(study.session.suite, questions, seed=study.seed)
    without = sorted({q.family for q in questions} - {q.family for q in questions if q.id in pairs})
    if without:
        study.notes.append(
            f"LiMem is not available for {', '.join(without)}: no generator gives the same question with other numbers."
        )
    if not pairs:
        return None
    return [
        {"model": name, **memorisation(study.solver(phase, f"LiMem of {name}"), questions, pairs)}
        for name, phase in last_models(study).items()
    ]


def last_models(study: Study) -> dict[str, str]:
    """Name → phase of the base and of the last round's models."""
    last = study.rounds[-1]
    merged = {f"merged {last.number}": last.end} if last.merged else {}
    return {"base": "base", f"tuned {last.number}": last.tuned, **merged}


def faithful(study: Study) -> Found:
    """Whether answers to held-out questions follow from their chains of thought; None unless asked for."""
    if not study.options.faithfulness:
        return None
    rows, style = [], study.session.config.tasks.style
    for name, phase in last_models(study).items():
        answer, go_on = study.reasoner(phase, f"faithfulness of {name}")
        for domain in ("id", "ood"):
            questions = [
                q for q in study.held_out(domain, study.options.questions)
                if not isinstance(study.session.suite.tasks[q.family], CodeTask)
            ]  # fmt: skip
            if questions:
                said = study.completions(phase, questions, f"chains of {name} ({domain})")
                found = faithfulness(answer, go_on, said, style, seed=study.seed)
                rows.append({"model": name, "domain": domain, "questions": len(questions), **found})
    return rows


MEASURES: dict[str, Callable[[Study], Found]] = {
    "importance": importance,
    "change": change,
    "agreement": agree,
    "rank": rank,
    "tuco": contribution,
    "line": line,
    "plane": terrain,
    "diversity": variety,
    "limem": limem,
    "faithfulness": faithful,
}
