"""Probes: models made of a round's checkpoints without training, evaluated and not fed back."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

import jaxmerge

from .log import UserError, say
from .models.decoder import Params
from .plan import BASE, Phase
from .runtime.jsonl import append_jsonl, read_jsonl_tolerant
from .runtime.processes import on_first
from .tasks import Question

if TYPE_CHECKING:
    from .run import Run

Row = dict[str, Any]


def made(run: Run, phase: Phase) -> tuple[Params, Row]:
    """A probe's weights from its inputs and its record if it was searched: cheap and exact, so not kept on disk."""
    base, settings = run.weights(BASE), phase.settings
    kind = settings["kind"]
    if kind in ("expo", "line"):
        alpha = settings["alpha"] if kind == "expo" else settings["coefficient"] - 1.0
        tuned = run.weights(phase.inputs["tuned"])
        told = {"alpha": alpha} if kind == "expo" else {"lambda": settings["coefficient"]}
        return jaxmerge.extrapolate([tuned], base=base, alpha=alpha), {"coefficients": told}
    if kind == "merge":
        models = [run.read_weights(path) for path in run.snapshots(phase.inputs["tuned"])]
        try:
            merged = by_rule(models, base, rule=settings["rule"], parameters=settings["parameters"])
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{phase.name}: {settings['rule']}: {error}") from error
        return merged, {"coefficients": settings["parameters"], "snapshots": list(range(len(models)))}
    chosen, numbers = ranked(run, phase, 1 if kind == "best" else settings["best"])
    if kind == "best":
        return chosen[0], {"coefficients": {}, "snapshots": numbers}
    if settings["search"]:
        record = run.journal.committed(phase.name)
        assert record is not None, f"{phase.name} is searched before it is read"
        found = record["coefficients"]["found"]
        return jaxmerge.exme_merge(chosen, base)(**found), {}
    alphas, weights = settings["alphas"], settings["weights"]
    merged = jaxmerge.extrapolation_merge(chosen, base=base, alphas=alphas, weights=weights)
    cosine = float(jax.jit(lambda models, base: jaxmerge.collinear(models, base=base)[0, 1])(chosen, base))
    notes = []
    if abs(cosine) > 0.999:
        line = sum(w * (1 + a) for w, a in zip(weights, alphas, strict=True))
        notes = [
            f"the two checkpoints lie on one line through the base (cosine {cosine:.4f}): this is ExPO with "
            f"another coefficient (about 1 + α = {line:.3f}), not a method of its own"
        ]
    return merged, {
        "coefficients": {"alphas": alphas, "weights": weights}, "snapshots": numbers, "cosine": cosine, "notes": notes,
    }  # fmt: skip


def by_rule(models: list[Params], base: Params, *, rule: str, parameters: Mapping[str, Any]) -> Params:
    """A rule of the library on a round's checkpoints."""
    merge = jaxmerge.RULES[rule]
    return merge(models, base=None if merge.needs.base == "none" else base, **parameters)


def ranked(run: Run, phase: Phase, count: int) -> tuple[list[Params], list[int]]:
    """The best checkpoints on validation, the best first, and their numbers."""
    record = run.journal.committed(phase.inputs["rank"])
    assert record is not None, f"{phase.inputs['rank']} is read before it is committed"
    paths, best = run.snapshots(phase.inputs["tuned"]), record["best"][:count]
    return [run.read_weights(paths[i]) for i in best], best


def effective_size(questions: Sequence[Question]) -> int:
    r"""How many questions would make a pooled accuracy as certain as the mean over the D domains is.

    Its variance is :math:`p(1-p) \frac{1}{D^2} \sum_d \frac{1}{n_d}`: :math:`D^2 / \sum_d \frac{1}{n_d}`, D times the
    harmonic mean.
    """
    sizes = Counter(q.domain for q in questions).values()
    return round(len(sizes) ** 2 / sum(1 / n for n in sizes)) if sizes else 0


def search(run: Run, phase: Phase, folder: Path) -> tuple[Params, Row]:
    """ExMe's coefficients searched on validation; a killed search goes on from its `trials.jsonl`.

    The score is the mean over the domains, so that what a domain gains and another loses counts alike.
    """
    chosen, numbers = ranked(run, phase, phase.settings["best"])
    base, log = run.weights(BASE), folder / "trials.jsonl"
    before = on_first(read_jsonl_tolerant, log, truncate=True)
    questions = run.suite.questions("validation")
    count = itertools.count(len(before))
    strategy = phase.settings["search"]

    def evaluate(params: Params) -> float:
        number = next(count)
        run.held["candidate"] = params
        return run.validate("candidate", folder / f"trial-{number:04d}", f"{phase.name} trial {number}")

    result = jaxmerge.search_exme(
        chosen,
        base,
        evaluate,
        strategy=jaxmerge.staged if strategy == "staged" else strategy,
        questions=effective_size(questions),
        trials=before,
        on_trial=lambda trial: on_first(append_jsonl, log, trial),
    )
    run.held.pop("candidate", None)
    for note in result.notes:
        say(f"{phase.name}: {note}")
    found = {name: value if isinstance(value, Sequence) else float(value) for name, value in result.best.items()}
    return jaxmerge.exme_merge(chosen, base)(**found), {
        "coefficients": {"found": found},
        "snapshots": numbers,
        "validation": result.score,
        "trials": len(result.trials),
        "search_seconds": result.seconds,
        "notes": list(result.notes),
    }
