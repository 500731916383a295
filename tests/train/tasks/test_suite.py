"""Laws of the tasks: no leak between splits, right answers judged right, the same in every process."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from helpers import ROOT
from helpers.suites import COMPACT, INSTRUCT

from train.log import UserError
from train.tasks import (
    FamilySpec,
    Question,
    build_suite,
    extract_answer,
    family_names,
    few_shot,
    majority_answer,
    reward,
)
from train.tasks.reasoning import InstructTask, _is_expression, _is_literal, exact_value
from train.tasks.task import normalise


@pytest.fixture(scope="module")
def instruct():
    return build_suite(INSTRUCT, seed=1, style="instruct")


@pytest.fixture(scope="module")
def compact():
    return build_suite(COMPACT, seed=1, style="compact")


@pytest.fixture(params=["instruct", "compact"])
def suite(request):
    return request.getfixturevalue(request.param)


# --- suites ------------------------------------------------------------------------------------------------


def test_counts_are_as_asked(suite):
    for spec in suite.specs:
        for split in ("train", "validation", "test"):
            found = suite.questions(split, domain=spec.domain, family=spec.family)
            assert len(found) == spec.count(split)


def test_no_question_is_in_two_places(suite):
    texts = [(q.family, normalise(q.text)) for q in suite.all]
    assert len(texts) == len(set(texts))
    assert len({q.id for q in suite.all}) == len(suite.all)


def test_small_families_leak_nothing_although_their_draws_collide():
    # 100 one-digit products in all: three splits of 30 must share draws, and may not share questions
    spec = FamilySpec("products", "id", {"max_digits": 1}, train=30, validation=30, test=30)
    texts = [q.text for q in build_suite([spec], seed=0, style="compact").all]
    assert len(set(texts)) == 90


def test_a_larger_pool_leaves_the_test_questions_as_they_are(compact):
    larger = [dataclasses.replace(s, train=2 * s.train) for s in COMPACT]
    again = build_suite(larger, seed=1, style="compact")
    for split in ("validation", "test"):
        assert again.questions(split) == compact.questions(split)


def test_another_seed_gives_other_questions(compact):
    other = build_suite(COMPACT, seed=2, style="compact")
    mine, its = ({q.text for q in s.questions(domain="id")} for s in (compact, other))
    assert len(mine & its) < 0.2 * len(mine)


def test_gold_answers_are_right_and_others_wrong(suite):
    for q in suite.all:
        right = q.solution if suite.style == "compact" else f"Let me see.\nAnswer: {q.answer}"
        assert suite.verify(q, right) == 1.0, q
        wrong = (q.solution or "") + "1" if suite.style == "compact" else f"Answer: {_perturb(q.answer)}"
        assert suite.verify(q, wrong) == 0.0, q
        assert suite.verify(q, "") == 0.0
    assert suite.unjudged() == {}


def _perturb(answer):
    if answer.startswith("["):
        numbers = json.loads(answer.replace("'", '"'))
        return str([*numbers[:-1], str(float(numbers[-1]) + 0.5)])  # the generator's scorer would let this pass
    return str(int(answer) + 1)


def test_worked_solutions_end_in_the_answer(suite):
    for q in suite.all:
        if q.solution is not None:
            found = extract_answer(q.solution.replace("#", "\nAnswer: "), q.answer)
            assert found is not None
            # gsm_symbolic may end its solution in £5280.0, number_sorting in a list without brackets
            assert q.family == "number_sorting" or float(found) == float(q.answer)


def test_majority_baselines(compact):
    rows = compact.majority_baselines()
    gcd = next(r for r in rows if r["domain"] == "id" and r["split"] == "test")
    assert gcd["n"] == 80
    assert 0.1 < gcd["accuracy"] < 0.6
    pool = compact.questions("test", domain="id")
    always = sum(compact.verify(q, f"#{gcd['answer']}") == 1.0 for q in pool) / len(pool)
    assert always == gcd["accuracy"]
    assert majority_answer([]) == ("", 0.0)


def test_suites_do_not_depend_on_the_hash_seed():
    program = """
