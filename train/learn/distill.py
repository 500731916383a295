r"""Distillation: what is learnt is the next-token distributions of a teacher, at every token of a completion.

The loss is $\sum_t w_t\,D(p_\theta(\cdot \mid x, y_{<t}), p_T(\cdot \mid x', y_{<t})) / \sum_t w_t$ over whole
vocabularies. On the examples of a file it is classic distillation; on the student's own samples y it is on-policy
distillation (Agarwal et al., https://arxiv.org/abs/2306.13649, GKD), and no gradient flows through the sampling. The
teacher is another model that reads what the student reads, x' = x; or, in `improve`, the moving average of the student
itself, which reads a prompt x' with the demonstration in it (Shenfeld et al., https://arxiv.org/abs/2601.19897, SDFT).

Here are the settings; train/learn/teacher.py has the teacher.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from ..log import UserError
from ..models.settings import Source


class Apart:
    """A divergence D of the student's next-token distribution p from the teacher's, q: settings that can be called.

    With a temperature both are those of the logits divided by it; there is no factor T² (Hinton's), the learning rate
    has it.
    """

    function: ClassVar[str]
    """Its name in models/divergence.py."""

    def __post_init__(self):
        for name, value in self.options().items():
            if not 0 < value < 1:
                raise UserError(
                    f"sft.distill.divergence.{name} is {value}; it must lie in (0, 1): the ends are called forward and "
                    "reverse"
                )

    def options(self) -> dict[str, float]:
        """What the function is given beside the distributions: the settings apart from the name."""
        return {name: value for name, value in vars(self).items() if name != "name"}

    def __call__(self, p: Any, q: Any, labels: Any) -> Any:
        """D of log p and log q, [..., V]: one number ≥ 0 for each token."""
        from ..models.divergence import DIVERGENCES  # settings are read without jax, which takes a second

        return DIVERGENCES[self.function](p, q, labels, **self.options())


@dataclasses.dataclass(frozen=True)
class ReverseKL(Apart):
    r"""$\mathrm{KL}(p_\theta \| p_T)$: the student keeps to what the teacher holds likely."""

    function: ClassVar[str] = "reverse"
    name: Literal["reverse"] = "reverse"
    """This divergence is minimised. The other keys of this block depend on it."""


@dataclasses.dataclass(frozen=True)
class ForwardKL(Apart):
    r"""$\mathrm{KL}(p_T \| p_\theta)$: the student covers all that the teacher does."""

    function: ClassVar[str] = "forward"
    name: Literal["forward"] = "forward"
    """The divergence."""


@dataclasses.dataclass(frozen=True)
class SkewedKL(Apart):
    r"""$\mathrm{KL}(p_T \| \alpha p_T + (1 - \alpha) p_\theta)$, at most $-\log \alpha$ (Ko et al.)."""

    function: ClassVar[str] = "skewed"
    name: Literal["skewed"] = "skewed"
    """The divergence."""
    alpha: float = 0.1
    """α: this share of the first distribution is mixed into the second; 0 would be forward."""


@dataclasses.dataclass(frozen=True)
class SkewedReverseKL(Apart):
    r"""$\mathrm{KL}(p_\theta \| \alpha p_\theta + (1 - \alpha) p_T)$, at most $-\log \alpha$ (Ko et al.)."""

    function: ClassVar[str] = "skewed_reverse"
    name: Literal["skewed_reverse"] = "skewed_reverse"
    """The divergence."""
    alpha: float = 0.1
    """α: this share of the first distribution is mixed into the second; 0 would be reverse."""


@dataclasses.dataclass(frozen=True)
class GeneralisedJSD(Apart):
    r"""$\beta\,\mathrm{KL}(p_T \| m) + (1 - \beta)\,\mathrm{KL}(p_\theta \| m)$ with a mixture m of both.

    $m = \beta p_T + (1 - \beta) p_\theta$. Divided by β it goes to forward KL as β → 0, divided by 1 − β to reverse KL
    as β → 1 (Agarwal et al., equation 1 and below).
    """

    function: ClassVar[str] = "jsd"
    name: Literal["jsd"] = "jsd"
    """The divergence."""
    beta: float = 0.5
    """β: the teacher has this share in the mixture; the gradients are like those of forward near 0, and like those of
    reverse near 1."""


Divergence = ReverseKL | ForwardKL | SkewedKL | SkewedReverseKL | GeneralisedJSD


@dataclasses.dataclass(frozen=True)
class Distill:
    """`sft.distill`: a teacher whose next-token distributions are learnt; null learns what the objective says alone."""

    teacher: Source | None = None
    """The teacher is this model, of any size and the same vocabulary; null is the moving average of the student, which
    `improver: distill` shows the demonstration."""
    divergence: Divergence = ReverseKL()
    temperature: float = 1.0
    """The logits of both are divided by it before they are compared."""
    share: float = 1.0
    """The loss is this share of the divergence and for the rest the objective's; 1 computes the divergence alone."""
    ema: float = 0.99
    """The moving average that teaches where `teacher` is null keeps this share of itself at every update."""

    def __post_init__(self):
        if not self.temperature > 0:
            raise UserError(f"sft.distill.temperature is {self.temperature}; it must be above 0")
        if not 0 < self.share <= 1:
            raise UserError(
                f"sft.distill.share is {self.share}; it must be above 0 and at most 1; leave distill out for 0"
            )
        if not 0 <= self.ema < 1:
            raise UserError(f"sft.distill.ema is {self.ema}; it must lie in [0, 1)")

    @property
    def by_itself(self) -> bool:
        """Whether the student's own average teaches."""
        return self.teacher is None

    @property
    def apart(self) -> Tempered:
        """D of the loss, temperature and all: a divergence of models/divergence.py."""
        return Tempered(self.divergence, self.temperature)


@dataclasses.dataclass(frozen=True)
class Tempered:
    """A divergence of distributions whose logits are divided by a temperature first."""

    divergence: Divergence
    temperature: float

    def __call__(self, p: Any, q: Any, labels: Any) -> Any:
        if self.temperature != 1:
            import jax  # settings are read without jax, which takes a second

            p, q = (jax.nn.log_softmax(x / self.temperature) for x in (p, q))
        return self.divergence(p, q, labels)
