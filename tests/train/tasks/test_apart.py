"""Tests in a process of their own: what they get of the program, what it cannot do to them, what it never sees."""

import json

import pytest

from train.log import UserError
from train.tasks.sandbox import Program, calls


def test_tests_apart_call_the_program(first):
    source = (
        "def add(a, b=1):\n    return a + b\ndef sort(x):\n    x.sort()\n"
        "def fail(x):\n    raise ValueError(f'no {x}')\ndef same(x):\n    return x\n"
    )
    tests = (
        "assert add(1) == 2 and add(1, b=5) == 6 and helper(1) == 2\n"
        "x = [3, 1, 2]\nassert sort(x) is None and x == [1, 2, 3]\n"
        "try:\n    fail(7)\nexcept ValueError as error:\n    assert str(error) == 'no 7'\n"
        "else:\n    raise AssertionError\n"
        "for v in (None, True, 2**70, -1, 1.5, float('inf'), 'ß', b'x', (1, (2,)), [], {1: {2}},"
        " frozenset((1,)), 1j):\n"
        "    assert same(v) == v and type(same(v)) is type(v), v\n"
    )
    program = Program("x", source, tests=tests, setup="def helper(x): return x + 1",
                      calls=("add", "sort", "fail", "same"))  # fmt: skip
    (verdict,) = first.run([program])
    assert verdict.passed, verdict
    (verdict,) = first.run([Program("y", source, tests="assert add(1) == 3", calls=("add",))])
    assert (verdict.passed, verdict.reason) == (False, "AssertionError")


APART = {
    # errors of the program, none of which the tests may take for something else
    "SystemExit": ("def f(x):\n    raise SystemExit(0)", "try: f(1)\nexcept BaseException: pass", "SystemExit: 0"),
    "KeyboardInterrupt": (
        "def f(x):\n    raise KeyboardInterrupt", "try:\n    f(1)\nexcept BaseException:\n    pass", "KeyboardInterrupt"
    ),
    "GeneratorExit": ("def f(x):\n    raise GeneratorExit", "try: f(1)\nexcept: pass", "GeneratorExit"),
    "its own BaseException": (
        "class Out(BaseException): pass\ndef f(x):\n    raise Out('of here')", "try: f(1)\nexcept: pass", "Out: of here"
    ),
    "its own Exception": ("class Own(Exception): pass\ndef f(x):\n    raise Own('x')", "f(1)", "RuntimeError: Own: x"),
    "StopIteration": (
        "def f(x):\n    raise StopIteration", "assert all(map(f, [1, 2]))", "RuntimeError: StopIteration"
    ),
    "one that takes more": ("def f(x):\n    return b'\\xff'.decode()", "f(1)", "RuntimeError: UnicodeDecodeError: "),
    "one that cannot be said": (
        "class Own(Exception):\n    def __str__(self): raise SystemExit\ndef f(x):\n    raise Own", "f(1)", "SystemExit"
    ),
    "leaves while it is called": ("import os\ndef f(x): os._exit(0)", "try: f(1)\nexcept: pass", "left by itself"),
    "dies while it is called": (
        "import os\ndef f(x): os.kill(os.getpid(), 9)", "try: f(1)\nexcept: pass", "killed by SIGKILL"
    ),
    "at the top": ("def f(x): return 1\nraise SystemExit", "assert f(1) == 1", "SystemExit"),
    # objects of the program stay where they are
    "equals everything": (
        "class A:\n    __eq__ = lambda s, o: True\n    __hash__ = object.__hash__\n    __bool__ = lambda s: False\n"
        "def f(x): return A()",
        "assert f(1) and [f(1)] != [2] and f(1) != f(1)\nassert f(1) == 2", "AssertionError",
    ),
    "poses as a number": (
        "class A(int):\n    __class__ = int\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\n"
        "def f(x): return A(3)", "assert f(1) == 2", "AssertionError",
    ),
}  # fmt: skip


def test_an_exception_of_the_program_is_a_failure_of_its_test(first):
    """Whatever its type, and whatever the tests catch."""
    verdicts = first.run([Program(n, p, 5.0, tests=t, calls=("f",)) for n, (p, t, _) in APART.items()])
    wanted = [(name, False, reason) for name, (_, _, reason) in APART.items()]
    assert [(v.id, v.passed, v.reason[: len(APART[v.id][2])]) for v in verdicts] == wanted


