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
        self.config, self.mesh = config, mesh
        self.where = batch_sharding(mesh, config.micro_batch or config.batch)
        self.rows = self._own(config.batch)
        """Numbers of the rows that this process's devices take, ascending."""

    def _own(self, rows: int) -> np.ndarray:
        """Those numbers, of a batch of so many rows."""
        mine = np.zeros(rows, bool)
        for (part,) in self.where.addressable_devices_indices_map((rows,)).values():  # type: ignore[misc]
            mine[part] = True  # one axis, one slice
        return np.flatnonzero(mine)

    def batches(self, rows: RowSource, *, seed: int, start: int = 0) -> Iterator[dict[str, jax.Array]]:
        """The batches of `batches(rows, …)` as arrays on the mesh, from step `start` on."""
        total, objective = steps_of(rows, self.config), self.config.objective
        for number, batch in enumerate(batches(rows, self.config, seed=seed, start=start, share=self.rows), start):
            numbers = number * self.config.batch + self.rows
            shown = objective.inputs(batch["tokens"], batch["weights"], numbers=numbers, seed=seed, done=number / total)
            if shown is not None:
                batch = {**batch, "inputs": shown}
            yield self._numbered(batch, number, self.rows, self.config.batch)

    def put(self, batch: Batch, number: int) -> dict[str, jax.Array]:
        """A whole batch, which every process has, as arrays on the mesh; `number` is as that of a step.

        It has `config.batch` rows, or fewer that divide over the mesh as those do.
        """
        count = len(batch["tokens"])
        own = self.rows if count == self.config.batch else self._own(count)
        return self._numbered({name: values[own] for name, values in batch.items()}, number, own, count)

    def _numbered(self, batch: Batch, number: int, own: np.ndarray, count: int) -> dict[str, jax.Array]:
        if self.config.lora is not None:
            batch = adapters.numbered(batch, number, self.config.batch, own)
        return {name: self._place(values, own, count) for name, values in batch.items()}

    def _place(self, values: np.ndarray, own: np.ndarray, count: int) -> jax.Array:
        if len(own) == count:
            return jax.device_put(values, self.where)
        shape = (count, *values.shape[1:])

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(count)
            return values[np.searchsorted(own, np.arange(first, last))]

        return jax.make_array_from_callback(shape, self.where, part)
