"""How sequences are drawn from a model, as configured."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from ..log import UserError
from ..resolve import at_least, read_date
from ..runtime.settings import Distributed, Mesh
from .decodings import Alone, Decode

COLDEST = 1e-30
"""Temperatures below it are greedy: divided by them, logits would leave float32."""


def check_top_p(top_p: float, where: str) -> None:
    if not 0 < top_p <= 1:
        raise UserError(f"{where}.top_p is {top_p}; it must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class Draw:
    """How sequences are drawn, and when they end; blocks of configs that say so inherit from it."""

    samples: int = 1
    """This many sequences are drawn for each prompt."""
    temperature: float = 0.0
    """Logits are divided by it; 0, or what is below 1e-30, takes the likeliest token each time."""
    top_k: int = 0
    """Only the k likeliest tokens are drawn from; 0 takes all."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities reach this sum are drawn from; 1 takes all."""
    max_new_tokens: int = 64
    """A sequence ends after this many tokens."""
    stop: tuple[str, ...] = ()
    """A sequence ends before the first of these strings; a special token may be one of them."""
    slots: int = 64
    """This many sequences are decoded side by side; no result depends on it."""

    BLOCK: ClassVar[str] = "settings"
    """The block's name in messages."""

    def __post_init__(self):
        at_least(self, self.BLOCK, samples=1, max_new_tokens=1, slots=1, temperature=0, top_k=0)
        check_top_p(self.top_p, self.BLOCK)
        if self.samples > 1 and self.greedy:
            raise UserError(
                f"{self.BLOCK}.samples is {self.samples} at temperature {self.temperature:g}: they would all be the "
                "same; set temperature above 0 or samples=1"
            )
        if "" in self.stop:
            raise UserError(f"{self.BLOCK}.stop holds an empty string; leave it out")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature < COLDEST

    def settings(self, *, dtype: str, gather: bool, stop: tuple[str, ...] | None = None) -> Settings:
        """What the engine is given: this, on a model of a precision and a mesh; `stop` in place of the block's own."""
        drawn: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(Draw)}
        if stop is not None:
            drawn["stop"] = stop
        return Settings(**drawn, dtype=dtype, gather=gather)


@dataclasses.dataclass(frozen=True)
class Settings(Draw):
    """How sequences are drawn, and how the model that draws them computes."""

    dtype: str = "float32"
    """Every matmul takes its operands in this precision."""
    gather: bool = False
    """Weights are whole over fsdp while decoding."""


@dataclasses.dataclass(frozen=True)
class SampleOptions(Draw):
    """Keys of `jaxmerge sample`."""

    max_new_tokens: int = 128
    """A sequence ends after this many tokens."""
    seed: int = 0
    """The sequences are drawn with this seed."""
    chat: bool | None = None
    """Prompts are rendered through the chat template; null does so if the model has one."""
    date: str | None = None
    """Chat templates that ask for today's date are told this one, written as 2026-01-31; null tells them today's."""
    decode: Decode = dataclasses.field(default=Alone())
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Every matmul takes its operands in this precision."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)

    BLOCK: ClassVar[str] = "sample"

    def __post_init__(self):
        super().__post_init__()
        if self.date is not None:
            read_date(self.date, f"{self.BLOCK}.date")
