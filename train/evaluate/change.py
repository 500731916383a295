r"""How far weights have moved, $\|\theta - \theta_0\|_F / \|\theta_0\|_F$, by layer and by kind of matrix."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

import jaxmerge
from jaxmerge.tree import named_leaves
from jaxmerge.where import KINDS as IN_LAYERS
from jaxmerge.where import kind as kind_in_layer
from jaxmerge.where import layer_index

from ..models.decoder import Params
from ..models.stacked import unstack_layers

OUTSIDE = {"embed_tokens": "embed", "lm_head": "head"}
KINDS = (*IN_LAYERS, "embed", "head")


def kind_of(path: str) -> str:
    """Name the kind of matrix of a leaf: q, k, v, o, gate, up, down, norms, embed or head.

    Example:
      >>> kind_of("model/layers/3/self_attn/q_proj/weight"), kind_of("model/norm/weight"), kind_of("lm_head/weight")
      ('q', 'norms', 'head')
    """
    kind = kind_in_layer(path.replace("/", "."))
    return OUTSIDE.get(kind, kind)


def by_kind(tuned: Params, base: Params) -> dict[str, float]:
    """Return the relative change of each kind of matrix, pooled over layers: √Σ‖Δ‖² / √Σ‖θ_0‖²."""
    found = pooled(squares(tuned, base), kind_of)
    return {kind: found[kind] for kind in in_order(list(found))}


def by_layer(tuned: Params, base: Params) -> dict[str, float]:
    """Return ‖θ − θ_0‖/‖θ_0‖ of each layer group (`model/layers/3`, `model/embed_tokens`).

    A group that was zero and moved has no relative change, and is left out: Gemma's last norm before any training.
    """
    moved, own = map(jaxmerge.to_floats, _change_and_norms(unstack_layers(tuned), unstack_layers(base)))
    return {group: value for group, value in moved.items() if value != math.inf or own[group] > 0}


@jax.jit
def _change_and_norms(tuned: Params, base: Params):
    return jaxmerge.change(tuned, base), jaxmerge.norms(base)


def by_layer_and_kind(tuned: Params, base: Params) -> dict[str, list[float | None]]:
    """Return, for each kind found in layers, its relative change in layer 0, 1, …; None where a layer lacks it."""
    found = squares(tuned, base)
    inside = [path for path in found if layer_index(path) is not None]
    count = 1 + max((layer_index(path) or 0 for path in inside), default=-1)
    cells = pooled({path: found[path] for path in inside}, lambda path: (kind_of(path), layer_index(path)))
    kinds = in_order([kind for kind, _ in cells])
    return {kind: [cells.get((kind, layer)) for layer in range(count)] for kind in kinds}


def squares(tuned: Params, base: Params) -> dict[str, tuple[float, float]]:
    """Return (‖Δ‖², ‖θ_0‖²) of every leaf, in float32 on the device, once for all groupings."""
    tuned, base = unstack_layers(tuned), unstack_layers(base)
    moved = {path: jnp.sum(jnp.square(delta)) for path, delta in jaxmerge.task_vector(tuned, base).items()}
    own = {path: jnp.sum(jnp.square(leaf.astype(jnp.float32))) for path, leaf in named_leaves(base).items()}
    moved, own = jax.device_get((moved, own))
    return {path: (float(moved[path]), float(own[path])) for path in moved}


def pooled(found: dict[str, tuple[float, float]], group) -> dict:
    """Divide √Σ‖Δ‖² by √Σ‖θ_0‖² within the groups that `group(path)` names; what never moved is 0."""
    sums: dict = {}
    for path, (moved, own) in found.items():
        before = sums.get(group(path), (0.0, 0.0))
        sums[group(path)] = (before[0] + moved, before[1] + own)
    return {
        name: 0.0 if not moved else math.sqrt(moved / own) if own else math.inf for name, (moved, own) in sums.items()
    }


def in_order(kinds: list[str]) -> list[str]:
    """List each kind once, in the order in which a layer computes, others after."""
    return [k for k in KINDS if k in kinds] + sorted({k for k in kinds if k not in KINDS})
