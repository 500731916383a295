"""Measures of samples by hand: entropy, distinct solutions, pass@k against all subsets, twins and LiMem."""

import itertools
import math
import types

import numpy as np
import pytest

from train.evaluate import answer, diversity, memorise
from train.evaluate.diversity import Answered, answer_entropy, answer_of, grouped, interval, pass_at_k, pass_curve
from train.report import analysis_samples as sections_samples
from train.runtime.jsonl import write_jsonl
from train.studies import measures
from train.tasks import FamilySpec, build_suite
from train.tasks.task import Question

QUESTION = Question("gcd-1", "gcd", "id", "train", "g4,6?", "2", None, {})


def rows(*pairs, question="gcd-1"):
    return [{"question_id": question, "text": text, "score": score} for text, score in pairs]


# --- variety -----------------------------------------------------------------------------------------------


def test_answers_are_read_as_verifiers_do():
    assert answer_of(QUESTION, "4%6=4,6%4=2,4%2=0#2", "compact") == "2"
    assert answer_of(QUESTION, "4%6=4", "compact") is None
    assert answer_of(QUESTION, "So 2.\nAnswer: 12", "instruct") == "12"
    gsm8k = Question("gsm8k-1", "gsm8k", "id", "test", "?", "7", None, {"extract": "strict"})
    assert answer_of(gsm8k, "3 + 4 = 7\n#### 7 and 9", "instruct") == "7"
    choice = Question("choice-1", "choice", "id", "test", "?", "B", None, {"choices": ["x", "y"]})
    assert answer_of(choice, "B. y", "instruct") == "B"


def test_variety_by_hand():
    other = Question("gcd-2", "gcd", "id", "train", "g5,10?", "5", None, {})
    samples = [
        *rows(("4%2=0#2", 1.0), ("4%2=0  #2", 1.0), ("6%4=2,4%2=0#2", 1.0), ("1#3", 0.0)),
        *rows(("1#1", 0.0), ("1#7", 0.0), ("1", 0.0), ("2", None), question="gcd-2"),
    ]
    found = grouped(samples, {"gcd-1": QUESTION, "gcd-2": other}, "compact")
    assert found["gcd-1"].answers == ("2", "2", "2", "3")
    assert found["gcd-2"].answers == ("1", "7", None, None)
    one = 0.75 * math.log2(4 / 3) + 0.25 * 2
    assert answer_entropy(found["gcd-1"].answers) == pytest.approx(one)
    measured = diversity.diversity(found)
    assert measured["entropy"][0] == pytest.approx((one + 1.5) / 2)
    assert measured["distinct_answers"][0] == pytest.approx((2 + 3) / 2)
    # Runs of space are one space, but a space is not none.
    assert measured["distinct_solutions"][0] == pytest.approx(3 / 2)
    assert measured["distinct_when_solved"] == [3.0, 3.0, 3.0]
    assert measured["solved"][0] == 0.5
    assert (measured["questions"], measured["samples"]) == (2, 4)
    nothing = diversity.diversity({"q": Answered((None,), (False,), ("",))})
    assert nothing["distinct_when_solved"] is None


# --- pass@k ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased():
    # The mean over c ~ Binomial(6, p) is 1 − (1 − p)^k, exactly.
    p, n = 0.3, 6
    for k in range(1, 7):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k)


def test_pass_curve_goes_as_far_as_samples_do():
    curve = pass_curve([(40, 1), (33, 0), (64, 64)])
    assert [point["k"] for point in curve] == list(range(1, 33))
    assert curve[0]["value"][0] == pytest.approx((1 / 40 + 0 + 1) / 3)
    assert all(low <= mean <= high for mean, low, high in (point["value"] for point in curve))
    assert [point["k"] for point in pass_curve([(4, 1), (3, 2)])] == [1, 2, 3]
    with pytest.raises(ValueError, match="pass@5 of 4 samples"):
        pass_at_k(4, 1, 5)


def test_bootstrap_intervals_cover():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        _, low, high = interval((rng.random(60) < 0.3).astype(float).tolist(), seed=trial, resamples=300)
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99
    assert interval([0.0, 1.0], seed=1) == interval([0.0, 1.0], seed=1)
    assert interval([2.0]) == [2.0, 2.0, 2.0]


def test_what_a_search_kept_tells_no_pass_at_k(tmp_path):
    """Its right ones are as many as it wanted, its wrong ones those it met on the way."""

    def study(source, samples=0, found=1):
        folder = tmp_path / f"{source}-{found}"
        folder.mkdir(exist_ok=True)
        write_jsonl(folder / "batch-0000.jsonl", rows(("1#2", 1.0), ("1#3", 0.0))[: 2 * found])
        sampling = types.SimpleNamespace(source=source)
        session = types.SimpleNamespace(
            config=types.SimpleNamespace(block=lambda *_: sampling, tasks=types.SimpleNamespace(style="compact")),
            suite=types.SimpleNamespace(questions=lambda *_, **__: [QUESTION], verify=lambda q, text: text == "1#2"),
            journal=types.SimpleNamespace(committed_folder=lambda name: folder),
        )
        one = types.SimpleNamespace(number=1, sample=types.SimpleNamespace(name="sample"))
        options = types.SimpleNamespace(samples=samples)
        return types.SimpleNamespace(session=session, method="m", rounds=[one], options=options, seed=0, notes=[])

    plain, dart, nothing = study("plain"), study("dart"), study("mcts", found=0)
    (row,) = measures.variety(plain)
    assert (row["solved"][0], len(row["pass"]), plain.notes) == (1.0, 2, [])
    (row,) = measures.variety(dart)
    assert (row["solved"], row["pass"]) == (None, [])
    assert row["entropy"][0] == 1.0
    assert "samples=N" in dart.notes[0]
    assert "sampling.source: dart" in dart.notes[0]
    assert sections_samples.passes({"diversity": [row]}) is None
    assert "–" in str(sections_samples.diversity({"diversity": [row]}).tables)
    assert measures.variety(nothing) == []
    assert sections_samples.diversity({"diversity": []}) is None


