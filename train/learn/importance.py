r"""Settling a mask when a run begins: importance of the weights for its first batches, and what the mask makes of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from jaxmerge.tree import named_leaves

from ..models.config import ModelConfig
from ..models.decoder import Params
from ..models.loss import Compute, loss_sums
from ..runtime.mesh import shardings
from .batches import RowSource
from .beside import begun
from .masks import Given
from .objectives import ResponseOnly
from .settings import Sft
from .shares import Shares
from .sparse import Entries


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
            total, weight = _add(model, params, batch, Compute(dtype), total, weight)
        return named_leaves(jax.tree.map(lambda w, g: jnp.abs(w.astype(jnp.float32) * g / weight), params, total))

    shapes = {path: leaf.shape for path, leaf in named_leaves(params).items()}
    given = Given(model, shapes, seed, importance)
    frozen = config.mask.frozen(given)
    stay = dataclasses.replace(config.stay, freeze=(*config.stay.freeze, *frozen))
    return dataclasses.replace(config, stay=stay), config.mask.entries(given)


def share_trained(config: Sft, params: Params, entries: Entries | None) -> float:
    """Numbers that are trained by settled settings, as a share of all."""
    kept = held(config.stay.freeze, params)
    shapes = jax.eval_shape(functools.partial(optim.start, config, frozen=None, entries=entries), params)
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(params)]
    vectors = {} if entries is None else {path: len_of(x) for path, x in shapes.places.items()}
    trained = [
        0 if is_kept else vectors.get(path, size)
        for path, size, is_kept in zip(leaf_paths(params), sizes, jax.tree.leaves(kept), strict=True)
    ]
    return sum(trained) / sum(sizes)


@functools.partial(jax.jit, static_argnums=(0, 3), donate_argnums=4)
def _add(model: ModelConfig, params: Params, batch: dict[str, jax.Array], how: Compute, total: Params, weight):
    (_, more), grads = jax.value_and_grad(lambda p: loss_sums(model, p, batch, how), has_aux=True)(params)
    return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads), weight + more
