"""Settling a mask when a run begins: how important the weights are for its first batches, and what is trained then."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp

from jaxmerge.tree import named_leaves

from ..models.config import ModelConfig
from ..models.decoder import Params
from ..models.loss import READ, Compute, loss_sums
from ..runtime.mesh import shardings
from .batches import RowSource
from .beside import begun
from .masks import Given
from .objectives import ResponseOnly
from .settings import Sft
from .shares import Shares
from .sparse import Entries
from .stay import held


def settled(
    config: Sft, model: ModelConfig, params: Params, rows: RowSource, *, mesh: jax.sharding.Mesh, seed: int, dtype: str
) -> tuple[Sft, Entries | None]:
    """The settings with what `config.mask` freezes in `stay.freeze`, and the entries that are trained of the rest.

    A resumed run settles the same, from the weights that it began with.
    """
    plain = dataclasses.replace(
        config, epochs=1, objective=ResponseOnly(), batch=config.micro_batch or config.batch, micro_batch=None
    )

    @functools.cache
    def importance(batches: int) -> dict[str, jax.Array]:
        given = itertools.islice(Shares(mesh, plain).batches(rows, seed=seed), batches)
        total, weight = jax.jit(lambda: begun(params), out_shardings=shardings(mesh, params))(), jnp.float32(0)
        for batch in given:
            flat = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in READ if name in batch}
            total, weight = _add(model, params, flat, Compute(dtype), total, weight)
        return named_leaves(jax.tree.map(lambda w, g: jnp.abs(w.astype(jnp.float32) * g / weight), params, total))

    shapes = {path: leaf.shape for path, leaf in named_leaves(params).items()}
    given = Given(model, shapes, seed, importance)
    frozen = config.mask.frozen(given)
    stay = dataclasses.replace(config.stay, freeze=(*config.stay.freeze, *frozen))
    return dataclasses.replace(config, stay=stay), config.mask.entries(given) if config.mask.sparse else None


def share_trained(config: Sft, params: Params, entries: Entries | None) -> float:
    """Numbers that are trained by settled settings, as a share of all."""
    leaves = named_leaves(params)
    kept = jax.tree.leaves(held(config.stay.freeze, params)) or [False] * len(leaves)
    places = {} if entries is None else jax.eval_shape(entries.places, leaves)
    sizes = {path: math.prod(leaf.shape) for path, leaf in leaves.items()}
    parts = {path: math.prod(leaf.shape) for path, leaf in places.items()}
    trained = sum((sizes | parts)[path] for path, is_kept in zip(leaves, kept, strict=True) if not is_kept)
    return trained / sum(sizes.values())


@functools.partial(jax.jit, static_argnums=(0, 3), donate_argnums=4)
def _add(model: ModelConfig, params: Params, batch: dict[str, jax.Array], how: Compute, total: Params, weight):
    (_, more), grads = jax.value_and_grad(lambda p: loss_sums(model, p, batch, how), has_aux=True)(params)
    return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads), weight + more