# --- memorisation ------------------------------------------------------------------------------------------

GCD = FamilySpec("gcd", "id", {"min_value": 1, "max_value": 60}, train=12, test=6)


@pytest.fixture(scope="module")
def suite():
    return build_suite([GCD], seed=0, style="compact")


def test_twins_read_the_same_but_for_few_numbers(suite):
    questions = suite.questions("train")
    pairs = memorise.twins(suite, questions)
    assert set(pairs) == {q.id for q in questions}
    asked = {q.text for q in suite.all}
    assert len({twin.id for twin in pairs.values()}) == len(pairs)
    for question in questions:
        twin = pairs[question.id]
        assert twin.text not in asked
        words, numbers = memorise.template(question.text)
        assert memorise.template(twin.text)[0] == words
        changed, _ = memorise.distance(numbers, memorise.template(twin.text)[1])
        assert changed == 1, "of two numbers one is the same"
        # The twin's gold answer is right: its own worked solution passes, the old answer only where it is the same.
        assert suite.verify(twin, str(twin.solution)) == 1.0
        assert suite.verify(twin, f"#{question.answer}") == float(question.answer == twin.answer)
    assert memorise.twins(suite, questions) == pairs


def test_families_without_numbers_or_generator_have_no_twins(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "What is 1 + 2?", "answer": "1 + 2 = 3\\n#### 3"}\n')
    specs = [
        FamilySpec("gsm8k", "id", {"path": str(path)}, train=1),
        FamilySpec("spell_backward", "id", {"min_word_len": 3, "max_word_len": 4}, train=2),
        FamilySpec("chain_sum", "id", {"max_terms": 2, "max_digits": 1}, train=2),
    ]
    suite = build_suite(specs, seed=0, style="instruct")
    pairs = memorise.twins(suite, suite.questions("train"), draws=1000)
    assert {q.family for q in suite.all if q.id in pairs} == {"chain_sum"}


def test_limem_by_hand(suite):
    questions = suite.questions("train")[:4]
    pairs = memorise.twins(suite, questions)
    # Three of four are solved, and of these three only the twin of the first.
    knows = {q.id for q in questions[:3]} | {pairs[questions[0].id].id}
    calls = []

    def solve(asked):
        calls.append([q.id for q in asked])
        return {q.id: float(q.id in knows) for q in asked}

    found = memorise.memorisation(solve, questions, pairs)
    assert (found["accuracy"], found["solved"], found["questions"]) == (0.75, 3, 4)
    assert found["consistency"] == pytest.approx(1 / 3)
    assert found["score"] == pytest.approx(0.75 * (1 - 1 / 3))
    assert found["changed"] == 0.5
    assert calls[1] == [pairs[q.id].id for q in questions[:3]], "twins of solved questions alone are asked"
    none = memorise.memorisation(lambda asked: dict.fromkeys((q.id for q in asked), 0.0), questions, pairs)
    assert (none["score"], none["consistency"]) == (0.0, None)


# --- answers that a report shows -----------------------------------------------------------------------------


def test_a_report_shows_the_first_questions_of_each_family_whatever_became_of_them():
    def ask(family, domain, split, count):
        name = f"{family}-{domain}-{split}"
        return [Question(f"{name}-{i}", family, domain, split, f"{i}?", str(i), None, {}) for i in range(count)]

    def chosen(questions, score):
        said = [{"question_id": q.id, "sample": 0, "text": f"says {q.id}", "score": score} for q in questions]
        return answer.to_show(questions, said)

    questions = ask("gcd", "id", "validation", 3) + ask("gcd", "id", "test", 3) + ask("sums", "ood", "validation", 1)
    shown = chosen(questions, 0.0)
    assert [e["question_id"] for e in shown] == ["gcd-id-test-0", "sums-ood-validation-0", "gcd-id-test-1"]
    assert [e["question_id"] for e in chosen(questions, 1.0)] == [e["question_id"] for e in shown]
    assert shown[0] == {
        "question_id": "gcd-id-test-0", "family": "gcd", "domain": "id", "question": "0?", "answer": "0",
        "text": "says gcd-id-test-0", "score": 0.0,
    }  # fmt: skip
    many = [q for i in range(9) for q in ask(f"family{i}", "ood", "test", 5)]
    families = [e["family"] for e in chosen(many, None)]
    assert families == [f"family{i}" for i in (*range(9), 0, 1, 2)], "each once before one is seen twice"