def test_tests_apart_use_objects_of_the_program(first):
    """As tests of MBPP do: nodes of trees, pairs, constants, their own classes."""
    source = (
        "LIMIT = 3\nclass Empty(IndexError): pass\nclass Node:\n    def __init__(self, v):\n        self.v = v\n"
        "        self.left = self.right = None\n    def depth(self):\n"
        "        return 1 + max(n.depth() if n else 0 for n in (self.left, self.right))\n"
        "def height(n): return n.depth()\n"
        "def first(nodes):\n    if not nodes: raise Empty('none')\n    return nodes[0]\n"
    )
    setup = "root = Node(1)\nroot.left = Node(2)\nroot.left.right = Node(LIMIT)"
    tests = (
        "assert height(root) == LIMIT == 3 and root.left.right.v == 3 and root.right is None\n"
        "assert isinstance(root, Node) and not isinstance(1, Node)\n"
        "assert first([root, root.left]) == root != root.left and first((root.left,)).v == 2\n"
        "assert len({root, first([root])}) == 1 and root\n"
        "try:\n    first([])\nexcept IndexError as error:\n    assert str(error) == 'none'\n"
        "else:\n    raise AssertionError\n"
        "try:\n    root.middle\nexcept AttributeError:\n    pass\nelse:\n    raise AssertionError\n"
        "assert not hasattr(root, 'middle')\nroot.v = 'new'\nassert root.v == 'new'\n"
    )
    names = ("Node", "LIMIT", "height", "first")
    (verdict,) = first.run([Program("x", source, tests=tests, setup=setup, calls=names)])
    assert verdict.passed, verdict
    (verdict,) = first.run([Program("x", source, tests="assert height(object()) == 1", calls=names)])
    assert verdict.reason == ("TypeError: object cannot be passed between the tests and the program: plain values only")
    (verdict,) = first.run([Program("x", source, tests="assert missing(1)", calls=("missing",))])
    assert verdict.reason == "NameError: name 'missing' is not defined"


SEARCHER = """
import sys, gc
def strings(start):
    seen, todo = set(), [start]
    while todo:
        value = todo.pop()
        if id(value) in seen or len(seen) > 200_000: continue
        seen.add(id(value))
        if isinstance(value, (str, bytes)): yield value if isinstance(value, str) else value.decode('latin-1')
        elif isinstance(value, dict): todo += list(value) + list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)): todo += list(value)
        elif hasattr(value, '__dict__'): todo.append(vars(value))
        for name in ('__defaults__', '__closure__', 'cell_contents', 'args', 'func', 'keywords', '__self__'):
            try: todo.append(getattr(value, name))
            except Exception: pass
def f(x):
    frame, found = sys._getframe(), []
    while frame:
        found.append(dict(frame.f_locals)); found.append(dict(frame.f_globals)); frame = frame.f_back
    found += gc.get_objects()
    return sum('ze?bra'.replace('?', '') in text for text in strings(found))
"""


FRAMES = """
import sys
def f(x):
    frame, found = sys._getframe(), 0
    while frame:
        values = [v for v in frame.f_locals.values() if isinstance(v, (dict, str))]
        found += any('ze?bra'.replace('?', '') in repr(v) for v in values)
        frame = frame.f_back
    return found
"""


@pytest.mark.parametrize("source", [FRAMES, SEARCHER])
def test_a_program_never_shares_a_process_that_held_its_tests(first, source):
    """Neither the frames below it nor any object that lives hold a word of the tests, their setup or earlier ones."""
    tests = ["'zebra'\nassert f(1) == 0, f(1)"] * 3
    programs = [Program(str(i), source, tests=t, setup="x = 'zebra'", calls=("f",)) for i, t in enumerate(tests)]
    verdicts = first.run(programs)
    assert [(v.passed, v.reason) for v in verdicts] == [(True, "")] * 3


def test_only_plain_values_are_passed():
    for value in (object(), len, calls.Gone("x"), (i for i in ())):
        with pytest.raises(TypeError, match="plain values only"):
            calls.encode(value)

    class Liar(list):
        def __eq__(self, other):
            return True

        __hash__ = None

    back = calls.decode(json.loads(json.dumps(calls.encode([Liar([1]), {"a": range(2)}]))))
    assert (type(back[0]), back) == (list, [[1], {"a": [0, 1]}])
    nan = calls.decode(calls.encode(float("nan")))
    assert nan != nan


def test_a_program_with_tests_needs_the_names_they_call():
    with pytest.raises(UserError, match="name the functions"):
        Program("x", "", tests="assert f()")
    with pytest.raises(UserError, match="timeout is 0"):
        Program("x", "", timeout=0)
