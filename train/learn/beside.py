r"""Merging beside the trainer: $\sum_j c_j \theta_j$ over the snapshots of a run, in one extra copy of the weights.

Each snapshot is added to the mean of its block where the weights lie; which snapshots, and by how much they count,
`decay.py` says. A block that is whole goes to disk, if it is kept, and its memory is the next one's.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..log import UserError
from ..models.decoder import Params
from ..resolve import build, to_dict
from ..runtime import checkpoint
from ..runtime.disk import write_durably
from ..runtime.processes import on_first
from .decay import Beside, Decay, Schedule

BLOCKS = "blocks"  # in the folder of a run, or of its phase
PLAN = "blocks.json"


def begun(params: Params) -> Params:
    """The memory of a block: zeros, float32, like the weights."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


@functools.partial(jax.jit, donate_argnums=0)
def add(total: Params, params: Params, weight: jax.Array, keep: jax.Array) -> Params:
    """keep · total + weight · params; `total` is donated.

    Args:
      keep: 1, or 0 where a new block begins.
    """
    return jax.tree.map(lambda t, p: keep * t + weight * p.astype(jnp.float32), total, params)


class Stream:
    """What a run does for its snapshots; it remembers nothing, so that a resumed run does the same."""

    def __init__(self, config: Beside, updates: int):
        if config.every >= updates:
            raise UserError(f"sft.beside.every is {config.every}, but there are only {updates} steps; lower it")
        self.schedule = Schedule(config, updates)
        self.blocks = self.schedule.blocks()

    def taken(self, total: Params, params: Params, number: int) -> tuple[Params, int | None]:
        """The block's mean with the weights after update `number` in it, and the number of the block if it is whole."""
        index = self.schedule.snapshot(number)
        if index is None:
            return total, None
        block, place = divmod(index, self.schedule.size)
        inside, _ = self.blocks[block]
        weight = jnp.float32(inside[place])
        if place == 0 or weight:
            total = add(total, params, weight, jnp.float32(place > 0))
        return total, block if place == len(inside) - 1 else None


class Blocks:
    """The means of a run's blocks, below `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def keep(self, mean: Params, number: int, schedule: Schedule) -> None:
        """Write a whole block; it appears under its number only when whole."""
        plan = {"updates": schedule.updates, "beside": to_dict(schedule.beside)}
        on_first(write_durably, self.folder / PLAN, json.dumps(plan, indent=1))
        checkpoint.save_weights(self.folder / str(number), mean)

    def schedule(self) -> Schedule:
        """What the blocks are of, as the run that wrote them said."""
        if not (self.folder / PLAN).is_file():
            raise UserError(
                f"{self.folder}: no blocks of snapshots there; a run with sft.beside.every and sft.beside.block writes "
                "them"
            )
        found = json.loads((self.folder / PLAN).read_text(encoding="utf-8"))
        return Schedule(build(Beside, found["beside"], f"{self.folder / PLAN}: beside"), found["updates"])

    def merged(self, weights: list[float], like: Any) -> Params:
        """Σ of the blocks' means times `weights`, float32.

        Args:
          like: shapes and shardings of the weights.
        """
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), like)
        total = jax.jit(lambda: begun(like), out_shardings=jax.tree.map(lambda x: x.sharding, like))()
        for number, weight in enumerate(weights):
            if weight:
                mean = checkpoint.load_weights(self.folder / str(number), wanted)
                total = add(total, mean, jnp.float32(weight), jnp.float32(1))
        return total


def remerge(folder: Path, like: Params, decay: Decay, last: float) -> Params:
    """The snapshots of a finished run merged by another decay, exactly; in the dtypes of `like`.

    Args:
      folder: of the blocks. like: the weights of the run.

    Raises:
      UserError: the decay is not constant within a block; names it.
    """
    blocks = Blocks(folder)
    try:
        weights = blocks.schedule().remerged(decay, last)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return jax.tree.map(lambda ours, given: ours.astype(given.dtype), blocks.merged(weights, like), like)
