"""Training an adapter: the weights are frozen, and what the step changes is A and B beside them (models/lora.py)."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from ..models.config import Lora
from ..models.decoder import Params
from ..models.lora import attach, init_lora, merge_lora
from ..runtime.mesh import shardings

DRAW = "draw"
"""Key of the batch that holds each row's number, [B] uint32; a number is used once in a run, so that no two rows share
a dropout mask."""


class Frozen(NamedTuple):
    """What a step reads and does not change."""

    params: Params
    key: jax.Array
    """uint32 [2], of the dropout masks."""


def freeze(lora: Lora, params: Params, mesh: jax.sharding.Mesh, *, seed: int) -> tuple[Params, Frozen]:
    """A new adapter on the mesh, and the weights beside it."""
    make = functools.partial(init_lora, lora, jax.eval_shape(lambda: params))
    where = shardings(mesh, jax.eval_shape(make, jax.random.key(0)))
    start, masks = jax.random.split(jax.random.key(seed))
    return jax.jit(make, out_shardings=where)(start), Frozen(params, jax.random.key_data(masks))


def joined(lora: Lora, frozen: Frozen, adapter: Params, part: dict[str, jax.Array]) -> Params:
    """Parameters for the loss of (part of) a batch: masks are drawn anew for each."""
    key = jax.random.fold_in(jax.random.wrap_key_data(frozen.key), part[DRAW][0]) if lora.dropout else None
    return attach(lora, frozen.params, adapter, key=key)


def joined_whole(lora: Lora, frozen: Frozen, adapter: Params) -> Params:
    """Parameters of the model as it is used, no dropout."""
    return attach(lora, frozen.params, adapter)


def numbered(batch: dict[str, np.ndarray], step: int, rows: int, share: np.ndarray) -> dict[str, np.ndarray]:
    """The batch with a number a row, from step and row alone: a resumed run draws what an undisturbed one does.

    Args:
      rows: of the whole batch. share: those that `batch` has.
    """
    return {**batch, DRAW: (step * rows + share).astype(np.uint32)}


def merged(lora: Lora, frozen: Frozen, adapter: Params) -> Params:
    """W + s·B·A, each matrix where and of the dtype that W is."""
    where = jax.tree.map(lambda x: x.sharding, frozen.params)
    return jax.jit(functools.partial(merge_lora, lora), out_shardings=where)(frozen.params, adapter)


def share(params: Params, adapter: Params) -> float:
    """Numbers that are trained, as a share of all."""
    count = [sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for tree in (adapter, params)]
    return count[0] / count[1]
