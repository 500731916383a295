"""ExMe's coefficients searched on validation questions; the other probes are made by `Weights.make_probe`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jaxmerge

from ..log import say
from ..models.decoder import Params
from ..runtime.jsonl import Row, append_jsonl, read_jsonl
from ..runtime.processes import on_first
from ..tasks import Question
from .plan import BASE, Phase
from .session import Session


def effective_size(questions: Sequence[Question]) -> int:
    r"""How many questions would make a pooled accuracy as certain as the mean over the D domains is.

    Its variance is $p(1-p) \frac{1}{D^2} \sum_d \frac{1}{n_d}$: $D^2 / \sum_d \frac{1}{n_d}$, D times the
    harmonic mean.
    """
    sizes = Counter(q.domain for q in questions).values()
    return round(len(sizes) ** 2 / sum(1 / n for n in sizes)) if sizes else 0


def search(session: Session, phase: Phase, folder: Path) -> tuple[Params, Row]:
    """ExMe's coefficients searched on validation; a killed search goes on from its `trials.jsonl`.

    The score is the mean over the domains, so that what a domain gains and another loses counts alike.
    """
    chosen, numbers = session.weights.ranked(phase, phase.settings["best"])
    base, log = session.weights.get(BASE), folder / "trials.jsonl"
    before = on_first(read_jsonl, log, torn="mend")
    questions = session.suite.questions("validation")
    count = itertools.count(len(before))
    strategy = phase.settings["search"]

    def evaluate(params: Params) -> float:
        number = next(count)
        model = session.weights.with_params(params)
        return session.validate(model, folder / f"trial-{number:04d}", f"{phase.name} trial {number}")

    result = jaxmerge.search_exme(
        chosen,
        base,
        evaluate,
        strategy=jaxmerge.staged if strategy == "staged" else strategy,
        questions=effective_size(questions),
        trials=before,
        on_trial=lambda trial: on_first(append_jsonl, log, trial),
    )
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
