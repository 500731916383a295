"""Each process reads the rows of a batch that its devices take, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ..runtime.mesh import batch_sharding
from . import frozen as adapters
from .batches import Batch, RowSource, batches, steps_of
from .settings import Sft


class Shares:
    """Batches of `config` on `mesh`.

    Args:
      mesh: over all processes; rows lie over its axes data and fsdp where a micro-batch divides over them.
    """

    def __init__(self, mesh: jax.sharding.Mesh, config: Sft):
        self.config = config
        self.where = batch_sharding(mesh, config.micro_batch or config.batch)
        places = self.where.addressable_devices_indices_map((config.batch,)).values()
        mine = np.zeros(config.batch, bool)
        for (rows,) in places:  # type: ignore[misc]  # one axis, one slice
            mine[rows] = True
        self.rows = np.flatnonzero(mine)
        """Numbers of the rows that this process's devices take, ascending."""

    def batches(self, rows: RowSource, *, seed: int, start: int = 0) -> Iterator[dict[str, jax.Array]]:
        """The batches of `batches(rows, …)` as arrays on the mesh, from step `start` on."""
        total, objective = steps_of(rows, self.config), self.config.objective
        for number, batch in enumerate(batches(rows, self.config, seed=seed, start=start, share=self.rows), start):
            numbers = number * self.config.batch + self.rows
            shown = objective.inputs(batch["tokens"], batch["weights"], numbers=numbers, seed=seed, done=number / total)
            if shown is not None:
                batch = {**batch, "inputs": shown}
            yield self._numbered(batch, number)

    def put(self, batch: Batch, number: int) -> dict[str, jax.Array]:
        """A whole batch, which every process has, as arrays on the mesh; `number` is as that of a step."""
        return self._numbered({name: values[self.rows] for name, values in batch.items()}, number)

    def _numbered(self, batch: Batch, number: int) -> dict[str, jax.Array]:
        if self.config.lora is not None:
            batch = adapters.numbered(batch, number, self.config.batch, self.rows)
        return {name: self._place(values) for name, values in batch.items()}

    def _place(self, values: np.ndarray) -> jax.Array:
        if len(self.rows) == self.config.batch:
            return jax.device_put(values, self.where)
        shape = (self.config.batch, *values.shape[1:])

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(self.config.batch)
            return values[np.searchsorted(self.rows, np.arange(first, last))]

        return jax.make_array_from_callback(shape, self.where, part)
