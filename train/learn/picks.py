r"""Which of the examples are learnt: each way of picking is its settings with the function that chooses.

A pick sees what an example says of itself (`complexity`, `quality`, `difficulty`: numbers that some scorer gave it) and
may measure the rest with the model that is about to learn (train/learn/measure.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from ..log import UserError

Embedding = Literal["mean", "last"]


class Measure(Protocol):
    """What the model says of the examples, in their order."""

    def losses(self) -> np.ndarray:
        """The mean of −log p over each example's learnt tokens, [n]."""
        ...

    def embeddings(self, kind: Embedding) -> np.ndarray:
        """A vector of length 1 for each example, [n, D]."""
        ...


class Pick:
    """Choose examples; what the ways share."""

    measures: ClassVar[bool] = True
    """Whether the model may be asked."""

    def choose(self, examples: Sequence[Mapping[str, Any]], measure: Measure) -> list[int]:
        """The numbers of the examples that are learnt, ascending."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class All(Pick):
    """Every example is learnt."""

    measures: ClassVar[bool] = False
    name: Literal["all"] = "all"
    """Examples are picked in this way. The other keys of this block depend on it."""

    def choose(self, examples, measure):
        return list(range(len(examples)))


@dataclasses.dataclass(frozen=True)
class Deita(Pick):
    r"""DEITA: by falling score $s = c \cdot q$, keep x if $\max_{k \in K} \cos(e_x, e_k) \le \tau$ for those kept, K.

    c and q are the keys `complexity` and `quality` of the examples: the paper has a trained scorer for each. Without
    `complexity` c is the example's mean loss under the model, and without `quality` q is 1: that is a stand-in and
    not the paper's measure. The embedding e is the mean of the model's last hidden states, or the last one, as in
    the paper's code, where a larger model gives it.

    References:
      Liu et al., "What Makes Good Data for Alignment? A Comprehensive Study of Automatic Data Selection in Instruction
      Tuning", https://arxiv.org/abs/2312.15685
    """

    name: Literal["deita"] = "deita"
    """DEITA: the examples of the highest scores are learnt, and none that is too like one of them."""
    count: int | None = None
    """At most this many examples are learnt; null sets no limit."""
    threshold: float = 0.9
    """An example is left out if its cosine with one that is kept is above this."""
    embedding: Embedding = "mean"
    """An example is embedded as the mean of the model's last hidden states, or as the last of them."""

    def __post_init__(self):
        if not -1 <= self.threshold <= 1:
            raise UserError(f"pick.threshold is {self.threshold}; it is a cosine, -1 to 1")
        if self.count is not None and self.count < 1:
            raise UserError(f"pick.count is {self.count}; it must be at least 1, or null for no limit")

    def choose(self, examples, measure):
        complexity = given(examples, "complexity")
        quality = given(examples, "quality")
        scores = measure.losses() if complexity is None else complexity
        return keep_apart(
            scores if quality is None else scores * quality, measure.embeddings(self.embedding),
            threshold=self.threshold, count=self.count,
        )  # fmt: skip


def keep_apart(scores: np.ndarray, vectors: np.ndarray, *, threshold: float, count: int | None = None) -> list[int]:
    """Greedily, the highest score first, keep what has no cosine above `threshold` with what is kept.

    Args:
      vectors: [n, D], of length 1.

    Returns:
      The numbers of those kept, ascending; of equal scores the first comes first.

    Example:
      >>> keep_apart(np.array([1.0, 3.0, 2.0]), np.eye(2)[[0, 0, 1]], threshold=0.5)
      [1, 2]
    """
    kept: list[int] = []
    nearest = np.full(len(scores), -np.inf)
    for i in np.argsort(-scores, kind="stable").tolist():
        if count is not None and len(kept) >= count:
            break
        if nearest[i] <= threshold:
            kept.append(i)
            nearest = np.maximum(nearest, vectors @ vectors[i])
    return sorted(kept)


@dataclasses.dataclass(frozen=True)
class Select2Reason(Pick):
    r"""Select2Reason: the examples of the highest $w \cdot r_d + (1 - w) \cdot r_l$, ranks of difficulty and length.

    $r_d$ and $r_l$ are ranks from 0 to 1 of the difficulty of the question and of the number of tokens of the trace;
    equal ones share their mean rank. The difficulty is the key `difficulty` of the examples, in a run the share of the
    question's samples that are wrong, and without either the mean loss of the example under the model. The paper's
    difficulty is that of a model that judges questions; its weight w could not be read and is a key.

    References:
      Yang et al., "Select2Reason: Efficient Instruction-Tuning Data Selection for Long-CoT Reasoning",
      https://arxiv.org/abs/2505.17266
    """

    name: Literal["select2reason"] = "select2reason"
    """Select2Reason: the examples are learnt whose questions are the hardest and whose traces are the longest."""
    share: float = 0.1
    """This share of the examples is learnt."""
    weight: float = 0.5
    """The rank of an example by its difficulty has this weight, and its rank by length has 1 less this weight."""

    def __post_init__(self):
        if not 0 < self.share <= 1 or not 0 <= self.weight <= 1:
            raise UserError(f"pick: share is {self.share} (above 0 and at most 1), weight is {self.weight} (0 to 1)")

    def choose(self, examples, measure):
        found = given(examples, "difficulty")
        difficulty = measure.losses() if found is None else found
        length = np.array([learnt_tokens(e) for e in examples], float)
        scores = self.weight * ranks(difficulty) + (1 - self.weight) * ranks(length)
        count = max(1, math.ceil(round(self.share * len(examples), 9)))
        return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, the smallest, to 1, the largest; equal values share their mean rank.

    Example:
      >>> ranks(np.array([5.0, 1.0, 5.0, 9.0])).tolist()
      [0.5, 0.0, 0.5, 1.0]
    """
    order = np.sort(values)
    below, upto = (np.searchsorted(order, values, side=side) for side in ("left", "right"))
    return (below + upto - 1) / 2 / max(1, len(values) - 1)


def learnt_tokens(example: Mapping[str, Any]) -> int:
    """The tokens of an example that are learnt."""
    return int(sum(example["learnt"])) if "learnt" in example else len(example["tokens"]) - example["prompt_length"]


def given(examples: Sequence[Mapping[str, Any]], key: str) -> np.ndarray | None:
    """A number that all examples have, or None where none has it."""
    found = [e[key] for e in examples if e.get(key) is not None]
    if found and len(found) < len(examples):
        raise UserError(
            f"pick: {len(found)} of {len(examples)} examples have the key {key}; give it to all, or to none"
        )
    return np.array(found, float) if found else None


Picking = All | Deita | Select2Reason
PICKS: dict[str, type[Pick]] = {"all": All, "deita": Deita, "select2reason": Select2Reason}
"""By name: what `data.pick` and `selection.pick` may be."""
