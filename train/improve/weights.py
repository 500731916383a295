"""The weights of a run, by the names of the phases that made them.

Weights go from phase to phase as arrays on the mesh; Orbax keeps a copy for the next start. What an earlier start
made is read back, and a probe's model is made again from its inputs, since that is cheap and exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import jaxmerge

from ..evaluate.change import by_layer
from ..log import UserError
from ..models.decoder import Params, shapes
from ..models.experts import stacks_of
from ..models.open import Model, load_source, with_date
from ..runtime import checkpoint
from ..runtime.journal import Journal
from ..runtime.jsonl import Row
from ..runtime.mesh import shardings
from .plan import BASE, Phase, Plan
from .settings import Improve


class Weights:
    """The base model, the weights held in memory, and the checkpoints of a run.

    Attributes:
      held: weights of phases that later ones will read, by the phase's name.
    """

    def __init__(self, config: Improve, journal: Journal, todo: Plan, mesh: jax.sharding.Mesh):
        self.config, self.journal, self.todo, self.mesh = config, journal, todo, mesh
        self.held: dict[str, Params] = {}
        self._loaded: Model | None = None

    @property
    def model(self) -> Model:
        """The base model, loaded when first needed, and checked to be the one the run began with."""
        if self._loaded is None:
            model = with_date(load_source(self.config.model, self.mesh, seed=self.config.seed), self.journal.root)
            record = self.journal.committed(f"{BASE}/load")
            found = checkpoint.digest(model.params)
            if record is not None and record["digest"] != found:
                raise UserError(
                    f"{self.config.model.path or 'model.random'}: the weights changed since this run began "
                    f"(digest {found[:12]}…, then {record['digest'][:12]}…); restore them or choose another folder "
                    "with out=DIR"
                )
            trained = [name for name, method in self.config.methods.items() if method.probe is None]
            if any(self.config.block(name, "merge").offload for name in trained):
                model = dataclasses.replace(model, params=jaxmerge.offload(model.params))
            self._loaded = model
        return self._loaded

    def model_of(self, name: str) -> Model:
        """The model that a phase made."""
        return self.with_params(self.get(name))

    def with_params(self, params: Params) -> Model:
        """The run's model with other weights."""
        return dataclasses.replace(self.model, params=params)

    def get(self, name: str) -> Params:
        """The weights a phase made: held, read from its checkpoint, or (probes) made again from its inputs."""
        if name == BASE:
            return jaxmerge.onload(self.model.params)
        if name not in self.held:
            phase = self.todo[name]
            if phase.kind == "probe":
                self.held[name], _ = self.make_probe(phase)
            else:
                self.held[name] = self.read(self.folder(name) / "weights")
        return self.held[name]

    def digest(self, name: str) -> str:
        """The digest of a committed phase's weights."""
        record = self.journal.committed(f"{BASE}/load" if name == BASE else name)
        assert record is not None, f"{name} is read before it is committed"
        return record["digest"]

    # --- on disk ---

    def folder(self, name: str) -> Path:
        """Where a phase keeps its weights, snapshots and resumable state."""
        return self.journal.root / "checkpoints" / name

    def read(self, path: Path) -> Params:
        like = shapes(self.model.config)
        return checkpoint.load_weights(path, checkpoint.abstract(like, shardings(self.mesh, like)))

    def keep(self, phase: Phase, params: Params) -> Row:
        """Put weights on disk and in memory; what the record says of them."""
        checkpoint.save_weights(self.folder(phase.name) / "weights", params)
        self.held[phase.name] = params
        return {"digest": checkpoint.digest(params), "change": by_layer(params, self.get(BASE))}

    def release(self, still_read: Collection[str]) -> None:
        """Let go of held weights that no later phase reads."""
        self.held = {name: params for name, params in self.held.items() if name in still_read}

    def snapshots(self, name: str) -> list[Path]:
        """The snapshots of a fine-tuning run in the order of their steps; the last one is its result."""
        home = self.folder(name)
        early = sorted((home / "snapshots").glob("[0-9]*"), key=lambda p: int(p.name))
        return [*early, home / "weights"]

    # --- branches ---

    def join(self, phase: Phase) -> Params:
        """What a round's branches are merged into."""
        return joined(phase, self.get)

    # --- probes ---

    def make_probe(self, phase: Phase) -> tuple[Params, Row]:
        """A probe's weights from its inputs, and what its record says of them unless it was searched."""
        base, settings = self.get(BASE), phase.settings
        kind = settings["kind"]
        if kind == "expo":
            alpha, tuned = settings["alpha"], self.get(phase.inputs["tuned"])
            return jaxmerge.extrapolate([tuned], base=base, alpha=alpha), {"coefficients": {"alpha": alpha}}
        if kind == "line":
            # λ = 0 and λ = 1 are the two models to the bit; beyond 1 this extrapolates.
            t, tuned = settings["coefficient"], self.get(phase.inputs["tuned"])
            return jaxmerge.interpolate([base, tuned], t=t), {"coefficients": {"lambda": t}}
        if kind == "merge":
            models = [self.read(path) for path in self.snapshots(phase.inputs["tuned"])]
            try:
                merged = merge_by_rule(models, base, rule=settings["rule"], parameters=settings["parameters"])
            except (TypeError, ValueError, KeyError) as error:
                raise UserError(f"{phase.name}: {settings['rule']}: {error}") from error
            return merged, {"coefficients": settings["parameters"], "snapshots": list(range(len(models)))}
        chosen, numbers = self.ranked(phase, 1 if kind == "best" else settings["best"])
        if kind == "best":
            return chosen[0], {"coefficients": {}, "snapshots": numbers}
        if settings["search"]:
            record = self.journal.committed(phase.name)
            assert record is not None, f"{phase.name} is searched before it is read"
            found = record["coefficients"]["found"]
            return jaxmerge.exme_merge(chosen, base)(**found), {}
        return merge_extrapolated(chosen, base, settings["alphas"], settings["weights"], numbers)

    def ranked(self, phase: Phase, count: int) -> tuple[list[Params], list[int]]:
        """The best checkpoints on validation, the best first, and their numbers."""
        record = self.journal.committed(phase.inputs["rank"])
        assert record is not None, f"{phase.inputs['rank']} is read before it is committed"
        paths, best = self.snapshots(phase.inputs["tuned"]), record["best"][:count]
        return [self.read(paths[i]) for i in best], best


def merge_extrapolated(
    chosen: Sequence[Params], base: Params, alphas: Sequence[float], weights: Sequence[float], numbers: Sequence[int]
) -> tuple[Params, Row]:
    """ExMe with given coefficients; its record has a note where the checkpoints make it ExPO."""
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


def joined(phase: Phase, get: Callable[[str], Params]) -> Params:
    """Merge the branches of a join phase by its rule; `get` finds weights by the name of their phase."""
    ends = [get(name) for role, name in phase.inputs.items() if role.startswith("branch")]
    try:
        return merge_by_rule(ends, get(phase.inputs["model"]), **phase.settings)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{phase.name}: {phase.settings['rule']}: {error}") from error


def merge_by_rule(models: list[Params], base: Params, *, rule: str, parameters: Mapping[str, Any]) -> Params:
    """A rule of the library on a round's checkpoints."""
    merge = jaxmerge.RULES[rule]
    given = {"stacked": stacks_of(base), **parameters}
    return merge(models, base=None if merge.needs.base == "none" else base, **given)
