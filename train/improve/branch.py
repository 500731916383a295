r"""Branch-and-Merge (BaM): a round's examples are split, each part tunes a model of its own, and the models are merged.

From the model θ that a round starts from, with the examples D in N parts $D_1 \ldots D_N$:
$\theta' = \mathrm{merge}(\mathrm{sft}(\theta, D_1), \ldots, \mathrm{sft}(\theta, D_N))$. The paper takes two parts at a
time, merges them by SLERP or by their mean, and starts the next pair from what came out; here a round is such a step.
`branch: {count: 2, rule: slerp}` with `sft: {start: merged}` and no further merge is the paper's method. A merge with
an anchor may follow, as in any round.

References:
  Alexandrov et al., "Mitigating Catastrophic Forgetting in Language Transfer via Model Merging",
  https://arxiv.org/abs/2407.08699. The pages read were its abstract and the caption of its first figure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import jaxmerge

from ..log import UserError
from ..resolve import at_least
from ..runtime.jsonl import Row


@dataclasses.dataclass(frozen=True)
class Branch:
    """Into how many models a round's fine-tuning branches, and how they are merged into one."""

    count: int = 1
    """A round's examples are split into this many parts, by questions; each part fine-tunes a model of its own from the
    same start, and the models are merged. 1 trains one model on all examples."""
    rule: str = "average"
    """The branches are merged by this rule, any of `jaxmerge.RULES` that needs no data: average, slerp (two branches),
    multislerp or ties; deltas are measured from the model that the branches start from."""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The rule takes these coefficients: `{t: 0.5}` for slerp, which is its middle."""

    def __post_init__(self):
        at_least(self, "branch", count=1)
        if self.rule not in jaxmerge.RULES:
            raise UserError(f"branch.rule is {self.rule!r}; it must be one of {', '.join(jaxmerge.RULES)}")


def part_of(examples: Sequence[Row], part: int, of: int, *, seed: int) -> list[Row]:
    """Take part 1 … `of` of examples: all examples of a question are in one part, and parts differ by one question.

    Example:
      >>> rows = [{"question_id": id} for id in "abcb"]
      >>> [sorted({row["question_id"] for row in part_of(rows, i, 2, seed=0)}) for i in (1, 2)]
      [['b', 'c'], ['a']]
    """
    questions = list(dict.fromkeys(row["question_id"] for row in examples))
    order = np.random.Generator(np.random.Philox(key=[seed, 0xBA3])).permutation(len(questions))
    mine = {questions[i] for i in order[part - 1 :: of]}
    return [row for row in examples if row["question_id"] in mine]
