r"""SEC: which family the next questions are of is chosen by how much the model learns from each.

Each family is an arm of a bandit. Its value follows the mean absolute advantage of its samples,
$Q \leftarrow (1-\eta) Q + \eta\, \overline{|A|}$, from 0 on; families that a step did not ask keep theirs. A question's
family is drawn with probabilities $\mathrm{softmax}(Q / T)$, then the question within it.

References:
  Chen et al., "Self-Evolving Curriculum for LLM Reasoning", https://arxiv.org/abs/2505.14970
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ..log import UserError

TOLD = "advantage/"
"""What the metrics of a step call the mean absolute advantage of a family's samples: this and its name."""


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """SEC's bandit over families."""

    rate: float = 0.5
    """η: after each step that asked a family, its value is 1 − η times the old one and η times that of the step."""
    temperature: float = 1.0
    """T: families are drawn by the softmax of their values divided by T; with a low T the best family is nearly always
    drawn."""

    def __post_init__(self):
        if not 0 < self.rate <= 1 or not self.temperature > 0:
            raise UserError(
                f"improver.curriculum: rate is {self.rate} (above 0, at most 1), temperature is {self.temperature} "
                "(above 0)"
            )


def values_of(curriculum: Curriculum, families: Sequence[str], log: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Q of each family after the steps of a log. It is no state of its own: a resumed run has the log."""
    values = np.zeros(len(families))
    for metrics in log:
        for i, family in enumerate(families):
            if TOLD + family in metrics:
                values[i] += curriculum.rate * (metrics[TOLD + family] - values[i])
    return values


def probabilities(curriculum: Curriculum, values: np.ndarray) -> np.ndarray:
    exponents = np.exp((values - values.max()) / curriculum.temperature)
    return exponents / exponents.sum()


def chosen_by_bandit(
    curriculum: Curriculum,
    categories: Sequence[str],
    log: Sequence[Mapping[str, float]],
    count: int,
    key: Sequence[int],
) -> np.ndarray:
    """Numbers of `count` different questions; a family that has no more gives way to the others.

    Args:
      categories: the family of each question. key: what the draws depend on, beside the log.
    """
    families = sorted(set(categories))
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, 0x5EC])))
    left = [draw.permutation([i for i, c in enumerate(categories) if c == family]).tolist() for family in families]
    shares = probabilities(curriculum, values_of(curriculum, families, log))
    chosen = []
    for _ in range(count):
        able = shares * [len(questions) > 0 for questions in left]
        chosen.append(left[draw.choice(len(families), p=able / able.sum())].pop())
    return np.array(chosen)


def told_of_categories(categories: Sequence[str], advantages: Sequence[np.ndarray]) -> dict[str, float]:
    """Of each family asked, the mean absolute advantage of its samples."""
    found: dict[str, list[np.ndarray]] = {}
    for category, values in zip(categories, advantages, strict=True):
        found.setdefault(category, []).append(np.abs(values))
    return {TOLD + category: float(np.mean(np.concatenate(values))) for category, values in found.items()}
