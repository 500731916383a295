"""What learning from a model's own fresh samples consists of: groups of samples, as arrays, and the places to differ.

The loop (on_policy.py) draws samples of the newest weights and has them judged; an improver, which is its settings,
says which questions are asked, what is learnt from the samples, and which function of their log-probabilities is
minimised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from ..generate.settings import Draw
from ..log import UserError
from ..resolve import at_least
from .batches import Batch, target_positions, target_width

if TYPE_CHECKING:
    from ..generate.rollout import Prompt, Sample
    from ..models.decoder import Params
    from .objectives import Tokens
    from .settings import Sft
    from .shared import Sharing

STEP = 32
"""Rows are padded to lengths that are multiples of it: few shapes, few compilations."""
UNREAD = (
    "epochs", "max_length", "overlong", "packing", "loss", "objective", "share_prompts", "step.spike", "watch.held_out",
    "watch.evaluate_every", "watch.trace_from", "watch.trace_steps",
)  # fmt: skip
"""Keys of `sft` that speak of examples on disk, or are of their loop alone."""


class Group(NamedTuple):
    """The samples of one question."""

    question: int
    """Its number among the prompts."""
    prompt: tuple[int, ...]
    samples: Sequence[Sample]
    rewards: np.ndarray
    """Of each sample [G] float64; NaN where it could not be judged."""


class Course(NamedTuple):
    """What an improver may use beside the samples."""

    prompts: Sequence[Prompt]
    categories: Sequence[str]
    """The family of each prompt's question."""
    solutions: Sequence[tuple[int, ...] | None]
    """The tokens of each question's worked solution, the end included; None where it has none."""
    shown: Sequence[tuple[int, ...]]
    """Each prompt as a teacher reads it; () where it reads what the student does."""
    drawing: Draw
    pad_id: int
    reference: Params
    """The weights before the first step."""
    student: Params
    """The weights that the samples are of; to be used before the first update, which overwrites them."""
    average: Callable[[], Params]
    """Makes what the run would return now: with `sft.step.ema` the average of the student's weights."""
    several: bool
    """Whether weights change between the updates of a step: the samples are then of older ones."""
    logps: Callable[..., np.ndarray]
    """Log-probabilities under some weights of this model of a batch's tokens, of the shape of its weights, 0 where
    nothing is learnt: (weights, batch, rows of an update, 0: as many as `sft.batch`)."""
    sharing: Sharing | None = None
    """How rows are made that share their prompts; None: each row has a prompt and an answer."""


class Lesson(NamedTuple):
    """What a step learns."""

    batch: Batch | None
    """Rows that are learnt `iterations` times, an update's at a time; None: nothing."""
    metrics: dict[str, float]
    worked: Batch | None = None
    """Rows that are learnt once afterwards, `sft.batch` at a time, and whose loss is told apart."""
    rows: int = 0
    """Rows of an update, where they are not `sft.batch`, because a row has several answers."""


