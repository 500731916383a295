r"""From a recipe and its open sources to a list of jobs: one a tensor to write, nothing left to decide."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxmerge.files.recipe import Method
from jaxmerge.files.source import Tensor


@dataclasses.dataclass(frozen=True)
class Input:
    """A tensor that goes into a job, and the model name its random masks are keyed by."""

    model: str
    tensor: Tensor


@dataclasses.dataclass(frozen=True)
class Job:
    """One tensor of the result: which rule makes it of which inputs.

    name: in the result. path: the leaf path random masks are keyed by. dtype: floating inputs are cast to it first
    (None: as stored). out_dtype, shape: of the result. coefficients: keywords of the rule, numbers all.
    """

    name: str
    path: str
    method: Method
    inputs: tuple[Input, ...]
    base: Input | None
    coefficients: Mapping[str, Any]
    dtype: np.dtype | None
    out_dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return math.prod(self.shape) * self.out_dtype.itemsize

    @property
    def read_bytes(self) -> int:
        """Bytes of all inputs."""
        return sum(i.tensor.size for i in self.operands)

    @property
    def operands(self) -> tuple[Input, ...]:
        """Inputs, and the base if there is one."""
        return self.inputs if self.base is None else (*self.inputs, self.base)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Jobs in the order they are written; what is written beside them; what the user should know.

    companions writes config.json, tokenizer, chat template and generation config into the folder of the result.
    """

    jobs: tuple[Job, ...]
    companions: Callable[[pathlib.Path], None]
    notes: tuple[str, ...]
