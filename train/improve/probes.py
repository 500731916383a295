"""Probes that measure: ExMe's coefficients searched on validation questions, a mask learned on training questions.

The other probes are made by `Weights.make_probe`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import optax

import jaxmerge
from jaxmerge.tree import named_leaves
from jaxmerge.where import layer_group

from ..evaluate.importance import loss_of
from ..evaluate.texts import batches
from ..log import UserError, say
from ..models.decoder import Params
from ..models.stacked import unstack_layers
from ..runtime.jsonl import Row, append_jsonl, read_jsonl
from ..runtime.processes import on_first
from ..tasks import Question
from .graft import Graft
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


def shares(mask: Params) -> dict[str, float]:
    """Where a mask is: the share of each layer's parameters that it takes, and of what is of no layer."""
    sums: dict[str, tuple[float, int]] = {}
    for path, leaf in named_leaves(unstack_layers(mask)).items():
        taken, size = sums.get(layer_group(path), (0.0, 0))
        sums[layer_group(path)] = (taken + float(jnp.sum(leaf.astype(jnp.float32))), size + leaf.size)
    return {group: taken / size for group, (taken, size) in sums.items()}


def graft(session: Session, phase: Phase, folder: Path) -> Row:
    """Learn a mask over what a round changed, on training questions with their solutions; keep the grafted model."""
    del folder
    config: Graft = phase.settings
    texts = session.worked("train")[: config.questions]
    if not texts:
        raise UserError(
            f"{phase.name}: no training question has room for its solution in this model; a mask is learned on them"
        )
    loss = loss_of(session.model.config, session.config.model.dtype)

    def mean(params, batch):
        nll, weight = loss(params, batch)
        return nll / weight

    tuned, base = session.weights.get(phase.inputs["tuned"]), session.weights.get(BASE)
    found = jaxmerge.learn_mask(
        tuned, base, mean, batches(texts, session.model.tokenizer.pad_id or 0), density=config.density,
        optimizer=optax.adam(config.learning_rate), passes=config.passes, bias=config.bias, penalty=config.penalty,
    )  # fmt: skip
    say(
        f"{phase.name}: {found.share:.3%} of the parameters grafted, loss {found.loss:.4f}; the largest changes alone, "
        f"{found.start_share:.3%}: {found.start_loss:.4f}"
    )
    kept = session.weights.keep(phase, jaxmerge.grafting([tuned], base=base, mask=found.mask))
    told = {name: getattr(found, name) for name in ("loss", "share", "start_loss", "start_share")}
    return {"rule": "graft", "coefficients": told, "shares": shares(found.mask), **kept}
