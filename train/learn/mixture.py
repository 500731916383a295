r"""An endless stream of examples from several sources at given rates: position i of it is a pure function of the seed.

The source at each position follows a fixed schedule of one period (the common denominator of the rates), so that
after n draws no source is a whole example away from its rate: $|c_k(n) - r_k n| < 1$ for every n. Within
a source every example comes once an epoch, in an order drawn from (seed, source, epoch). So the state of a reader is
one integer, and any number of processes reads disjoint shares of the same stream.

References:
  Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): the schedule and its bound.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ..log import UserError

LONGEST_PERIOD = 100_000


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources of `sizes` examples, drawn at `rates`.

    Attributes:
      sizes: examples in each source.
      rates: of each source, relative to the others; () draws each in proportion to its size, so that one epoch holds
        every example of every source once.
      seed: of the orders.

    Example:
      >>> mixture = Mixture((3, 100), (0.5, 0.5), seed=0)
      >>> sources, examples = mixture.draw(0, 6)
      >>> sources.tolist(), sorted(examples[sources == 0].tolist())
      ([0, 1, 0, 1, 0, 1], [0, 1, 2])
    """

    sizes: tuple[int, ...]
    rates: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self):
        if not self.sizes or any(n < 1 for n in self.sizes):
            raise UserError(f"mixture: the sources hold {list(self.sizes)} examples; each needs one or more")
        if self.rates and len(self.rates) != len(self.sizes):
            raise UserError(f"mixture: {len(self.rates)} rates for {len(self.sizes)} sources; give each one")
        if any(not (rate > 0 and math.isfinite(rate)) for rate in self.rates):
            raise UserError(f"mixture: rates {list(self.rates)}; each must be positive (leave a source out for 0)")
        if self.period > LONGEST_PERIOD:
            raise UserError(
                f"mixture: rates {list(self.rates)} repeat only after {self.period:,} draws (at most"
                f" {LONGEST_PERIOD:,}); write them with fewer digits"
            )

    @functools.cached_property
    def shares(self) -> tuple[Fraction, ...]:
        """Exact share of each source; they add up to 1."""
        # A rate is what was written, 0.1 and not its binary neighbour.
        weights = [Fraction(str(rate)) for rate in self.rates] or [Fraction(n) for n in self.sizes]
        return tuple(w / sum(weights) for w in weights)

    @functools.cached_property
    def period(self) -> int:
        """Draws after which the schedule repeats. Without rates the stream is one shuffled list: period 1."""
        return math.lcm(*(share.denominator for share in self.shares)) if self.rates else 1

    @property
    def epoch(self) -> int:
        """Draws until every example of every source has come once; sources with higher rates repeat meanwhile."""
        if not self.rates:
            return sum(self.sizes)
        # Source k has had c draws for certain once share·n ≥ c; the schedule may be quicker by part of an example.
        return max(self._position_of_draw(k, n - 1) for k, n in enumerate(self.sizes)) + 1

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and example numbers, int64 [stop − start] each, of positions start … stop − 1 of the stream."""
        if not self.rates:
            return self._draw_from_all(start, stop)
        schedule, before = self._schedule
        cycles, at = np.divmod(np.arange(start, stop), self.period)
        sources = schedule[at]
        draws = cycles * before[-1, sources] + before[at, sources]  # how often the source was drawn before
        return sources, np.array([self._example(k, d) for k, d in zip(sources, draws, strict=True)], np.int64)

    def _draw_from_all(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Without rates: one permutation of all examples an epoch."""
        total, bounds = sum(self.sizes), np.cumsum((0, *self.sizes))
        epochs, at = np.divmod(np.arange(start, stop), total)
        chosen = np.array([permutation(self.seed, 0, int(e), total)[i] for e, i in zip(epochs, at, strict=True)])
        sources = np.searchsorted(bounds, chosen, side="right") - 1 if len(chosen) else np.zeros(0, np.int64)
        return sources, (chosen - bounds[sources]).astype(np.int64)

    def _example(self, source: int, draw: int) -> int:
        epoch, at = divmod(int(draw), self.sizes[source])
        return permutation(self.seed, int(source), epoch, self.sizes[source])[at]

    def _position_of_draw(self, source: int, draw: int) -> int:
        """Position in the stream of draw number `draw` of a source."""
        schedule, before = self._schedule
        cycles, within = divmod(draw, int(before[-1, source]))
        return cycles * self.period + int(np.flatnonzero(schedule == source)[within])

    @functools.cached_property
    def _schedule(self) -> tuple[np.ndarray, np.ndarray]:
        """Sources of one period [P], and how often each was drawn before a position [P + 1, K]."""
        schedule = chairman([int(share * self.period) for share in self.shares])
        hits = schedule[:, None] == np.arange(len(self.sizes))
        return schedule, np.concatenate([np.zeros((1, len(self.sizes)), np.int64), np.cumsum(hits, axis=0)])


def chairman(quotas: Sequence[int]) -> np.ndarray:
    r"""Order quotas[k] draws of each source so that every beginning holds them in proportion.

    At draw j the sources with $r_k j - c_k \ge 1/(2K-2)$ may be drawn, and of these the one that must be
    drawn soonest is. In integers throughout: r_k = quotas[k] / P, all scaled by P·(2K − 2).

    Returns:
      int64 [P], with |c_k(j) − r_k j| ≤ 1 − 1/(2K−2) after every j.

    Example:
      >>> chairman([3, 1]).tolist()
      [0, 0, 1, 0]
    """
    K, P = len(quotas), sum(quotas)
    if K == 1:
        return np.zeros(P, np.int64)
    unit = 2 * K - 2
    counts, order = [0] * K, np.zeros(P, np.int64)
    for j in range(1, P + 1):
        lead = [unit * (q * j - P * c) for q, c in zip(quotas, counts, strict=True)]  # unit·P·(r j − c)
        due = [k for k in range(K) if lead[k] >= P]
        # (1 − 1/unit − (r j − c)) / r, compared crosswise without fractions: ties go to the first source.
        soonest = min(due, key=lambda k: Fraction((unit - 1) * P - lead[k], quotas[k]))
        order[j - 1] = soonest
        counts[soonest] += 1
    return order


@functools.lru_cache(maxsize=64)
def permutation(seed: int, source: int, epoch: int, size: int) -> np.ndarray:
    """Order of a source's examples in an epoch."""
    drawn = np.random.Generator(np.random.Philox(key=[seed, (source << 32) + epoch])).permutation(size)
    drawn.setflags(write=False)  # shared by all who ask
    return drawn
