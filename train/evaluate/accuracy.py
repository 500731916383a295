"""Accuracies with intervals, and paired differences between models that answered the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..tasks.task import DOMAINS, Question
from .diversity import Answered, interval
from .rerank import AT_K

Z = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion; unlike right/n ± z·s it stays inside [0, 1].

    Example:
      >>> [round(x, 3) for x in wilson(8, 10)]
      [0.49, 0.943]
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # Rounding may put an end of the interval past p itself at 0 and 1.
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


def paired_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a − b over shared questions and its 95 % interval (Agresti–Min: half a pair added to each cell).

    Args:
      a, b: 1.0 or 0.0 a question, in the same order.

    Returns:
      (difference, low, high).

    References:
      Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", 2005.
    """
    n = len(a)
    if n == 0:
        return 0.0, -1.0, 1.0
    gained = sum(x > y for x, y in zip(a, b, strict=True))
    lost = sum(x < y for x, y in zip(a, b, strict=True))
    g, l, m = gained + 0.5, lost + 0.5, n + 2
    centre = (g - l) / m
    half = Z * math.sqrt(max(0.0, (g + l) - (g - l) ** 2 / m)) / m
    return (gained - lost) / n, max(-1.0, centre - half), min(1.0, centre + half)


def rows(
    questions: Sequence[Question],
    scores: Mapping[str, float],
    *,
    method: str,
    number: int,
    seconds: float,
    lengths: Mapping[str, int] | None = None,
    **extra: Any,
) -> list[dict[str, Any]]:
    """Accuracy by domain and family, then pooled by domain (`family: all`); unjudged answers count as wrong.

    Args:
      lengths: tokens of the answer to each question: a row then has their mean, `tokens`.
    """
    groups: dict[tuple[str, str, str], list[Question]] = {}
    for q in questions:
        groups.setdefault((q.split, q.domain, q.family), []).append(q)
        groups.setdefault((q.split, q.domain, "all"), []).append(q)
    order = sorted(groups, key=lambda g: (g[0], DOMAINS.index(g[1]), g[2] != "all", g[2]))
    table = []
    for split, domain, family in order:
        members = groups[split, domain, family]
        right = sum(scores[q.id] == 1.0 for q in members)
        low, high = wilson(right, len(members))
        table.append(
            {
                "method": method,
                "round": number,
                "domain": domain,
                "family": family,
                "split": split,
                "accuracy": right / len(members),
                "low": low,
                "high": high,
                "n": len(members),
                "seconds": seconds * len(members) / len(questions),
                **({} if lengths is None else {"tokens": sum(lengths[q.id] for q in members) / len(members)}),
                **extra,
            }
        )
    return table


SAMPLED = 0x9A55
"""Folded into the run's key for the samples of pass@k."""


def add_at_k(
    table: Sequence[dict[str, Any]], questions: Sequence[Question], drawn: Mapping[str, Answered], samples: int
) -> None:
    """Give each row of `rows` of these questions its `pass_at` {k: mean over questions}, k in 1, 2, 4, … samples.

    `maj_at` and `rank_at` stand beside it where every question of the row has them.

    Args:
      drawn: `samples` samples of each question, by its id.
    """
    for row in table:
        members = [
            q for q in questions
            if (q.split, q.domain) == (row["split"], row["domain"]) and row["family"] in ("all", q.family)
        ]  # fmt: skip
        for name in AT_K if members else ():
            values = {k: at_k(name, members, drawn, k) for k in ks_of(samples)}
            means = {str(k): sum(found) / len(found) for k, found in values.items() if found is not None}
            if means:
                row[f"{name}_at"] = means


def at_k(name: str, questions: Sequence[Question], drawn: Mapping[str, Answered], k: int) -> list[float] | None:
    """A measure of AT_K of each question; None where one of them lacks it."""
    found = [value for q in questions if (value := AT_K[name](drawn[q.id], k)) is not None]
    return found if len(found) == len(questions) else None


def ks_of(samples: int) -> list[int]:
    """The k that pass@k is given for: 1, 2, 4, … and all samples."""
    return sorted({samples} | {2**i for i in range(samples.bit_length()) if 2**i <= samples})


def pass_rates(
    questions: Sequence[Question], drawn: Mapping[str, Answered], samples: int, *, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows {domain, family, k, n, pass, maj, rank}: measures of AT_K, [mean, low, high] of a bootstrap over questions.

    maj or rank is None where it cannot be told of every question.

    Args:
      drawn: `samples` samples of each question, by its id.
    """
    pools: dict[tuple[str, str], list[Question]] = {}
    for q in questions:
        pools.setdefault((q.domain, q.family), []).append(q)
    return [
        {
            "domain": domain,
            "family": family,
            "k": k,
            "n": len(members),
            **{
                name: None if (found := at_k(name, members, drawn, k)) is None else interval(found, seed=seed)
                for name in AT_K
            },
        }
        for (domain, family), members in pools.items()
        for k in ks_of(samples)
    ]


def paired_rows(
    questions: Sequence[Question],
    scores: Mapping[tuple[str, int], Mapping[str, float]],
    pairs: Sequence[tuple[tuple[str, int], tuple[str, int]]],
) -> list[dict[str, Any]]:
    """Difference a − b by domain for each pair of (method, round), on the questions of each split."""
    table = []
    for a, b in pairs:
        for split in sorted({q.split for q in questions}):
            for domain in DOMAINS:
                ids = [q.id for q in questions if q.split == split and q.domain == domain]
                if not ids:
                    continue
                difference, low, high = paired_interval([scores[a][i] for i in ids], [scores[b][i] for i in ids])
                table.append(
                    {
                        "a": a[0],
                        "b": b[0],
                        "round": a[1],
                        "domain": domain,
                        "split": split,
                        "difference": difference,
                        "low": low,
                        "high": high,
                        "n": len(ids),
                    }
                )
    return table
