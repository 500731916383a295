r"""On-policy distillation: a teacher's distributions are learnt on the student's own fresh samples.

Each step draws $y \sim p_\theta(\cdot \mid x)$ and minimises

$$\frac{1}{\sum_y |y|} \sum_y \sum_t D\big(p_\theta(\cdot \mid x, y_{<t}),\ p_T(\cdot \mid x', y_{<t})\big),$$

no gradient flowing through the sampling. `sft.distill` names the teacher and D. With another model as the teacher x'
is x: GKD with all of its data on-policy (its λ = 1; its λ = 0 is `sft.distill` of the verb `sft`). With the moving
average of the student itself x' shows the worked solution of the question: SDFT, whose paper takes reverse KL and an
average that moves by a few hundredths a step. Every sample is learnt from, right or wrong, ended or cut short; the
verdicts are told alone.

References:
  Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
  https://arxiv.org/abs/2306.13649 (GKD)
  Shenfeld et al., "Self-Distillation Enables Continual Learning", https://arxiv.org/abs/2601.19897 (SDFT)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from ..log import UserError
from .batches import Batch, target_positions
from .objectives import ResponseOnly
from .rollouts import STEP, Course, Group, Lesson, OnPolicy, to_batch


@dataclasses.dataclass(frozen=True)
class OnPolicyDistillation(OnPolicy):
    """A teacher's distributions are learnt on the student's own samples; `sft.distill` says whose, and how."""

    teaches: ClassVar[bool] = True
    name: Literal["distill"] = "distill"  # type: ignore[misc]  # a key here
    """The improver."""
    demonstrate: bool | None = None  # type: ignore[misc]  # a key here
    """The teacher is shown the worked solution of a question, or its answer, before it reads a sample; null: where it
    is the student's own average."""
    gate: Literal["refuse", "go_on", "off"] = "refuse"  # type: ignore[misc]  # a key here
    """Before the first round the student and the teacher answer the validation questions, and the teacher is shown what
    it will be shown in training. If the 95 % interval of their paired difference is not above 0, the run ends (refuse),
    or goes on and says so (go_on); off asks nothing."""

    def objective(self, drawing):
        del drawing
        return ResponseOnly()

    def lesson(self, groups: Sequence[Group], course: Course) -> Lesson:
        rows = [(group.prompt, sample.tokens) for group in groups for sample in group.samples]
        batch = to_batch(rows, course.pad_id)
        if not course.shown:
            return Lesson(batch, {})
        from ..models.loss import SHOWN  # settings are read without jax, which takes a second

        theirs = [(course.shown[group.question], sample.tokens) for group in groups for sample in group.samples]
        width = STEP * -(-max(len(completion) for _, completion in rows) // STEP)
        # All prompts decide, not those of this step: lengths of both rows that vary apart are a compilation a pair.
        longest = 1 + width + STEP * -(-max(map(len, course.shown)) // STEP)
        shown = aligned(to_batch(theirs, course.pad_id), width, longest)
        return Lesson({**aligned(batch, width), **{name: shown[ours] for name, ours in SHOWN.items()}}, {})


def aligned(batch: Batch, width: int, length: int = 0) -> Batch:
    """A batch with `width` positions of targets a row, and rows of at least this length."""
    more = ((0, 0), (0, max(0, length - batch["tokens"].shape[1])))
    batch = {"tokens": np.pad(batch["tokens"], more), "weights": np.pad(batch["weights"], more)}
    return {**batch, "targets": target_positions(batch["weights"][:, 1:] > 0, width)}


def check_shown(shown: Sequence[tuple[int, ...]], room: int, most: int) -> None:
    """Refuse prompts that leave a teacher no room for a sample of `most` tokens."""
    longest = max(map(len, shown), default=0)
    if longest + most > room:
        raise UserError(
            f"improver.demonstrate: a prompt with its solution has {longest} tokens, a sample up to {most}, and the "
            f"teacher reads {room}; lower sampling.max_new_tokens, or take questions with shorter solutions"
        )
