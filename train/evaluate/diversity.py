r"""How varied the samples of a model are, question by question, and what several tries are worth: pass@k.

Self-training on one's own right answers sharpens: accuracy may rise while answers and solutions become few. These
numbers tell the two apart. All of them depend on how many samples a question has, so compare equal numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..models.characters import EOS
from ..tasks import Question
from ..tasks.letters import extract_letter
from ..tasks.numbers import flexible, strict
from ..tasks.wording import extract_answer, spoken

RESAMPLES = 2000
KS = tuple(range(1, 33))


@dataclasses.dataclass(frozen=True)
class Answered:
    """One question's samples: the answer each gave (None: none found), whether it was right, and its text.

    Attributes:
      likelihoods: mean log-probability of a sample's tokens under the model; empty where it was not kept.
    """

    answers: tuple[str | None, ...]
    right: tuple[bool, ...]
    texts: tuple[str, ...]
    likelihoods: tuple[float, ...] = ()

    @property
    def counts(self) -> tuple[int, int]:
        """(samples, right ones)."""
        return len(self.right), sum(self.right)


def answer_of(question: Question, text: str, style: str) -> str | None:
    """Read the answer out of a completion, as the family's verifier reads it; None where there is none."""
    if style == "compact":
        _, found, answer = text.split(EOS, 1)[0].partition("#")
        return answer if found else None
    text = spoken(text)
    if question.entry.get("extract") in ("flexible", "strict"):
        return {"flexible": flexible, "strict": strict}[question.entry["extract"]](text)
    if choices := question.entry.get("choices"):
        return extract_letter(text, len(choices))
    return extract_answer(text, question.answer)


def grouped(rows: Sequence[Mapping[str, Any]], questions: Mapping[str, Question], style: str) -> dict[str, Answered]:
    """Group verified samples {question_id, text, score} by question; right answers count as one, however written."""
    found: dict[str, list[tuple[str | None, bool, str]]] = {}
    likely: dict[str, list[float]] = {}  # rows of an earlier version have no `logprob`
    for row in rows:
        question = questions[row["question_id"]]
        right = row["score"] == 1.0
        answer = question.answer if right else answer_of(question, row["text"], style)
        found.setdefault(question.id, []).append((answer, right, " ".join(row["text"].split())))
        if "logprob" in row:
            likely.setdefault(question.id, []).append(row["logprob"] / max(1, len(row["tokens"])))
    groups: dict[str, Answered] = {}
    for name, rows_of in found.items():
        answers, right, texts = (tuple(column) for column in zip(*rows_of, strict=True))
        whole = len(likely.get(name, ())) == len(rows_of)
        groups[name] = Answered(answers, right, texts, tuple(likely[name]) if whole else ())
    return groups


def answer_entropy(answers: Sequence[str | None]) -> float:
    r"""Return $-\sum_a p_a \log_2 p_a$, bits, over the shares of the answers given; "none" is one of them.

    0 where all samples agree, $\log_2 n$ where no two do. As an estimate of the model's own entropy it is low by
    about (answers − 1)/(2 n ln 2).

    Example:
      >>> answer_entropy(["7", "7", "8", None])
      1.5
    """
    n = len(answers)
    return sum(c / n * math.log2(n / c) for c in Counter(answers).values())


def diversity(found: Mapping[str, Answered], *, seed: int = 0) -> dict[str, Any]:
    """Average over questions, each with a 95 % bootstrap interval [mean, low, high].

    Returns:
      questions; samples (the fewest a question has); entropy (bits); distinct_answers; distinct_solutions (different
      texts among the right ones, runs of space apart, over all questions); distinct_when_solved (the same over
      questions with a right one, None if there is none); solved (share of questions with a right one).
    """
    rows = list(found.values())
    solutions = [len({t for t, right in zip(r.texts, r.right, strict=True) if right}) for r in rows]
    solved = [s for s in solutions if s]
    return {
        "questions": len(rows),
        "samples": min(len(r.right) for r in rows),
        "entropy": interval([answer_entropy(r.answers) for r in rows], seed=seed),
        "distinct_answers": interval([len(set(r.answers)) for r in rows], seed=seed),
        "distinct_solutions": interval(solutions, seed=seed),
        "distinct_when_solved": interval(solved, seed=seed) if solved else None,
        "solved": interval([float(s > 0) for s in solutions], seed=seed),
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    r"""Estimate the chance that one of k samples is right, without bias, from n samples of which c are.

    $1 - \binom{n-c}{k} / \binom{n}{k} = 1 - \prod_{i=n-c+1}^{n} (1 - k/i)$.

    Example:
      >>> pass_at_k(4, 1, 1), pass_at_k(4, 2, 3)
      (0.25, 1.0)

    References:
      Chen et al., "Evaluating Large Language Models Trained on Code", https://arxiv.org/abs/2107.03374.
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@{k} of {n} samples with {c} right; wanted 1 ≤ k ≤ n and 0 ≤ c ≤ n")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def pass_curve(counts: Sequence[tuple[int, int]], *, seed: int = 0) -> list[dict[str, Any]]:
    """Estimate pass@k for k = 1 … 32, as far as every question has k samples: {k, value: [mean, low, high]}.

    Args:
      counts: (n, c) of each question.
    """
    most = min(n for n, _ in counts)
    return [{"k": k, "value": interval([pass_at_k(n, c, k) for n, c in counts], seed=seed)} for k in KS if k <= most]


def interval(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> list[float]:
    """Return [mean, low, high]: a 95 % percentile bootstrap over questions, the samples of each staying together."""
    array = np.asarray(values, np.float64)
    generator = np.random.Generator(np.random.Philox(key=[seed, 0xB007]))
    weights = generator.multinomial(len(array), np.full(len(array), 1 / len(array)), size=resamples)
    low, high = np.quantile(weights @ array / len(array), [0.025, 0.975])
    return [float(array.mean()), float(low), float(high)]
