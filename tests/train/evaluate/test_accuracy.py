"""Intervals against their definitions, rows and pairs against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from train.evaluate.accuracy import Z, paired_interval, paired_rows, rows, wilson
from train.tasks import Question


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (37, 400), (1, 1)])
def test_wilson_solves_its_equation(right, n):
    low, high = wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1
    for bound in {low, high} - {0.0, 1.0}:  # |p̂ − p| = z·sqrt(p(1 − p)/n)
        assert abs(right / n - bound) == pytest.approx(Z * np.sqrt(bound * (1 - bound) / n), abs=1e-9)


def test_wilson_covers():
    generator = np.random.default_rng(0)
    for p in (0.1, 0.5, 0.9):
        inside = [low <= p <= high for low, high in (wilson(k, 60) for k in generator.binomial(60, p, 2000))]
        assert np.mean(inside) > 0.925


def test_paired_interval_is_narrower_than_unpaired_and_covers():
    generator = np.random.default_rng(1)
    covered = []
    for _ in range(500):
        skill = generator.random(300)
        a, b = (skill + s + generator.normal(0, 0.1, 300) > 0.5 for s in (0.05, 0.0))
        difference, low, high = paired_interval(a.astype(float), b.astype(float))
        assert difference == pytest.approx(a.mean() - b.mean())
        assert low <= difference <= high
        covered.append(low <= 0.05 <= high)
    assert np.mean(covered) > 0.9
    assert paired_interval([1.0, 0.0], [1.0, 0.0])[0] == 0.0
    assert paired_interval([], []) == (0.0, -1.0, 1.0)


def question(name: str, family: str, domain: str) -> Question:
    return Question(name, family, domain, "test", name, "1", None, {})  # type: ignore[arg-type]


QUESTIONS = [question("a", "sums", "id"), question("b", "sums", "id"), question("c", "gcd", "ood")]


def test_rows_by_family_and_pooled():
    table = rows(QUESTIONS, {"a": 1.0, "b": 0.0, "c": 1.0}, method="m", number=2, seconds=3.0, coefficient=0.5)
    assert [(r["domain"], r["family"], r["accuracy"], r["n"], r["seconds"]) for r in table] == [
        ("id", "all", 0.5, 2, 2.0),
        ("id", "sums", 0.5, 2, 2.0),
        ("ood", "all", 1.0, 1, 1.0),
        ("ood", "gcd", 1.0, 1, 1.0),
    ]
    assert all(r["method"] == "m" and r["round"] == 2 and r["coefficient"] == 0.5 for r in table)


def test_pairs_are_of_the_same_questions():
    scores = {("imm", 1): {"a": 1.0, "b": 1.0, "c": 0.0}, ("base", 0): {"a": 0.0, "b": 1.0, "c": 1.0}}
    table = paired_rows(QUESTIONS, scores, [(("imm", 1), ("base", 0))])
    assert [(r["domain"], r["difference"], r["n"]) for r in table] == [("id", 0.5, 2), ("ood", -1.0, 1)]
