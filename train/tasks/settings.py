"""Which questions are asked and learnt from, as configured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ..log import UserError
from .task import DOMAINS, SPLITS, Domain, Split


@dataclasses.dataclass(frozen=True)
class Ingredient:
    """One family of the pretraining text.

    Attributes:
      family: The examples are of this family, which must have a compact rendering.
      share: This share of the examples is drawn from it, relative to the other ingredients' shares.
      args: These are the generator's ranges.
      learn: Every token is learnt (all), or those of the solution alone: what is shown to be judged should not be
        learnt.
    """

    family: str
    share: float
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    learn: Literal["all", "solution"] = "all"

    def __post_init__(self):
        if not self.share > 0:
            raise UserError(
                f"pretraining: the share of {self.family} is {self.share!r}; give a positive number, or leave it out"
            )


@dataclasses.dataclass(frozen=True)
class FamilySpec:
    """How many questions of one family to draw, and from which ranges.

    Attributes:
      family: The questions come from the generator of this name, or from a file or a dataset of the hub for gsm8k,
        choice, problem and mbpp (docs/data.md).
      domain: Its accuracy is reported under this word: id is learnt from; harder, ood and unseen are not.
      args: These are the generator's own settings, such as `{"min_value": 1, "max_value": 130}`.
      train: This many training questions are drawn; only the in-domain family needs them.
      validation: This many validation questions are drawn.
      test: This many test questions are drawn.
    """

    family: str
    domain: Domain
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train: int = 0
    validation: int = 0
    test: int = 0

    def __post_init__(self):
        if self.domain not in DOMAINS:
            raise UserError(f"tasks: family {self.family}: domain is {self.domain!r}; choose one of {DOMAINS}")
        for split in SPLITS:
            count = self.count(split)
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise UserError(
                    f"tasks: family {self.family}: {split} is {count!r}; give a number of questions, 0 or more"
                )
        if not self.train + self.validation + self.test:
            raise UserError(
                f"tasks: family {self.family} ({self.domain}) asks for no questions at all;"
                " give at least one of train, validation, test"
            )
        reserved = sorted({"seed", "size"} & set(self.args))
        if reserved:
            raise UserError(
                f"tasks: family {self.family}: args sets {', '.join(reserved)}; the suite chooses these so that"
                " splits stay apart. Set the run's seed and the counts train, validation, test instead"
            )

    def count(self, split: Split) -> int:
        """Questions asked for in `split`."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Which problems: the in-domain family trained on, the others only evaluated."""

    families: tuple[FamilySpec, ...] = ()
    style: Literal["instruct", "compact"] = "instruct"
    """Questions are worded in this style. instruct: in English, for a pretrained model. compact: as
    `prompt?work#answer`, for the miniature."""
    seed: int = 0
    """The questions are drawn with this seed; it is not the run's seed, so that runs can share their questions."""
    few_shot: int = 0
    """This many worked examples stand before each question (for base models that follow no instruction)."""
