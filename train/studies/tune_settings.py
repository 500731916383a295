"""Keys of `jaxmerge tune`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Literal

from jaxmerge.strategies import CLIMBING, STRATEGIES

from ..log import UserError


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """How the coefficients of a recipe are searched."""

    strategy: Literal["grid", "coordinate", "golden", "cma_es", "gradient", "frank_wolfe"] = "coordinate"
    """The next coefficients are chosen in this way; `gradient` and `frank_wolfe` need score=likelihood."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The strategy takes these options, as {points: 9, rounds: 2}."""
    score: Literal["accuracy", "likelihood"] = "accuracy"
    """A candidate is judged by its accuracy on the questions, or by the mean log-probability a token of their answers,
    for which the file may be of any format that `sft` learns from."""
    test: float = 0.5
    """This share of the questions is kept for the test, which the chosen coefficients and the recipe's start take once
    each."""
    split_seed: int = 0
    """The questions of the test are drawn with this seed."""
    seed: int | None = None
    """Random masks are drawn with this seed; null takes the recipe's."""
    compat: Literal["mergekit"] | None = None
    """If mergekit, candidates are merged as mergekit would merge them, as with `jaxmerge merge`."""
    allow: tuple[str, ...] = ()
    """Tensors that do not match are let pass as `jaxmerge merge` lets them: missing, unused, shapes."""

    def __post_init__(self):
        if not 0 < self.test < 1:
            raise UserError(f"tune: test={self.test}; wanted a share of the questions between 0 and 1")
        known = [name for name in inspect.signature(STRATEGIES[self.strategy]).parameters if name != "space"]
        if unknown := [name for name in self.options if name not in known]:
            raise UserError(
                f"tune: options.{unknown[0]}: {self.strategy} has no such option; it has {', '.join(known)}"
            )
        if self.strategy in CLIMBING and self.score != "likelihood":
            raise UserError(f"tune: strategy={self.strategy} needs score=likelihood, for accuracy has no gradient")