import hashlib, json
from train.tasks import FamilySpec, build_suite, pretraining_rows, MINIATURE
fixed = ["isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder"]
specs = [FamilySpec(f, "ood", {}, test=5) for f in [*fixed, "chain_sum", "gsm_symbolic", "letter_counting"]]
suite = build_suite(specs, seed=3, style="instruct")
found = [(q.id, q.text, q.answer) for q in suite.all]
found.append(pretraining_rows(MINIATURE, 5000, seed=3)[0].tolist())
print(hashlib.sha256(json.dumps(found).encode()).hexdigest())
"""
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, timeout=60,
        ).stdout
        for seed in ("0", "1", "2")
    }  # fmt: skip
    assert len(digests) == 1


# --- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "style", "message"),
    [
        (("chain_summ", "id", {}), "instruct", "no family 'chain_summ'; did you mean chain_sum"),
        (("game_of_life_halting", "id", {}), "instruct", "refused: its scorer accepts any text"),
        (("chain_sum", "id", {"max_term": 2}), "instruct", "no setting 'max_term'; did you mean max_terms"),
        (("chain_sum", "id", {"min_terms": 9}), "instruct", "max_terms must be >= min_terms"),
        (("letter_counting", "id", {}), "compact", "no compact rendering; choose among chain_sum, gcd, lcm"),
        (("products", "id", {"max_digits": 1}), "instruct", "only 100 distinct questions left for train, and 101"),
        (("chain_sum", "in", {}), "instruct", "domain is 'in'"),
        (("chain_sum", "id", {"seed": 1}), "instruct", "args sets seed"),
        (("chain_sum", "id", {}), "terse", "style is 'terse'"),
    ],
)
def test_mistakes_are_named(spec, style, message):
    family, domain, args = spec
    with pytest.raises(UserError, match=message):
        build_suite([FamilySpec(family, domain, args, train=101)], seed=0, style=style)


def test_counts_must_be_counts():
    for count in (-1, 1.5, True, "9"):
        with pytest.raises(UserError, match="give a number of questions"):
            FamilySpec("gcd", "id", {}, test=count)  # pyright: ignore
    with pytest.raises(UserError, match="asks for no questions"):
        FamilySpec("gcd", "id")


# --- judging what a model says -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold", "found"),
    [
        ("12 + 7 = 19\nAnswer: 19", "19", "19"),
        ("answer: 3\nNo.\n**Answer:** 4.", "4", "4"),
        ("Answer: 12 + 7 = 19 apples", "19", "19"),
        (r"so \boxed{-5}", "-5", "-5"),
        ("<answer>1,400</answer>", "1400", "1400"),
        ("35 - 40 = -5.", "-5", "-5"),
        ("10-5", "5", "5"),
        ("= 2.50", "2.5", "2.50"),
        ("first 1, then 2,3", "3", "3"),
        ("no number", "3", None),
        ("Sorted: [1, 2]", "['1', '2']", "[1, 2]"),
        ("I think it is True", "True", None),
        ("Answer: True.", "True", "True"),
        ("Answer:\n1 2\n3 4\n", "1 2\n3 4", "1 2\n3 4"),
    ],
)
def test_answers_are_found_in_text(text, gold, found):
    assert extract_answer(text, gold) == found


def test_a_scorer_that_raises_is_counted_and_never_raises(instruct):
    task = InstructTask("chain_sum")
    q = instruct.questions("test", domain="id")[0]
    task._scorers[repr(sorted(q.entry["args"].items()))] = None
    assert task.verify(q, "Answer: 1") is None
    assert task.verify(q, None) is None  # pyright: ignore
    assert dict(task.unjudged) == {"AttributeError": 1, "TypeError": 1}
    assert [reward(s) for s in (1.0, 0.0, None)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("style", ["compact", "instruct"])
@pytest.mark.parametrize("error", [ValueError("x"), RecursionError(), ZeroDivisionError(), MemoryError()])
def test_an_answer_whose_verifier_raises_is_not_judged(style, error):
    """Whatever task it is of: those of files and of other people's code as well."""

    class Task:
        def __init__(self):
            self.unjudged = Counter()

        def verify(self, question, text):
            raise error

    suite = build_suite([FamilySpec("gcd", "id", test=1)], seed=0, style=style)
    suite = dataclasses.replace(suite, tasks={"gcd": Task()})
    assert suite.verify(suite.all[0], "7") is None
    assert suite.reward(suite.all[0], "7") == 0.0
    assert suite.unjudged() == {"gcd": {type(error).__name__: 2}}


