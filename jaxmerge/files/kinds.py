"""The kinds of recipe, and the plan of each: merges of tensors, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxmerge.files import plan as merges
from jaxmerge.files.checkpoints.source import Source
from jaxmerge.files.experts import plan as mixtures
from jaxmerge.files.experts.gates import States
from jaxmerge.files.experts.recipe import Experts
from jaxmerge.files.plan import Plan
from jaxmerge.files.recipe import Recipe

AnyRecipe = Recipe | Experts


def make(
    of: AnyRecipe,
    sources: Mapping[str, Source],
    *,
    compat: str | None,
    allow: Sequence[str],
    seed: int,
    states: States | None,
    dry_run: bool = False,
) -> Plan:
    """Resolve a recipe of either kind for open checkpoints; see `plan.make` and `experts.plan.make`."""
    if isinstance(of, Experts):
        return mixtures.make(of, sources, seed=seed, states=states, dry_run=dry_run)
    return merges.make(of, sources, compat=compat, allow=allow)
