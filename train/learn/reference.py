"""Log-probabilities of a reference model, computed once before the training and then a part of the rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from ..log import UserError, say
from ..models.config import ModelConfig
from ..models.decoder import Params
from ..models.loss import Compute, token_logps
from ..runtime.processes import to_host
from .batches import Batch, RowSource
from .objectives import ResponseOnly
from .pairs import Groups
from .settings import Sft
from .shares import Shares


@dataclasses.dataclass(frozen=True)
class InOrder:
    """Rows one after another."""

    rows: RowSource

    def count(self, epoch: int) -> int:
        return self.rows.count(epoch)

    def take(self, chosen: np.ndarray, epoch: int) -> Batch:
        return self.rows.take(chosen, epoch)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        del seed
        return np.arange(self.rows.count(epoch))

    def summary(self) -> dict[str, Any]:
        return self.rows.summary()


def with_reference(
    model: ModelConfig, params: Params, rows: RowSource, config: Sft, how: Compute, *, mesh: jax.sharding.Mesh
) -> RowSource:
    """The rows with `reference`: the log-probabilities of their tokens under `params`.

    As many rows as in a forward pass of a step are computed at a time. The same rows and weights give the same bits, so
    a run that goes on computes what it had.
    """
    if not isinstance(rows, Groups):
        raise UserError(f"sft.objective: {config.objective.name} needs a reference, which rows of one answer lack")
    once = dataclasses.replace(
        config,
        epochs=1,
        batch=config.micro_batch or config.batch,
        micro_batch=None,
        lora=None,
        objective=ResponseOnly(),
    )
    say(f"log-probabilities of the reference: {rows.count(0):,} rows")
    found = [to_host(_logps(model, params, batch, how)) for batch in Shares(mesh, once).batches(InOrder(rows), seed=0)]
    reference = np.concatenate(found)[: rows.count(0)]
    return dataclasses.replace(rows, beside={**rows.beside, "reference": reference})


@functools.partial(jax.jit, static_argnums=(0, 3))
def _logps(model: ModelConfig, params: Params, batch: dict[str, jax.Array], how: Compute) -> jax.Array:
    return token_logps(model, params, batch, how)
