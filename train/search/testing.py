"""Programs tested in the sandbox while the models go on decoding."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from ..log import UserError
from ..tasks.code import CodeProblem, as_program, called_names, extract_code
from ..tasks.sandbox import Program, Sandbox

TESTS = ("tests", "test_list", "test")
"""Keys of a question's line that may hold its tests; the first that is there."""


def read_problem(line: Mapping[str, Any], text: str, where: str) -> CodeProblem | None:
    """What a program must pass: `tests` or `test_list` (a text or a list of them), or HumanEval's `test`; None without.

    What tests use of the program is `entry_point`, or every name they use and do not bring along.
    """
    key = next((key for key in TESTS if line.get(key)), None)
    if key is None:
        return None
    given = line[key]
    source = "\n".join(map(str, given)) if isinstance(given, list) else given
    setup = line.get("test_setup_code") or line.get("setup") or ""
    if not isinstance(source, str) or not isinstance(setup, str):
        raise UserError(f"{where}: {key} is {given!r:.60}; a text or a list of texts is wanted")
    name = str(line.get("entry_point") or "")
    if name and "def check(" in source:
        source += f"\ncheck({name})\n"
    try:
        calls = (name,) if name else called_names(source, setup, str(line.get("code") or ""))
    except SyntaxError as error:
        raise UserError(f"{where}: {key} is no Python: {error}") from error
    if not calls:
        raise UserError(f"{where}: {key} uses nothing of the program; name its function in entry_point")
    stub = text if f"def {name}" in text and name else ""
    return CodeProblem(
        id=where, prompt=text, entry_point=calls[0], tests=source, stub=stub, setup=setup or stub, calls=calls,
    )  # fmt: skip


def compiles(code: str) -> bool:
    """Whether Python can read a program; it is not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its escapes, say: the program's affair
            compile(code, "program", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


class Examiner:
    """A sandbox behind a queue.

    Args:
      workers: programs run side by side.

    Raises:
      UserError: programs cannot be confined on this machine.
    """

    def __init__(self, workers: int = 2):
        self.box = Sandbox(workers)
        self.waiting: queue.Queue[tuple[Program, Future] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, problem: CodeProblem, text: str) -> Future:
        """The verdict on the fenced program of a text, later: 1 passed, 0 not; at once where there is none to run."""
        future: Future = Future()
        code, _ = extract_code(text, problem.entry_point)
        if code is None:
            future.set_result(0.0)
        else:
            self.waiting.put((as_program(problem, code), future))
        return future

    def _work(self) -> None:
        """Run what waits, as many at a time as wait, until told to end."""
        while (first := self.waiting.get()) is not None:
            batch = [first]
            while not self.waiting.empty() and len(batch) < 64:
                following = self.waiting.get()
                if following is None:
                    self.waiting.put(None)
                    break
                batch.append(following)
            try:
                verdicts = self.box.run([program for program, _ in batch])
                for (_, future), verdict in zip(batch, verdicts, strict=True):
                    future.set_result(float(verdict.passed))
            except Exception as error:  # told where the verdict is wanted
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.waiting.put(None)
        self.thread.join(timeout=30)
        self.box.close()
