r"""What k samples of a question are worth where one answer must be given: the majority's, or the likeliest sample's.

pass@k asks whether a right sample is among k. Re-ranking has to find it without the gold answer: *self-consistency*
gives the answer that most samples give, *sample-and-rank* the sample whose tokens the model finds likeliest. Both are
given as their expectation over all k-subsets of the n samples drawn, so that one draw tells every k, as for pass@k.

References:
  Wang et al., "Self-Consistency Improves Chain of Thought Reasoning", https://arxiv.org/abs/2203.11171, which compares
  the two; sample-and-rank is of Adiwardana et al., "Towards a Human-like Open-Domain Chatbot",
  https://arxiv.org/abs/2001.09977.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..tasks import Question, Suite
from ..tasks.code import CodeTask
from .diversity import Answered, grouped, pass_at_k


def drawn(suite: Suite, questions: Sequence[Question], rows: Sequence[Mapping[str, Any]]) -> dict[str, Answered]:
    """Group judged samples by question. Programs give no answers that could be counted: theirs are left empty."""
    found = grouped(rows, {q.id: q for q in questions}, suite.style)
    programs = {q.id for q in questions if isinstance(suite.tasks[q.family], CodeTask)}
    return {id: dataclasses.replace(one, answers=()) if id in programs else one for id, one in found.items()}


def majority_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    r"""Estimate the chance that the most frequent answer of k samples is right: maj@k.

    The mean over all $\binom{n}{k}$ subsets, of equally frequent answers each being taken with the same chance. Right
    answers count as one, however they are written; a sample without an answer (None) has no vote.

    Example:
      >>> majority_at_k(["7", "7", "8"], [True, True, False], 3), majority_at_k(["7", "8"], [True, False], 2)
      (1.0, 0.5)
    """
    votes = Counter(answer for answer, good in zip(answers, right, strict=True) if answer is not None and not good)
    good = sum(right)
    return _won(good, tuple(sorted(votes.values())), len(right) - good - sum(votes.values()), k)


@functools.lru_cache(maxsize=65536)
def _won(good: int, others: tuple[int, ...], blank: int, k: int) -> float:
    """majority_at_k of counts: `good` right samples, `others` of each wrong answer, `blank` without an answer."""
    ways = 0.0
    for votes in range(1, min(good, k) + 1):
        # (samples left to draw, wrong answers with as many votes) → number of ways, one wrong answer after another
        table = {(k - votes, 0): 1}
        for count in others:
            more: dict[tuple[int, int], int] = {}
            for (left, ties), n in table.items():
                for drawn in range(min(count, votes, left) + 1):
                    key = (left - drawn, ties + (drawn == votes))
                    more[key] = more.get(key, 0) + n * math.comb(count, drawn)
            table = more
        ways += math.comb(good, votes) * sum(
            n * math.comb(blank, left) / (ties + 1) for (left, ties), n in table.items()
        )
    return ways / math.comb(good + sum(others) + blank, k)


def likeliest_at_k(scores: Sequence[float], right: Sequence[bool], k: int) -> float:
    r"""Estimate the chance that the best-scored of k samples is right: rank@k.

    $\sum_r \mathrm{right}_r \binom{n-r}{k-1} / \binom{n}{k}$, where r = 1 … n is a sample's place by score, the best
    first; of equal scores the earlier sample counts as better.

    Example:
      >>> likeliest_at_k([-0.5, -0.1], [True, False], 2), likeliest_at_k([-0.5, -0.1], [True, False], 1)
      (0.0, 0.5)
    """
    n = len(scores)
    order = sorted(range(n), key=lambda i: (-scores[i], i))
    return sum(math.comb(n - r, k - 1) for r, i in enumerate(order, start=1) if right[i]) / math.comb(n, k)


def _pass(found: Answered, k: int) -> float | None:
    return pass_at_k(*found.counts, k)


def _majority(found: Answered, k: int) -> float | None:
    return majority_at_k(found.answers, found.right, k) if found.answers else None


def _likeliest(found: Answered, k: int) -> float | None:
    return likeliest_at_k(found.likelihoods, found.right, k) if found.likelihoods else None


AT_K: dict[str, Callable[[Answered, int], float | None]] = {"pass": _pass, "maj": _majority, "rank": _likeliest}
"""What is told of k samples of a question: pass@k, maj@k, rank@k; None where it cannot be told."""
