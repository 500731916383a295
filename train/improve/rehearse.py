"""What would fail only after an hour of sampling and training, tried on shapes before anything is computed."""

from __future__ import annotations

import functools
from typing import Any

import jax

from ..generate.decodings import Decode
from ..generate.together import compose
from ..learn.sft import check_patterns
from ..log import UserError
from ..models.decoder import Params
from ..models.open import Model, load_model
from ..runtime import checkpoint
from ..runtime.mesh import sharding_of
from . import merge
from .session import Session
from .weights import Weights, merge_by_rule


def rehearse(session: Session) -> dict[str, str]:
    """Try path patterns, merges, probes and decodings of every method; the digests of the models that they refer to."""
    for name in trained(session):
        sft = session.config.block(name, "sft")
        check_patterns(sft, session.model.params, f"methods.{name}.sft: ")
        session.teacher_of(sft.distill)
    check_probes(session)
    check_branches(session)
    return check_merges(session) | check_decodings(session)


def trained(session: Session) -> list[str]:
    return [name for name, method in session.config.methods.items() if method.probe is None]


def check_merges(session: Session) -> dict[str, str]:
    """Refuse a wrong α or path pattern, and a reference that is not there; the digest of each reference."""
    references: dict[str, tuple[Any, str]] = {}
    for name in trained(session):
        config = session.config.block(name, "merge")
        if config.rule == "none":
            continue
        try:
            if config.reference != "anchor" and config.reference not in references:
                references[config.reference] = shapes_and_digest(session, config.reference)
            reference, _ = references.get(config.reference, (None, ""))
            for number in range(1, session.config.rounds + 1):
                for alpha in merge.candidates(config, number, session.config.rounds):
                    if span := merge.importance_span(alpha):
                        alpha = {"**": list(span)}
                    merged = functools.partial(merge.merged, config=config, alpha=alpha, key=jax.random.key(0))
                    jax.eval_shape(merged, session.model.params, session.model.params, reference=reference)
        except (ValueError, TypeError) as error:
            raise UserError(f"methods.{name}.merge: {error}") from error
    return {path: digest for path, (_, digest) in references.items()}


def shapes_and_digest(session: Session, path: str) -> tuple[Any, str]:
    params = read_reference(session.weights, path)
    return jax.eval_shape(lambda: params), checkpoint.digest(params)


def check_decodings(session: Session) -> dict[str, str]:
    """Refuse models that cannot decide beside the run's; the digest of each."""
    found: dict[str, str] = {}
    for name in trained(session):
        decode = session.config.block(name, "sampling").decode
        if not set(decode.paths.values()) <= found.keys():
            found |= digests(compose(session.model, decode), decode)
    return found


def digests(together: Model, decode: Decode) -> dict[str, str]:
    """The digest of each model beside the first, under its path."""
    return {
        path: checkpoint.digest(together.params["models"][str(i)]) for i, path in enumerate(decode.paths.values(), 1)
    }


def join_models(weights: Weights, model: Model, decode: Decode) -> Model:
    """A model with those that decide beside it; refused if they are not those that the run began with."""
    together = compose(model, decode)
    for path, digest in digests(together, decode).items():
        check_unchanged(weights, f"sampling.decode: {path}", path, digest)
    return together


def check_probes(session: Session) -> None:
    """Refuse a rule that does not take what a probe gives it: its parameters, as many models as there will be."""
    for name, method in session.config.methods.items():
        probe = method.probe
        if probe is None or probe.kind != "merge":
            continue
        count = session.config.block(probe.of, "sft").snapshots
        by_rule = functools.partial(merge_by_rule, rule=probe.rule, parameters=probe.parameters)
        try:
            jax.eval_shape(by_rule, [session.model.params] * count, session.model.params)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"methods.{name}.probe: {probe.rule} of {count} checkpoints: {error}") from error


def check_branches(session: Session) -> None:
    """Refuse a rule that cannot merge the branches of a method: its parameters, as many models as there will be."""
    for name, method in session.config.methods.items():
        branch = session.config.block(name, "branch")
        if method.probe is not None or branch.count == 1:
            continue
        by_rule = functools.partial(merge_by_rule, rule=branch.rule, parameters=branch.parameters)
        try:
            jax.eval_shape(by_rule, [session.model.params] * branch.count, session.model.params)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"methods.{name}.branch: {branch.rule} of {branch.count} branches: {error}") from error


def read_reference(weights: Weights, path: str) -> Params:
    """The weights that imm's deltas are measured from; refused if they are not those the run began with."""
    try:
        params = load_model(path, sharding=functools.partial(sharding_of, weights.mesh)).params
    except UserError as error:
        raise UserError(f"merge.reference: {error}") from None
    check_unchanged(weights, f"merge.reference={path}", path, checkpoint.digest(params))
    return params


def check_unchanged(weights: Weights, where: str, path: str, digest: str) -> None:
    """Raise where the model at a path is another than when the run began."""
    record = weights.journal.committed("base/load") or {}
    if record.get("references", {}).get(path, digest) != digest:
        raise UserError(
            f"{where}: the weights changed since this run began; restore them or choose another folder with out=DIR"
        )
