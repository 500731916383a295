r"""Training some entries of a parameter: its gradient and its moments are vectors of these entries alone.

The optimizer sees, in place of a parameter, the vector of its chosen entries; what it changes is written back, and no
other entry is touched. So the moments take the memory of the entries, with any optimizer that works entry by entry.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge.tree import leaf_paths, path_name

Places = dict[str, Any]
"""By path: places in the flattened parameter, ascending, int32 [k]."""


class Chosen(NamedTuple):
    """The state of an optimizer of chosen entries."""

    places: Places
    inner: Any
    """optax's state for the vectors of the entries."""


class Entries:
    """Says which entries are trained of which parameters; settings of a jitted function, so it is hashable."""

    def places(self, params: Mapping[str, Any]) -> Places:
        """The places in each parameter that is trained in part.

        Args:
          params: the parameters by path.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Slices(Entries):
    """Rows or columns."""

    slices: tuple[tuple[str, int, tuple[int, ...]], ...]
    """(path, axis, indices along it)."""

    def places(self, params):
        found = {}
        for path, axis, at in self.slices:
            size = math.prod(params[path].shape)
            every = jnp.arange(size, dtype=jnp.int32).reshape(params[path].shape)
            found[path] = every.take(jnp.asarray(at, jnp.int32), axis).reshape(-1)
        return {path: jnp.sort(places) for path, places in found.items()}


@dataclasses.dataclass(frozen=True)
class Principal(Entries):
    """The (m + n)·budget entries of a matrix [m, n] that are largest in its best approximation of a rank."""

    paths: tuple[str, ...]
    rank: int
    budget: int

    def places(self, params):
        return {path: principal(params[path], self.rank, self.budget) for path in self.paths}


def principal(weight: Any, rank: int, budget: int) -> Any:
    """Places [k] of the entries of largest magnitude in the truncated SVD, k = min((m + n)·budget, m·n)."""
    rows, columns = weight.shape
    u, s, v = jnp.linalg.svd(weight.astype(jnp.float32), full_matrices=False)
    kept = (u[:, :rank] * s[:rank]) @ v[:rank]
    _, places = jax.lax.top_k(jnp.abs(kept).reshape(-1), min((rows + columns) * budget, rows * columns))
    return jnp.sort(places.astype(jnp.int32))


def gathered(tree: Any, places: Places) -> Any:
    """The tree with the chosen entries [k] in place of the leaves that have some."""
    return by_path(lambda path, leaf: leaf.reshape(-1)[places[path]] if path in places else leaf, tree)


def scattered(tree: Any, part: Any, places: Places) -> Any:
    """The inverse of `gathered`: entries that are not chosen are those of `tree`, bit for bit."""

    def put(path: str, leaf: Any, new: Any) -> Any:
        if path not in places:
            return new
        flat = leaf.reshape(-1).at[places[path]].set(new, unique_indices=True, indices_are_sorted=True)
        return flat.reshape(leaf.shape)

    return by_path(put, tree, part)


def renewed(entries: Entries, params: Any, state: Chosen) -> Chosen:
    """The state of entries chosen anew: entries that stay keep their moments, those of new ones are 0."""
    leaves = dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))
    places = entries.places(leaves)

    def carried(path: tuple[Any, ...], moment: Any) -> Any:
        name = next((name for i in range(len(path)) if (name := path_name(path[i:])) in places), None)
        if name is None or moment.shape != state.places[name].shape:
            return moment
        old, new = state.places[name], places[name]
        at = jnp.clip(jnp.searchsorted(old, new), 0, old.size - 1)
        return jnp.where(old[at] == new, moment[at], jnp.zeros((), moment.dtype))

    return Chosen(places, jax.tree_util.tree_map_with_path(carried, state.inner))


def by_path(change: Any, tree: Any, *others: Any) -> Any:
    """`tree` with every leaf changed, knowing its path."""
    leaves, structure = jax.tree.flatten(tree)
    more = [structure.flatten_up_to(other) for other in others]
    return structure.unflatten([change(*each) for each in zip(leaf_paths(tree), leaves, *more, strict=True)])


@functools.lru_cache(maxsize=8)
def renewing(entries: Entries, places: Any) -> Any:
    """A jitted `renewed` of (params, state), whose state is donated and lies where it lay.

    Args:
      places: the shardings of the state's leaves, as a tuple.
    """

    def renew(params: Any, state: Chosen) -> Chosen:
        found = renewed(entries, params, state)
        leaves, structure = jax.tree.flatten(found)
        laid = [jax.lax.with_sharding_constraint(x, place) for x, place in zip(leaves, places, strict=True)]
        return structure.unflatten(laid)

    return jax.jit(renew, donate_argnums=1)
