"""Keys of `jaxmerge statistics`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..resolve import at_least
from ..runtime.settings import Distributed, Mesh


@dataclasses.dataclass(frozen=True)
class Read:
    """How the examples are read, as `data` of `sft` has it."""

    format: str | None = None
    """The lines have this format; null tells it by their keys."""
    split: str = "train"
    """This split of a TFDS version or of a dataset on the hub is read."""
    ignore: tuple[str, ...] = ()
    """These keys of the lines are passed over; other unknown keys are errors."""
    learn: Literal["assistant", "last", "each"] = "assistant"
    """These turns of a conversation are the answer."""
    chat_template: str = ""
    """Conversations are rendered with this Jinja file in place of the model's own template."""


@dataclasses.dataclass(frozen=True)
class StatisticsOptions:
    """What is measured of a model for merge rules that read data."""

    kind: Literal["fisher", "gram"]
    """The diagonal Fisher information of every parameter is measured (fisher), or the Gram matrix of what enters every
    linear layer (gram)."""
    data: Read = dataclasses.field(default_factory=Read)
    limit: int | None = None
    """This many examples are read, from the beginning of the file; null takes all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Every matmul of the model takes its operands in this precision; sums are float32."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)

    def __post_init__(self):
        if self.limit is not None:
            at_least(self, "statistics", limit=1)
