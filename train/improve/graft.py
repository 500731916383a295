"""How a `graft` probe learns which parameters of a tuned model to keep; `jaxmerge.learn_mask` does it."""

from __future__ import annotations

import dataclasses

from ..log import UserError
from ..resolve import at_least


@dataclasses.dataclass(frozen=True)
class Graft:
    """The mask of a graft: which changes it begins with, and how it is learned."""

    density: float = 0.01
    """The mask begins with this share of each tensor, its largest changes."""
    questions: int = 64
    """The mask is learned on the worked solutions of this many training questions, the first ones."""
    passes: int = 20
    """The learning goes over these solutions this often; the best mask after any pass is taken, or the start."""
    learning_rate: float = 0.3
    """Adam moves the scores of the mask at this rate; they begin at ±`bias`."""
    bias: float = 3.0
    """A parameter's score begins at plus or minus this and changes sides at 0, so it leaves or joins the mask after
    about `bias` / `learning_rate` steps in one direction."""
    penalty: float = 0.0
    """This times the share of parameters in the mask is added to the loss, in nats a token; above 0, parameters that
    do not matter leave the mask."""

    def __post_init__(self):
        at_least(self, "graft", questions=1, passes=1, penalty=0)
        if not 0 < self.density <= 1:
            raise UserError(f"graft.density is {self.density}; it must lie in (0, 1]")
        if self.learning_rate <= 0 or self.bias <= 0:
            raise UserError(f"graft: learning_rate is {self.learning_rate} and bias {self.bias}; both must be above 0")