def test_part_marks_and_lost_signs_are_wrong(instruct):
    q = next(q for q in instruct.questions(family="gsm_symbolic") if int(q.answer) > 0)
    assert instruct.verify(q, f"Answer: -{q.answer}") == 0.0
    q = instruct.questions("test", domain="id")[0]
    assert instruct.verify(q, f"Answer: {q.answer}0") == 0.0


def test_only_harmless_text_reaches_scorers_that_evaluate():
    for text in ("2*x**3 - sin(x)/4 + C", "(3+4)*6", "-5*x", "x**(1/2)"):
        assert _is_expression(text), text
    for text in (
        "__import__('os').system('x')", "9**9**9", "(9**60)**60", "9**(60*60)", "9**99", "x.y", "open(x)", "x;y",
        "'a'*9", "[1]*9",
    ):  # fmt: skip
        assert not _is_expression(text), text
    for text in ("[['Q', '_']]", "[1, 2]", "_ Q\nQ _", "1 2 3"):
        assert _is_literal(text), text
    for text in ("[0]*10**9", "exit()", "[x for x in y]", "a.b"):
        assert not _is_literal(text), text
    task = InstructTask("simple_integration")
    text, answer, solution, entry = next(task.draw({}, 5, 1))
    q = Question("x", task.name, "ood", "test", text, answer, solution, entry)
    assert task.verify(q, f"Answer: {answer}") == 1.0
    assert task.verify(q, "Answer: __import__('os').getcwd()") == 0.0


def test_wrong_gold_answers_of_the_generator_are_left_out():
    # Without brackets the generator works from left to right: 2 + 3 * 4 would be 20.
    args = {"max_terms": 4, "max_digits": 1, "allow_parentheses": False}
    suite = build_suite([FamilySpec("basic_arithmetic", "ood", args, test=60)], seed=0, style="instruct")
    for q in suite.all:
        assert exact_value(q.entry["metadata"]["expression"]) == int(q.answer)


def test_most_families_work_by_name():
    # These take seconds to open (pattern databases) or give no gold answer that their scorer accepts as text.
    apart = {"rubiks_cube", "boxnet", "graph_color", "propositional_logic", "rush_hour", "knight_swap"}
    assert len(family_names()) == 104
    for family in family_names():
        if family in apart:
            continue
        task = InstructTask(family)
        for text, answer, solution, entry in task.draw({}, 987_654, 1):
            q = Question("x", family, "ood", "test", text, answer, solution, entry)
            assert task.verify(q, f"Answer: {answer}") == 1.0, family
            assert task.verify(q, "") in (0.0, None), family


# --- prompts -----------------------------------------------------------------------------------------------


def test_instruct_prompts_are_chat_messages_that_end_with_the_question(instruct):
    q = instruct.questions("train")[0]
    messages = instruct.prompt(q)
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[-1]["content"] == q.text
    assert extract_answer(messages[1]["content"], "7") == "7"


def test_few_shot_prompts_hold_solved_examples_and_leave_the_question_open(instruct):
    *examples, q = instruct.questions("train")[:4]
    text = few_shot(q, examples)
    assert text.endswith(f"Question: {q.text}\nSolution:")
    assert text.count("Answer: ") == 3
    assert all(e.solution in text for e in examples)
