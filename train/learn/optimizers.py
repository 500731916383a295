"""The optimizers that `sft.optimizer` may be, as settings; `optim.py` computes them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ..log import UserError
from ..resolve import at_least


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101)."""

    name: Literal["adamw"] = "adamw"
    """This optimizer makes the updates. The other keys of this block depend on it."""
    b1: float = 0.9
    """The mean gradient is an exponential average that keeps this share of itself at every update."""
    b2: float = 0.999
    """The mean squared gradient is an exponential average that keeps this share of itself at every update."""
    eps: float = 1e-8
    """This number is added to the root of the mean squared gradient."""
    eps_root: float = 0.0
    """This number is added to the mean squared gradient, under the root."""
    nesterov: bool = False
    """If true, the mean gradient looks one update ahead, as Nesterov's momentum does."""

    def __post_init__(self):
        shares(self, "b1", "b2")


@dataclasses.dataclass(frozen=True)
class Lion:
    """The sign of a mean gradient (Chen et al., https://arxiv.org/abs/2302.06675); wants a lower rate than AdamW."""

    name: Literal["lion"] = "lion"
    """The optimizer."""
    b1: float = 0.9
    """The update is the sign of a sum of mean gradient and new gradient, and the mean has this share in it."""
    b2: float = 0.99
    """The mean gradient is an exponential average that keeps this share of itself at every update."""

    def __post_init__(self):
        shares(self, "b1", "b2")


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Second moments as row and column means (Shazeer and Stern, https://arxiv.org/abs/1804.04235): little memory."""

    name: Literal["adafactor"] = "adafactor"
    """The optimizer."""
    min_dim_size_to_factor: int = 128
    """Second moments are kept as row and column means if both sides of a matrix have at least this size."""
    decay_rate: float = 0.8
    """Update n keeps the share 1 − n^−c of the second moment; this key is c."""
    decay_offset: int = 0
    """The first update counts as if this many had been made before it."""
    multiply_by_parameter_scale: bool = True
    """If true, an update is multiplied by the root mean square of its parameter."""
    clipping_threshold: float | None = 1.0
    """A parameter's update is scaled down to this root mean square where it is larger; null clips none."""
    momentum: float | None = None
    """Updates are averaged exponentially, and the average keeps this share of itself each time; null averages none."""
    eps: float = 1e-30
    """This number is added to the squared gradient."""
    factored: bool = True
    """If false, every second moment is kept whole."""

    def __post_init__(self):
        shares(self, "momentum")


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    """The optimizer."""
    momentum: float | None = None
    """Gradients are summed, and the sum keeps this share of itself at every update; null takes the gradient alone."""
    nesterov: bool = False
    """If true, the sum looks one update ahead, as Nesterov's momentum does."""

    def __post_init__(self):
        shares(self, "momentum")


@dataclasses.dataclass(frozen=True)
class Muon:
    """Orthogonalised momentum for the layers' matrices, Adam for the rest (https://kellerjordan.github.io/posts/muon)."""

    name: Literal["muon"] = "muon"
    """The optimizer."""
    ns_steps: int = 5
    """The Newton-Schulz iteration that makes a mean gradient orthogonal takes this many steps."""
    beta: float = 0.95
    """A matrix's mean gradient is an exponential average that keeps this share of itself at every update."""
    eps: float = 1e-8
    """This number is added to denominators, in Adam too."""
    nesterov: bool = True
    """If true, mean gradients look one update ahead, as Nesterov's momentum does; in Adam too."""
    adaptive: bool = False
    """If true, an update is multiplied by the dual norm of its gradient (https://arxiv.org/abs/2409.20325)."""
    preconditioning: Literal["frobenius", "spectral", "aol", "schatten"] = "frobenius"
    """A matrix is scaled by this norm before the first Newton-Schulz step."""
    adam_b1: float = 0.9
    """Adam updates embeddings, head, norms and biases, and this is its `b1`."""
    adam_b2: float = 0.999
    """Adam updates embeddings, head, norms and biases, and this is its `b2`."""
    adam_eps_root: float = 0.0
    """Adam updates embeddings, head, norms and biases, and this is its `eps_root`."""
    consistent_rms: float | None = None
    """Every matrix's update is scaled to this root mean square, whatever its shape; 0.2 suits rates that were chosen
    for AdamW. null scales by the root of max(1, out/in) instead."""

    def __post_init__(self):
        shares(self, "beta", "adam_b1", "adam_b2")
        at_least(self, "sft.optimizer", ns_steps=1)


@dataclasses.dataclass(frozen=True)
class ScheduleFree:
    """AdamW whose momentum is an average of its weights (Defazio et al., https://arxiv.org/abs/2405.15682).

    The average is what is measured, kept and returned. The schedule should be constant after its warm-up.
    """

    name: Literal["schedule_free"] = "schedule_free"
    """The optimizer."""
    b1: float = 0.9
    """Gradients are taken at a mix of weights and average, and the average has this share in it."""
    b2: float = 0.999
    """The AdamW inside has this `b2`."""
    eps: float = 1e-8
    """The AdamW inside has this `eps`."""
    weight_lr_power: float = 2.0
    """In the average, the weights after an update count by the largest rate so far to this power."""

    def __post_init__(self):
        shares(self, "b1", "b2")
        if self.b1 == 0:
            raise UserError("sft.optimizer.b1 is 0; schedule_free divides by it: give a number above 0, or take adamw")


def shares(optimizer: Any, *names: str) -> None:
    """Raise what is not a share of something that is kept."""
    for name in names:
        value = getattr(optimizer, name)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"sft.optimizer.{name} is {value}; it must lie in [0, 1)")


Optimizer = AdamW | Lion | Adafactor | Sgd | Muon | ScheduleFree
