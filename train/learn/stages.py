r"""Examples in stages: in each, a share of every source, all epochs of it before the next stage begins.

Dual-stage mixed fine-tuning (DMT) is two stages: all of the special data, then all of the general data with the share k
of the special: `data.parts: [{path: SPECIAL, stages: [1, k]}, {path: GENERAL, stages: [0, 1]}]`. The paper's k is 1/256
to 1; its stages are two runs, each with a schedule of its own, here one schedule goes over both.

References:
  Dong et al., "How Abilities in Large Language Models are Affected by Supervised Fine-tuning Data Composition",
  https://arxiv.org/abs/2310.05492
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .mixture import permutation

SUBSET = 1 << 31
"""Stands in place of an epoch in the order by which shares are drawn."""


def staged(
    sizes: Sequence[int], shares: Sequence[Sequence[float]], epochs: int, seed: int
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    r"""Sources and example numbers, int64 each, of every pass through a stage, in `epochs` groups of as many passes.

    Stage i takes round(share · n) examples of a source of n, at least one where the share is above 0. A smaller share
    is a part of a larger one of the same source. A stage is gone through `epochs` times, each in another order.

    Args:
      sizes: examples in each source.
      shares: of each source, its shares in the stages.

    Example:
      >>> (((first, _), (second, _)),) = staged([4, 2], [[1, 0.25], [0, 1]], epochs=1, seed=0)
      >>> first.tolist(), sorted(second.tolist())
      ([0, 0, 0, 0], [0, 1, 1])
    """
    passes = []
    for stage in range(len(shares[0])):
        counts = [count(n, of[stage]) for n, of in zip(sizes, shares, strict=True)]
        sources = np.repeat(np.arange(len(sizes)), counts)
        members = [permutation(seed, k, SUBSET, n)[:c] for k, (n, c) in enumerate(zip(sizes, counts, strict=True))]
        examples = np.concatenate(members)
        for epoch in range(epochs):
            order = permutation(seed, len(sizes) + stage, epoch, len(sources))
            passes.append((sources[order], examples[order]))
    stages = len(shares[0])
    return [passes[i * stages : (i + 1) * stages] for i in range(epochs)]


def count(size: int, share: float) -> int:
    """The examples that a share is of so many.

    Example:
      >>> count(1000, 1 / 256), count(10, 0.01), count(10, 0)
      (4, 1, 0)
    """
    return min(size, max(1, round(share * size))) if share else 0
