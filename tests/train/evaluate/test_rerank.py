"""maj@k and rank@k against all subsets, and where they cannot be told."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import yaml
from helpers import ROOT

from train.cli.__main__ import main
from train.evaluate import accuracy
from train.evaluate.diversity import Answered, pass_at_k
from train.evaluate.rerank import drawn, likeliest_at_k, majority_at_k
from train.tasks import FamilySpec, build_suite


def by_hand(answers, right, k):
    """Mean over all subsets of k; of equally frequent answers each wins with the same chance."""
    won = []
    for subset in itertools.combinations(range(len(answers)), k):
        votes = Counter("gold" if right[i] else answers[i] for i in subset if right[i] or answers[i] is not None)
        best = [a for a, n in votes.items() if n == max(votes.values())]
        won.append(best.count("gold") / len(best) if best else 0.0)
    return sum(won) / len(won)


@pytest.mark.parametrize("seed", range(6))
def test_majority_is_the_mean_over_all_subsets(seed):
    draw = np.random.default_rng(seed)
    n = 8
    right = draw.random(n) < (0.15, 0.3, 0.5)[seed % 3]
    wrong = draw.choice(["5", "6", "7", "none"], n)
    answers = ["2" if good else None if a == "none" else str(a) for good, a in zip(right, wrong, strict=True)]
    for k in range(1, n + 1):
        assert majority_at_k(answers, right.tolist(), k) == pytest.approx(by_hand(answers, right, k), abs=1e-12)


def test_the_majority_of_one_is_one_sample():
    answers, right = ["2", "2", "3", None, "4"], [True, True, False, False, False]
    assert majority_at_k(answers, right, 1) == pytest.approx(pass_at_k(5, 2, 1))
    assert majority_at_k(answers, right, 5) == 1.0
    assert majority_at_k(["3", "3", "2"], [False, False, True], 3) == 0.0
    # A right answer that is written in another way is the same answer.
    assert majority_at_k(["2.0", "2", "3", "3", "4"], [True, True, False, False, False], 5) == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_the_likeliest_is_the_mean_over_all_subsets(seed):
    draw = np.random.default_rng(seed)
    scores, right = draw.integers(-3, 0, 7).astype(float).tolist(), (draw.random(7) < 0.4).tolist()
    for k in range(1, 8):
        won = [right[max(s, key=lambda i: (scores[i], -i))] for s in itertools.combinations(range(7), k)]
        assert likeliest_at_k(scores, right, k) == pytest.approx(sum(won) / len(won), abs=1e-12)


def test_programs_have_no_majority_and_rows_without_likelihoods_no_rank():
    spec = FamilySpec("gcd", "id", {"min_value": 1, "max_value": 30}, test=2)
    suite = build_suite([spec], seed=0, style="compact")
    questions = list(suite.questions("test"))
    samples = [
        {
            "question_id": q.id, "text": f"#{q.answer if i else 99}", "score": float(i > 0), "tokens": [1, 2],
            "logprob": -i,
        }
        for q in questions for i in range(3)
    ]  # fmt: skip
    found = drawn(suite, questions, samples)
    assert found[questions[0].id].likelihoods == (0.0, -0.5, -1.0)
    [row] = [r for r in accuracy.pass_rates(questions, found, 3) if r["k"] == 3]
    assert (row["pass"][0], row["maj"][0], row["rank"][0]) == (1.0, 1.0, 0.0)
    program = {q.id: Answered((), (True, False, True), ("", "", "")) for q in questions}
    [row] = [r for r in accuracy.pass_rates(questions, program, 3) if r["k"] == 3]
    assert (row["pass"][0], row["maj"], row["rank"]) == (1.0, None, None)
    table = [{"split": "test", "domain": "id", "family": "all"}]
    accuracy.add_at_k(
        table, questions, {questions[0].id: program[questions[0].id], questions[1].id: found[questions[1].id]}, 3
    )
    assert set(table[0]) == {"split", "domain", "family", "pass_at"}


def test_evaluate_tells_them_beside_pass_at_k(tmp_path, capsys):
    """`jaxmerge evaluate MODEL CONFIG evaluation.samples=4`."""
    tiny = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    tiny["tasks"]["families"] = [{**tiny["tasks"]["families"][0], "test": 4}]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    out = tmp_path / "found.json"
    words = [str(ROOT / "configs" / "miniature"), str(tmp_path / "tiny.yaml"), "evaluation.samples=4", f"out={out}"]
    assert main(["evaluate", *words, "evaluation.max_new_tokens=40"]) == 0
    rows = json.loads(out.read_text())["pass_at"]
    assert [row["k"] for row in rows] == [1, 2, 4]
    for row in rows:
        assert row["maj"][0] <= row["pass"][0] + 1e-9
        assert row["rank"][0] <= row["pass"][0] + 1e-9
    assert rows[0]["pass"] == rows[0]["maj"]
    assert rows[0]["rank"] == pytest.approx(rows[0]["pass"])
    assert "maj@4" in capsys.readouterr().out