@dataclasses.dataclass(frozen=True)
class OnPolicy:
    """How a model learns from its own fresh samples; improvers add their keys and override what they change."""

    steps: int = 100
    """This many times samples are drawn from the newest weights and learnt from."""
    questions: int = 8
    """Each step asks this many training questions and draws `sampling.samples` answers to each."""
    iterations: int = 1
    """A step's samples are learnt from this many times, in updates of `sft.batch` samples."""

    warm_up: dict[str, Any] | None = None
    """These keys of `sft` are replaced, and the first round begins with fine-tuning on the worked solutions (as ReFT
    does); null leaves that out."""

    name: ClassVar[str]
    teaches: ClassVar[bool] = False
    """Whether there is nothing to learn without `sft.distill`, and its teacher may be the student's own average."""
    demonstrate: ClassVar[bool | None] = None
    """Whether the teacher is shown worked solutions; None: where it is the student's own average."""
    gate: ClassVar[str] = "off"
    """What becomes of a run whose teacher is not better than its student."""
    share_prompts: ClassVar[bool] = False
    """Whether a prompt is computed once for several of its answers."""
    skip_equal: ClassVar[bool] = False
    """Whether samples that nothing is learnt from are left out of an update's computation."""
    redraws: ClassVar[int] = 0
    """How often other questions are asked in a step, until `questions` of those asked are kept."""

    def __post_init__(self):
        at_least(self, "improver", steps=1, questions=1, iterations=1)

    def check(self, drawing: Draw, sft: Mapping[str, Any], where: str) -> None:
        """Refuse what is not read, or does not fit.

        Args:
          drawing: how samples are drawn.
          sft: keys that the method sets of the block `sft`.
          where: the method, in messages.
        """
        if drawing.greedy:
            raise UserError(f"{where}.sampling.temperature is 0: samples must differ; raise it to 1")
        nested = {f"{key}.{inner}" for key, value in sft.items() if isinstance(value, Mapping) for inner in value}
        if unread := sorted((nested | set(sft)) & set(UNREAD)):
            raise UserError(
                f"{where}.sft.{unread[0]}: learning from fresh samples does not read it; leave it out "
                "(improver.steps and improver.questions say how long)"
            )

    def shares(self, sft: Sft) -> bool:
        """Whether the answers of an update may be put into other rows than their own."""
        del sft
        return self.share_prompts

    @property
    def gated(self) -> bool:
        """Whether teacher and student are compared first."""
        return self.gate != "off"

    def objective(self, drawing: Draw) -> Tokens:
        """What is minimised."""
        raise NotImplementedError

    def choose(self, course: Course, log: Sequence[Mapping[str, float]], *, seed: int, step: int, draw: int):
        """Numbers of the questions that a step asks [questions]: all of them once before any comes again.

        Args:
          log: metrics of the steps before.
          draw: how often others were asked in this step; then those are drawn at random.
        """
        del log
        count = len(course.prompts)
        if draw:
            return random(seed, step, draw).permutation(count)[: self.questions]
        first = step * self.questions
        wanted = range(first, first + self.questions)
        orders = {i // count: random(seed, i // count, 0xE).permutation(count) for i in (wanted[0], wanted[-1])}
        return np.array([orders[i // count][i % count] for i in wanted])

    def keeps(self, group: Group) -> bool:
        """Whether something can be learnt from a group."""
        del group
        return True

    def lesson(self, groups: Sequence[Group], course: Course) -> Lesson:
        """What is learnt from the samples of a step."""
        raise NotImplementedError


def random(*key: int) -> np.random.Generator:
    """Draws that depend on a few whole numbers alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def to_batch(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, /, **beside: Any) -> Batch:
    """Rows of (prompt, completion) as arrays: weight 1 where a completion's token is, 0 elsewhere.

    Args:
      beside: by name an array a row of its completion's length, for arrays like `tokens`, or a number a row.
    """
    length = 1 + STEP * -(-(max(len(p) + len(c) for p, c in rows) - 1) // STEP)
    shape = (len(rows), length)
    tokens, weights = np.full(shape, pad_id, np.int32), np.zeros(shape, np.float32)
    batch: Batch = {"tokens": tokens, "weights": weights}
    numbers = {name for name, values in beside.items() if np.ndim(values[0]) == 0}
    for name, values in beside.items():
        batch[name] = np.asarray(values, np.float32) if name in numbers else np.zeros(shape, np.float32)
    for i, (prompt, completion) in enumerate(rows):
        begin, end = len(prompt), len(prompt) + len(completion)
        tokens[i, :begin], tokens[i, begin:end], weights[i, begin:end] = prompt, completion, 1.0
        for name, values in beside.items():
            if name not in numbers:
                batch[name][i, begin:end] = values[i]
    width = target_width(STEP * -(-max(1, *(len(c) for _, c in rows)) // STEP), length - 1)
    if width is not None:
        batch["targets"] = target_positions(weights[:, 1:] > 0, width)
    return batch


def parts(batch: Batch, size: int) -> list[Batch]:
    """Rows of a batch, `size` at a time; the last part is filled up with rows of weight 0."""
    count = len(batch["tokens"])
    missing = -count % size
    full = {k: np.pad(v, ((0, missing), *[(0, 0)] * (v.ndim - 1))) for k, v in batch.items()}
    return [{k: v[first : first + size] for k, v in full.items()} for first in range(0, count, size)]
