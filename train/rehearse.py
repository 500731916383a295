"""What would fail only after an hour of sampling and training, tried on shapes before anything is computed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax

from . import combine, probes
from .learn.sft import check_patterns
from .log import UserError
from .models.decoder import Params
from .models.open import load_model
from .runtime import checkpoint
from .runtime.mesh import sharding_of

if TYPE_CHECKING:
    from .run import Run


def rehearse(run: Run) -> dict[str, str]:
    """Try path patterns, merges and probes of every method; the digests of the models that merges refer to."""
    for name in trained(run):
        check_patterns(run.config.block(name, "sft"), run.model.params, f"methods.{name}.sft: ")
    check_probes(run)
    return check_merges(run)


def trained(run: Run) -> list[str]:
    return [name for name, method in run.config.methods.items() if method.probe is None]


def check_merges(run: Run) -> dict[str, str]:
    """Refuse a wrong α or path pattern, and a reference that is not there; the digest of each reference."""
    references: dict[str, tuple[Any, str]] = {}
    for name in trained(run):
        config = run.config.block(name, "merge")
        if config.rule == "none":
            continue
        try:
            if config.reference != "anchor" and config.reference not in references:
                references[config.reference] = shapes_and_digest(run, config.reference)
            reference, _ = references.get(config.reference, (None, ""))
            for number in range(1, run.config.rounds + 1):
                for alpha in combine.candidates(config, number, run.config.rounds):
                    if span := combine.importance_span(alpha):
                        alpha = {"**": list(span)}
                    merged = functools.partial(combine.merged, config=config, alpha=alpha, key=jax.random.key(0))
                    jax.eval_shape(merged, run.model.params, run.model.params, reference=reference)
        except (ValueError, TypeError) as error:
            raise UserError(f"methods.{name}.merge: {error}") from error
    return {path: digest for path, (_, digest) in references.items()}


def shapes_and_digest(run: Run, path: str) -> tuple[Any, str]:
    params = read_reference(run, path)
    return jax.eval_shape(lambda: params), checkpoint.digest(params)


def check_probes(run: Run) -> None:
    """Refuse a rule that does not take what a probe gives it: its parameters, as many models as there will be."""
    for name, method in run.config.methods.items():
        probe = method.probe
        if probe is None or probe.kind != "merge":
            continue
        count = run.config.block(probe.of, "sft").snapshots
        by_rule = functools.partial(probes.by_rule, rule=probe.rule, parameters=probe.parameters)
        try:
            jax.eval_shape(by_rule, [run.model.params] * count, run.model.params)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"methods.{name}.probe: {probe.rule} of {count} checkpoints: {error}") from error


def read_reference(run: Run, path: str) -> Params:
    """The weights that imm's deltas are measured from; refused if they are not those the run began with."""
    try:
        params = load_model(path, sharding=functools.partial(sharding_of, run.mesh)).params
    except UserError as error:
        raise UserError(f"merge.reference: {error}") from None
    record = run.journal.committed("base/load") or {}
    then = record.get("references", {}).get(path)
    if then is not None and then != checkpoint.digest(params):
        raise UserError(
            f"merge.reference={path}: the weights changed since this run began; restore them or choose another folder "
            "with out=DIR"
        )
    return params
