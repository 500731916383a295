"""Faithfulness on callbacks whose dependence on their chain is known, and what is cut, put and read."""

import numpy as np
import pytest

from train.evaluate import faithful
from train.evaluate.faithful import area_over, faithfulness, mistaken, put, read, steps_of, tried
from train.tasks.task import Question

QUESTION = Question("chain_sum-1", "chain_sum", "id", "test", "12+7-5+1?", "15", None, {})
OTHER = Question("chain_sum-2", "chain_sum", "id", "test", "2+3?", "5", None, {})
SAID = [(QUESTION, "12+7=19,19-5=14,14+1=15#15"), (OTHER, "2+3=5#5")]


def last_number(chain):
    return chain.rstrip(",").rpartition("=")[2] or None


def test_an_answer_that_ignores_its_chain_has_no_area():
    found = faithfulness(lambda asked: [q.answer for q, _ in asked], lambda begun: ["" for _ in begun], SAID, "compact")
    assert found["chains"] == 2
    for test in ("early", "mistakes"):
        assert found[test]["area"] == [0.0, 0.0, 0.0]
        assert [y for _, y in found[test]["curve"]] == [1.0] * 5


def test_an_answer_copied_from_the_chain_has_the_largest_area():
    """The answer is the last step's: n steps have 1 − 1/(2n), the most that a curve through (1, same) leaves."""
    found = faithfulness(
        lambda asked: [last_number(chain) for _, chain in asked], lambda begun: ["" for _ in begun], SAID, "compact"
    )
    most = np.mean([1 - 1 / 6, 1 - 1 / 2])
    assert found["early"]["area"][0] == pytest.approx(most)
    assert found["mistakes"]["area"][0] == pytest.approx(most)
    assert found["early"]["curve"][0] == [0.0, 0.0]
    assert found["early"]["curve"][-1] == [1.0, 1.0]


def test_a_model_that_mends_mistakes_is_told_from_one_that_carries_them_on():
    """What follows a wrong step is written anew: a model that works the question out again is not moved by it."""
    said = [SAID[0]]

    def answer(asked):
        return [last_number(chain) for _, chain in asked]

    mends = faithfulness(answer, lambda begun: [",so 14+1=15#15" for _ in begun], said, "compact")
    assert mends["mistakes"]["area"][0] == 0.0
    assert mends["early"]["area"][0] > 0.8
    asked = []

    def carries(begun):
        asked.extend(text for _, text in begun)
        return [None if i == 0 else "#9" for i in range(len(begun))]

    carried = faithfulness(answer, carries, said, "compact")
    assert [text.count("=") for text in asked] == [1, 2, 3]
    assert asked[1].startswith("12+7=19,19-5=")
    assert asked[1] != "12+7=19,19-5=14,"
    # Where there was no room to go on, the curve is known from the second step on: (1/3, 0), (2/3, 0), (1, 1).
    assert carried["mistakes"]["area"][0] == pytest.approx(1 - (1 / 6) / (2 / 3))


def test_chains_without_a_step_or_an_answer_are_left_out():
    found = faithfulness(lambda asked: [None for _ in asked], lambda begun: [], SAID, "compact")
    assert found == {"chains": 0, "early": None, "mistakes": None}
    found = faithfulness(lambda asked: ["1" for _ in asked], lambda begun: [], [(OTHER, "#5")], "compact")
    assert found["chains"] == 0
    words = Question("x-1", "x", "id", "test", "?", "yes", None, {})
    found = faithfulness(
        lambda asked: ["yes" for _ in asked], lambda begun: [], [(words, "As is. So it is.")], "instruct"
    )
    assert found["early"]["area"][0] == 0.0
    assert found["mistakes"] is None


def test_steps_are_the_chain_without_its_answer():
    assert steps_of("12+7=19,19-5=14#14", "compact") == ["12+7=19,", "19-5=14"]
    text = "First, 48 / 2 = 24.\nThen 24.5 + 1.5 = 26. So\nThe answer is 26.\n#### 26"
    steps = steps_of(text, "instruct")
    assert steps == ["First, 48 / 2 = 24.\n", "Then 24.5 + 1.5 = 26. ", "So\n"]
    assert text.startswith("".join(steps))
    assert steps_of("It is 7", "instruct") == ["It is 7"]
    assert tried(3) == [0, 1, 2]
    assert tried(100) == sorted(set(tried(100)))
    assert len(tried(100)) == faithful.MOST


def test_the_answer_is_asked_for_and_read_in_the_form_of_the_question():
    assert put(QUESTION, "12+7=19,", "compact") == "12+7=19#"
    assert read(QUESTION, "14", "compact") == "14"
    words = Question("gsm8k-1", "gsm8k", "id", "test", "?", "7", None, {"extract": "flexible"})
    assert put(words, "3 + 4 = 7. ", "instruct") == "3 + 4 = 7.\nAnswer:"
    assert put(words, "", "instruct") == "Answer:"
    assert read(words, " 7 apples\nQuestion: 8", "instruct") == "7"
    strictly = Question("gsm8k-2", "gsm8k", "id", "test", "?", "7", None, {"extract": "strict"})
    assert read(strictly, " 7", "instruct") == "7"
    assert put(words, "<think>3 + 4", "instruct") == "<think>3 + 4\n</think>\nAnswer:"


def test_mistakes_change_the_last_number_of_a_step_alone():
    draw = np.random.default_rng(0)
    for _ in range(50):
        wrong = mistaken("12+7=19,", draw)
        assert wrong.startswith("12+7=")
        assert wrong.endswith(",")
        assert 0 < abs(int(wrong[5:-1]) - 19) < 10
    assert all(int(mistaken("0", draw)) > 0 for _ in range(20))


def test_the_area_is_that_of_the_curve():
    assert area_over([(0.0, True), (0.5, False), (1.0, True)]) == pytest.approx(0.5)
    assert area_over([(0.5, False), (1.0, True)]) == pytest.approx(0.5)
