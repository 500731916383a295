r"""Decay shapes, and the weights of snapshots that stand for them.

A run at a constant rate whose snapshots are merged stands for a run whose rate decays (WSM, Tian et al.,
https://arxiv.org/abs/2507.17634). With snapshots $\theta_0, \dots, \theta_{N-1}$ and a curve from $d_0 = 1$ down to
$d_N = 0$,

$$\sum_j c_j \theta_j = \theta_0 + \sum_{j \ge 1} d_j\,(\theta_j - \theta_{j-1}), \qquad c_j = d_j - d_{j+1},$$

so what the run did between two snapshots counts by $d_j$, as if the rate had been multiplied by it. The equation is
exact; that the updates of a decayed run are those times $d_j$ holds to first order in the rate.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

from ..log import UserError
from ..resolve import at_least


class Curve:
    """A decay curve; a shape overrides `at`, or `points` where the curve depends on the number of snapshots."""

    def at(self, share: float) -> float:
        """d at this share of the way, from 1 at 0 to 0 at 1."""
        raise NotImplementedError

    def points(self, count: int) -> list[float]:
        """d_0 = 1, …, d_count = 0."""
        return [self.at(j / count) for j in range(count)] + [0.0]

    def coefficients(self, count: int) -> list[float]:
        """The weights c of `count` snapshots, the oldest first; they sum to 1.

        Example:
          >>> Linear().coefficients(4)
          [0.25, 0.25, 0.25, 0.25]
        """
        return [now - after for now, after in itertools.pairwise(self.points(count))]


@dataclasses.dataclass(frozen=True)
class Linear(Curve):
    r"""The rate falls along a line, $d = 1 - x$: the plain mean of the snapshots (SMA of PMA)."""

    name: Literal["linear"] = "linear"
    """The decay has this shape. The other keys of this block depend on it."""

    def points(self, count):
        return [(count - j) / count for j in range(count + 1)]


@dataclasses.dataclass(frozen=True)
class Cosine(Curve):
    r"""The rate falls like half a cosine, $d = (1 + \cos \pi x)/2$: snapshots of the middle count most."""

    name: Literal["cosine"] = "cosine"
    """The shape of the decay."""

    def at(self, share):
        return (1 + math.cos(math.pi * share)) / 2


@dataclasses.dataclass(frozen=True)
class OneMinusSqrt(Curve):
    r"""The rate falls fast, then slowly, $d = 1 - \sqrt{x}$: the oldest snapshots count most (1-sqrt of WSD)."""

    name: Literal["1-sqrt"] = "1-sqrt"
    """The shape of the decay."""

    def at(self, share):
        return 1 - math.sqrt(share)


@dataclasses.dataclass(frozen=True)
class Rising(Curve):
    r"""The snapshots count by their numbers, $c_j \propto j + 1$ (WMA of PMA): the rate falls late.

    References:
      Li et al., "Model Merging in Pre-training of Large Language Models", https://arxiv.org/abs/2505.12082 (PMA)
    """

    name: Literal["wma"] = "wma"
    """The shape of the decay."""

    def points(self, count):
        return [1 - j * (j + 1) / (count * (count + 1)) for j in range(count + 1)]


@dataclasses.dataclass(frozen=True)
class Ema(Curve):
    r"""The snapshots count $c_j \propto a^{N-1-j}$: an exponential moving average of them (EMA of PMA)."""

    name: Literal["ema"] = "ema"
    """The shape of the decay."""
    keep: float = 0.8
    """A snapshot counts this many times as much as the one after it; this key is a, above 0 and below 1."""

    def __post_init__(self):
        if not 0 < self.keep < 1:
            raise UserError(f"sft.beside.decay.keep is {self.keep}; it must lie between 0 and 1")

    def points(self, count):
        whole = -math.expm1(count * math.log(self.keep))
        return [-math.expm1((count - j) * math.log(self.keep)) / whole for j in range(count + 1)]


@dataclasses.dataclass(frozen=True)
class Parts(Curve):
    r"""The snapshots are cut into equal parts, and count by the weight of their part: constant within blocks."""

    name: Literal["parts"] = "parts"
    """The shape of the decay."""
    weights: tuple[float, ...] = (1.0,)
    """The parts have these weights, the oldest first; only the ratios of the weights matter."""

    def __post_init__(self):
        if not all(w >= 0 for w in self.weights) or not sum(self.weights) > 0:
            raise UserError(f"sft.beside.decay.weights is {list(self.weights)}; give numbers from 0 on, one above 0")

    def points(self, count):
        if count < len(self.weights):
            raise UserError(
                f"sft.beside.decay has {len(self.weights)} weights, but {count} snapshots are merged; give fewer"
            )
        each = [self.weights[j * len(self.weights) // count] for j in range(count)]
        return [math.fsum(each[j:]) / math.fsum(each) for j in range(count + 1)]


Decay = Linear | Cosine | OneMinusSqrt | Rising | Ema | Parts
DECAYS: dict[str, type[Curve]] = {
    "linear": Linear,
    "cosine": Cosine,
    "1-sqrt": OneMinusSqrt,
    "wma": Rising,
    "ema": Ema,
    "parts": Parts,
}
"""By name: what `sft.beside.decay` may be."""


@dataclasses.dataclass(frozen=True)
class Beside:
    """Merging beside the trainer: snapshots are summed into one extra copy of the weights while the run goes on."""

    every: int = 0
    """A snapshot is taken every so many updates, counted back from the last one; 0 takes none."""
    decay: Decay | None = None
    """The run returns a merge of its snapshots that stands in for this decay of the learning rate; null returns the
    last weights."""
    last: float = 1.0
    """The snapshots of this last share of the run are merged."""
    block: int | None = None
    """The mean of every so many snapshots is kept on disk, for other decays afterwards (`jaxmerge export RUN OUT
    decay.name=cosine`); null keeps none."""

    def __post_init__(self):
        at_least(self, "sft.beside", every=0)
        if not 0 < self.last <= 1:
            raise UserError(f"sft.beside.last is {self.last}; it is a share, above 0 and at most 1")
        if self.block is not None:
            at_least(self, "sft.beside", block=1)
        if self.every and self.decay is None and self.block is None:
            raise UserError(
                f"sft.beside.every is {self.every}, but nothing would come of the snapshots; give sft.beside.decay, "
                "sft.beside.block, or both"
            )
        if not self.every and (self.decay is not None or self.block is not None):
            raise UserError("sft.beside: decay and block need snapshots; give sft.beside.every")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which updates of a run are snapshots, which block each is of, and how much it counts there."""

    beside: Beside
    updates: int
    """Of the whole run."""

    @property
    def count(self) -> int:
        return (self.updates - 1) // self.beside.every + 1

    @property
    def size(self) -> int:
        """Snapshots of a block; without blocks all are one."""
        return self.beside.block or self.count

    def snapshot(self, number: int) -> int | None:
        """Which snapshot is taken after update `number` (from 1)."""
        left, over = divmod(self.updates - number, self.beside.every)
        return None if over else self.count - 1 - left

    def weights(self, decay: Decay | None, last: float) -> list[float]:
        """What every snapshot of the run counts: 0 before the last share."""
        merged = max(1, round(last * self.count))
        return [0.0] * (self.count - merged) + (decay or Linear()).coefficients(merged)

    def blocks(self) -> list[tuple[list[float], float]]:
        """Of every block: what its snapshots count in its mean (they sum to 1), and what the mean counts in the result.

        A block that is not merged is a plain mean.
        """
        each = self.weights(self.beside.decay, self.beside.last)
        found = []
        for start in range(0, self.count, self.size):
            part = each[start : start + self.size]
            total = math.fsum(part)
            found.append(([w / total for w in part] if total else [1 / len(part)] * len(part), total))
        return found

    def remerged(self, decay: Decay | None, last: float) -> list[float]:
        """What the mean of every block counts under another decay.

        Raises:
          UserError: within a block it is not that of the run times a constant, so that no weight of the mean is it.
        """
        each, found = self.weights(decay, last), []
        for number, (inside, _) in enumerate(self.blocks()):
            start = number * self.size
            part = each[start : start + self.size]
            total = math.fsum(part)
            if any(abs(w - total * share) > 1e-9 * max(part) for w, share in zip(part, inside, strict=True)):
                raise UserError(
                    f"block {number} (snapshots {start} to {start + len(part) - 1}) is kept as one mean, and this "
                    f"decay weighs its snapshots {spelt(part)} where the run weighed them {spelt(inside)}; take a "
                    "decay that is constant within blocks, a last= that begins with a block, or run with "
                    "sft.beside.block=1"
                )
            found.append(total)
        return found


def spelt(numbers: Sequence[float]) -> str:
    shown = ", ".join(f"{x:.3g}" for x in numbers[:4])
    return f"[{shown}, …]" if len(numbers) > 4 else f"[{shown}]"
