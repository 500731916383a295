r"""What a round's judged samples become: each way is its settings with the function that drafts the examples.

A rewrite is given the fate of every sample (`kept`: it is right, finished and new; `wrong`, `unfinished`, …) and drafts
examples; `train/improve/select.py` makes tokens of them. What needs more samples than the round has is a
`sampling.source`.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from ..log import UserError
from ..runtime.jsonl import Row
from ..tasks import Question

EQUATION = re.compile(r"[-+*/×÷().%\d\s]*\d\s*=\s*-?[\d.,]*\d")


@dataclasses.dataclass(frozen=True)
class Draft:
    """An example before its tokens.

    Attributes:
      asked: the text that stands in the question's place; None asks the question itself.
      row: the sample whose own tokens are learnt; None tokenises `text`.
    """

    question_id: str
    text: str
    sample: int = -1
    score: float = 1.0
    weight: float = 1.0
    asked: str | None = None
    row: Row | None = None


@dataclasses.dataclass(frozen=True)
class Judged:
    """The samples of one question, each with its fate, and what else is known of it."""

    question: Question
    samples: Sequence[tuple[Row, str]]
    memory: Row | None = None
    """The example of an earlier round that a rewrite remembers."""

    @property
    def worked(self) -> str:
        """The worked solution, or the answer where the family has none."""
        return self.question.solution or self.question.answer

    def fated(self, *fates: str) -> list[Row]:
        """The samples with one of these fates that have an end."""
        return [row for row, fate in self.samples if fate in fates and row["reason"] != "length"]

    @property
    def share(self) -> float:
        """The share of the samples that are right."""
        return sum(row["score"] == 1.0 for row, _ in self.samples) / max(1, len(self.samples))


Verify = Callable[[Question, str], float | None]


class Rewrite:
    """Drafts of examples from judged samples; what the ways share."""

    objective: ClassVar[str] = ""
    """The objective without which the examples cannot be learnt; "" for any."""
    remembers: ClassVar[bool] = False
    """Whether the last example of a question is kept from round to round as its memory."""

    def distinct(self, text: str) -> str:
        """What two samples share that are the same solution."""
        return " ".join(text.split())

    def drafts(self, judged: Sequence[Judged], verify: Verify, seed: int) -> Iterator[Draft]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Right(Rewrite):
    r"""Rejection sampling fine-tuning (RFT): learn $\{(x, y) : y \sim p_\theta(\cdot \mid x),\ r(x, y) = 1\}$.

    The paper takes solutions for the same if their equations are, and keeps of those the one that is farthest from the
    others by edit distance. We keep the first.

    References:
      Yuan et al., "Scaling Relationship on Learning Mathematical Reasoning with Large Language Models",
      https://arxiv.org/abs/2308.01825
    """

    name: Literal["right"] = "right"
    """Samples become examples in this way. The other keys of this block depend on it."""
    same: Literal["text", "equations"] = "text"
    """One of several solutions that are the same is learnt: with the same words (text), or with the same equations in
    the same order (equations), as in the paper of RFT; without an equation the text decides."""

    def distinct(self, text):
        found = ["".join(match.split()) for match in EQUATION.findall(text)] if self.same == "equations" else []
        return "|".join(found) or super().distinct(text)

    def drafts(self, judged, verify, seed):
        for one in judged:
            for row in one.fated("kept"):
                yield Draft(one.question.id, row["text"], row["sample"], row=row)


@dataclasses.dataclass(frozen=True)
class RTuning(Rewrite):
    r"""R-Tuning: the worked solution $y^*$, a question, and "sure" if the model's own answers are right, else "unsure".

    The text learnt is $y^* \oplus \text{ask} \oplus (\text{sure if } \hat p \ge t \text{ else unsure})$, where
    $\hat p$ is the share of right samples. The paper takes one greedy answer, which is `sampling.samples: 1` at a low
    temperature; its published code has these words. The paper's loss is over the whole text, here it is over what
    follows the prompt.

    References:
      Zhang et al., "R-Tuning: Instructing Large Language Models to Say 'I Don't Know'", https://arxiv.org/abs/2311.09677
    """

    name: Literal["r_tuning"] = "r_tuning"
    """R-Tuning: a worked solution is learnt with a word on whether the model knew the answer."""
    threshold: float = 0.5
    """The model is sure of a question if at least this share of its samples is right."""
    ask: str = " Are you sure you accurately answered the question based on your internal knowledge?"
    """This stands between the worked solution and the word."""
    sure: str = " I am sure."
    """This ends the example of a question that the model knows."""
    unsure: str = " I am unsure."
    """This ends the example of a question that the model does not know."""

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise UserError(f"selection.rewrite.threshold is {self.threshold}; it is a share above 0 and at most 1")

    def drafts(self, judged, verify, seed):
        for one in judged:
            if one.samples:
                word = self.sure if one.share >= self.threshold else self.unsure
                yield Draft(one.question.id, one.worked + self.ask + word, score=one.share)


@dataclasses.dataclass(frozen=True)
class Lemma(Rewrite):
    r"""LEMMA: a wrong solution up to its first wrong step, a reflection, and the way to the right answer, as one text.

    With the steps of a wrong solution $w$ and of a right one $r$ that agree before step $i$:
    continue is $w_1 … w_i \oplus \text{phrase} \oplus r_i r_{i+1} …$ (fix and continue), restart is
    $w_1 … w_i \oplus \text{phrase} \oplus r_1 r_2 …$ (fresh and restart). The paper has a larger model find the wrong
    step, provoke errors of chosen kinds, and write the reflection; here the wrong step is the first that differs from
    the right solution that agrees with $w$ the longest, the errors are the model's own, and the reflection is a phrase.
    A text that the task does not judge right is left out. `sampling.source: reflect` lets the model write what follows
    the phrase.

    References:
      Pan et al., "LEMMA: Learning from Errors for MatheMatical Advancement in LLMs", https://arxiv.org/abs/2503.17439
    """

    name: Literal["lemma"] = "lemma"
    """LEMMA: a wrong sample is learnt with its correction."""
    correction: Literal["continue", "restart", "both"] = "both"
    """After the reflection the right solution goes on from the wrong step (continue), begins anew (restart), or one
    example is made of each."""
    step: str = "\n"
    """This stands between two steps of a solution."""
    phrases: tuple[str, ...] = (
        "Wait, this step does not look right. Let me check it.",
        "Something is off here. Let me go through it again.",
        "Could I have made a mistake? Let me look at this step once more.",
    )
    """One of these stands behind the wrong step; the question and the sample decide which."""

    def __post_init__(self):
        if not self.phrases or not self.step:
            raise UserError("selection.rewrite: lemma needs one phrase or more, and a text between steps")

    def drafts(self, judged, verify, seed):
        for one in judged:
            rights = [row["text"] for row in one.fated("kept")] or [one.worked]
            for row in one.fated("wrong"):
                for text in dict.fromkeys(self.corrected(row["text"], rights, f"{one.question.id}/{row['sample']}")):
                    if verify(one.question, text) == 1.0:
                        yield Draft(one.question.id, text, row["sample"])

    def corrected(self, wrong: str, rights: Sequence[str], salt: str) -> Iterator[str]:
        """The texts that correct a wrong solution."""
        steps = wrong.strip().split(self.step)
        agreed, right = max(
            ((agree(steps, other), other) for text in rights for other in [text.strip().split(self.step)]),
            key=lambda found: found[0],
        )
        if agreed >= len(steps):
            return  # it stops short: no step of it is wrong
        phrase = self.phrases[zlib.crc32(salt.encode()) % len(self.phrases)]
        for kind, begin in (("continue", agreed), ("restart", 0)):
            if self.correction in (kind, "both"):
                yield self.step.join([*steps[: agreed + 1], phrase, *right[begin:]])


def agree(one: Sequence[str], other: Sequence[str]) -> int:
    """How many steps two solutions have in common from their beginning.

    Example:
      >>> agree(["a = 1", "b=2"], ["a  = 1", "b=3"])
      1
    """
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a.split() != b.split()), min(len(one), len(other)))


@dataclasses.dataclass(frozen=True)
class Critique(Rewrite):
    r"""Critique fine-tuning with the task's verifier as the critic: maximise $\log p(c \mid x \oplus y)$, y a sample.

    The paper's critiques are a larger model's; here c is the verdict, and for a wrong sample the worked solution.
    `sampling.source: critique` has the model write critiques and keeps those that agree with the verdict. A file of
    critiques from elsewhere is learnt by `jaxmerge sft`.

    References:
      Wang et al., "Critique Fine-Tuning: Learning to Critique is More Effective than Learning to Imitate",
      https://arxiv.org/abs/2501.17703
    """

    name: Literal["critique"] = "critique"
    """Critique fine-tuning: the question with a sample is asked, and the verdict on it is learnt."""
    ask: str = (
        "Question:\n{question}\n\nSolution:\n{solution}\n\n"
        "Is this solution right? Say so, and if it is not, give a right one."
    )
    """This is asked; {question} and {solution} are replaced."""
    right: str = "The solution is right."
    """This is learnt of a right sample."""
    wrong: str = "The solution is wrong. A right one:\n{worked}"
    """This is learnt of a wrong sample; {worked} is replaced by the worked solution or the answer."""

    def __post_init__(self):
        for mark in ("{question}", "{solution}"):
            if mark not in self.ask:
                raise UserError(f"selection.rewrite.ask lacks {mark}; a critique is of a solution of a question")

    def drafts(self, judged, verify, seed):
        for one in judged:
            for row in one.fated("kept", "wrong"):
                asked = filled(self.ask, question=one.question.text, solution=row["text"])
                said = self.right if row["score"] == 1.0 else filled(self.wrong, worked=one.worked)
                yield Draft(one.question.id, said, row["sample"], asked=asked)


def filled(template: str, **values: str) -> str:
    """A template with {name} replaced, once each and in one pass: braces in the values stay."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), template)


