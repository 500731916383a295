r"""Measures of weights: change per layer, cosines of task vectors, norms, non-finite leaves.

Functions are jittable and return arrays; `to_floats` brings a dict of them to the host in one transfer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree, where
from jaxmerge.tree import Array, PyTree


def layer_squares(params: PyTree, *, stacked: Sequence[str] = ()) -> dict[str, Array]:
    r"""Return $\sum \theta^2$ of each layer group, float32 (); stacked leaves count layer by layer."""
    total: dict[str, Array] = {}
    for path, leaf in tree.named_leaves(params).items():
        if not tree.is_merged(leaf):
            continue
        square = jnp.square(jnp.asarray(leaf).astype(tree.wide(leaf.dtype)))
        layers = where.layer_paths(path, leaf.shape, stacked)
        if layers is None:
            parts = {path: jnp.sum(square)}
        else:
            per_layer = jnp.sum(square, axis=tuple(range(1, square.ndim)))
            parts = {name: per_layer[l] for l, name in enumerate(layers)}
        for name, part in parts.items():
            group = where.layer_group(name)
            total[group] = total.get(group, jnp.zeros((), jnp.float32)) + part.astype(jnp.float32)
    return total


def change(tuned: PyTree, base: PyTree, *, stacked: Sequence[str] = ()) -> dict[str, Array]:
    r"""Return $\|\theta_l - \theta_{0,l}\|_F / \|\theta_{0,l}\|_F$ of each layer group l, float32 ().

    A group is the path up to its first integer component (`model/layers/3`), else the parent path
    (`model/embed_tokens`, `model/norm`, `lm_head`). A group whose base is zero gives 0 if it did not move,
    else infinity.

    Example:
      >>> change({"h": [{"w": jnp.array([3.0])}]}, {"h": [{"w": jnp.array([2.0])}]})
      {'h/0': Array(0.5, dtype=float32)}
    """
    moved = layer_squares(tree.task_vector(tuned, base), stacked=stacked)
    start = layer_squares(base, stacked=stacked)
    return {
        group: jnp.where(moved[group] == 0, 0.0, jnp.sqrt(moved[group]) / jnp.sqrt(start[group])) for group in moved
    }


def norms(params: PyTree, *, stacked: Sequence[str] = ()) -> dict[str, Array]:
    r"""Return $\|\theta_l\|_F$ of each layer group l, float32 ()."""
    return {group: jnp.sqrt(square) for group, square in layer_squares(params, stacked=stacked).items()}


def cosines(models: Sequence[PyTree], *, base: PyTree) -> Array:
    r"""Return the cosine matrix of the task vectors, float32 [N, N]; rows of a zero task vector are 0."""
    deltas = [tree.task_vector(model, base) for model in models]
    gram = jnp.stack([jnp.stack([tree.dot(a, b) for b in deltas]) for a in deltas])
    lengths = jnp.sqrt(jnp.diagonal(gram))
    products = lengths[:, None] * lengths[None, :]
    return jnp.where(products > 0, gram / jnp.where(products > 0, products, 1.0), 0.0)


def nonfinite(params: PyTree) -> dict[str, Array]:
    """Return how many NaN or infinite elements each floating leaf has, int32 ()."""
    return {
        path: jnp.sum(~jnp.isfinite(jnp.asarray(leaf).astype(tree.wide(leaf.dtype))), dtype=jnp.int32)
        for path, leaf in tree.merged_leaves(params).items()
    }


def check_finite(params: PyTree, name: str = "params") -> None:
    """Raise a ValueError naming the leaves of `params` with NaN or infinite elements. Host only."""
    counts = {
        path: int(count) for path, count in jax.device_get(_nonfinite(tree.merged_leaves(params))).items() if count
    }
    if counts:
        path, count = next(iter(counts.items()))
        more = f" and {len(counts) - 1} more leaves" if len(counts) > 1 else ""
        raise ValueError(
            f"{name} has {count} NaN or infinite elements in leaf {path!r}{more}; "
            "wanted finite weights: go back to the checkpoint before"
        )


_nonfinite = jax.jit(nonfinite)


def to_floats(values: Mapping[str, Any]) -> dict[str, float]:
    """Bring a dict of scalars to the host as Python floats, in one transfer."""
    return {name: float(np.asarray(value)) for name, value in jax.device_get(dict(values)).items()}