@dataclasses.dataclass(frozen=True)
class Trice(Rewrite):
    r"""TRICE: one right solution a question is remembered, and every sample is a proposal to take its place.

    The samples of a question are the proposals $\tilde z_1, \tilde z_2, …$ of an independence sampler of the posterior
    $p(z \mid x, y)$: a right one becomes the memory z, a wrong one leaves it. The gradient of $\log p(y \mid x)$ is
    the posterior mean of $\nabla \log p(z \mid x)$, estimated by the mean over questions m that have a memory, and over
    proposals, of

    $$\nabla \log p_\theta(z_m \mid x_m) - \beta_m \nabla \log p_\theta(\tilde z_m \mid x_m),$$

    where $\beta_m$ is the share of right proposals of the *other* questions. It does not depend on $\tilde z_m$, whose
    score has mean 0, so the second term changes no mean and takes variance away; where all proposals are right it takes
    all of it. The formula is from memory of the paper, whose subsampling of the terms and guided first solutions are
    not here: a question has no memory before its first right sample.

    The estimate is of the model that drew the samples: it is exact for the first update of a round.

    References:
      Phan et al., "Training Chain-of-Thought via Latent-Variable Inference", https://arxiv.org/abs/2312.02179
    """

    objective: ClassVar[str] = "signed"
    remembers: ClassVar[bool] = True
    name: Literal["trice"] = "trice"
    """TRICE: a remembered right solution of each question is learnt, less the mean of what the model proposes."""
    control_variate: bool = True
    """The wrong proposals are subtracted; without it the memory alone is learnt."""

    def drafts(self, judged, verify, seed):
        proposals = min((len(one.samples) for one in judged if one.samples), default=0)
        judged = [one for one in judged if one.samples]
        fitting = [[fits(row) for row, _ in one.samples[:proposals]] for one in judged]
        right = np.array(fitting, bool).reshape(len(judged), proposals)
        had = np.array([one.memory is not None for one in judged], bool)
        memories, (kept, proposed) = trice_weights(had, right, control_variate=self.control_variate)
        for m, one in enumerate(judged):
            terms = [(row_of(one, z), w) for s in range(proposals)
                     for z, w in ((memories[m, s], kept[m, s]), (s, proposed[m, s]))]  # fmt: skip
            # Equal texts are one solution, whichever proposals they are; the memory stands last.
            last = row_of(one, memories[m, -1]) if proposals else None
            weights: dict[tuple[str, bool], float] = {}
            rows: dict[tuple[str, bool], Row] = {}
            for row, weight in terms:
                if row is not None and (weight or row is last):
                    key = (self.distinct(text_of(row)), fits(row))
                    rows[key] = row
                    weights[key] = weights.get(key, 0.0) + float(weight)
            end = (self.distinct(text_of(last)), True) if last is not None else None
            for key in sorted(rows, key=lambda key: key == end):
                row = rows[key]
                yield Draft(one.question.id, text_of(row), row["sample"], float(key[1]), weights[key], row=row)


def row_of(one: Judged, z: int) -> Row | None:
    """A proposal by its number, the memory by -1."""
    return one.samples[z][0] if z >= 0 else one.memory if z == -1 else None


def text_of(row: Mapping[str, Any]) -> str:
    """What a sample says, or an example of an earlier round."""
    return row["text"] if "text" in row else row["completion"]


def fits(row: Mapping[str, Any]) -> bool:
    """Whether a proposal is right; one that has no end is none."""
    return row["score"] == 1.0 and row.get("reason") != "length"


def trice_weights(
    had: np.ndarray, right: np.ndarray, *, control_variate: bool = True
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Which solution is remembered after each proposal, and the weights of it and of the proposal.

    Args:
      had: [M] whether a question has a memory before the first proposal.
      right: [M, S] whether proposals are right.

    Returns:
      (memories [M, S]: the number of a proposal, -1 for what was remembered before, -2 for none;
      (weights of the memory [M, S], weights of the proposal [M, S], at most 0)).
    """
    M, S = right.shape
    steps = np.where(right, np.arange(S), -2)
    steps = np.concatenate([np.where(had, -1, -2)[:, None], steps], axis=1)
    memories = np.maximum.accumulate(steps, axis=1)
    # A first memory is a proposal that is known to be right: its score has no mean 0, and nothing is subtracted.
    before, memories = memories[:, :-1] > -2, memories[:, 1:]
    known = memories > -2
    accepted = (right & known).sum(axis=0) - right * known
    others = known.sum(axis=0) - known
    beta = np.where(others > 0, accepted / np.maximum(others, 1), 0.0) if control_variate else np.zeros((M, S))
    return memories, (known / S, -beta * before / S)


Ways = Right | RTuning | Lemma | Critique | Trice
REWRITES: dict[str, type[Rewrite]] = {
    "right": Right,
    "r_tuning": RTuning,
    "lemma": Lemma,
    "critique": Critique,
    "trice": Trice,
}
"""By name: what `selection.rewrite` may be."""
