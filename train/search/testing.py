"""Programs tested in the sandbox while the models go on decoding."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from ..log import UserError
from ..tasks.sandbox import Program, Sandbox
from .programs import called, compiles, fenced

SECONDS = 10.0
"""Of one program with its tests."""


@dataclasses.dataclass(frozen=True)
class Exam:
    """What a program must pass: trusted source that calls its functions `calls`, after `setup`."""

    source: str
    calls: tuple[str, ...]
    setup: str = ""


def read_tests(line: Mapping[str, Any], where: str) -> Exam | None:
    """The tests of a question's line: `tests` or `test_list` (a text or a list of them) or HumanEval's `test`.

    The functions they call are `entry_point`, or every name they call and do not define or import.
    """
    key = next((key for key in ("tests", "test_list", "test") if line.get(key)), None)
    if key is None:
        return None
    given = line[key]
    source = "\n".join(given) if isinstance(given, list) else given
    setup = line.get("test_setup_code") or line.get("setup") or ""
    if not isinstance(source, str) or not isinstance(setup, str):
        raise UserError(f"{where}: {key} is {given!r:.60}; a text or a list of texts is wanted")
    name = line.get("entry_point")
    try:
        calls = (str(name),) if name else called(source, setup)
    except SyntaxError as error:
        raise UserError(f"{where}: {key} is no Python: {error}") from error
    if name and "def check(" in source:
        source += f"\ncheck({name})\n"
    if not calls:
        raise UserError(f"{where}: {key} calls no function of the program; name it in entry_point")
    return Exam(source, calls, setup)


class Examiner:
    """A sandbox behind a queue.

    Args:
      workers: programs run side by side.

    Raises:
      UserError: programs cannot be confined on this machine.
    """

    def __init__(self, workers: int = 2, seconds: float = SECONDS):
        self.seconds = seconds
        self.box = Sandbox(workers)
        self.waiting: queue.Queue[tuple[Program, Future] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, id: str, text: str, tests: Exam) -> Future:
        """The verdict on the fenced programs of a text, later: 1 passed, 0 not; at once where there is none to run."""
        future: Future = Future()
        blocks, _ = fenced(text)
        source = "\n\n".join(blocks)
        if not source.strip() or not compiles(source):
            future.set_result(0.0)
            return future
        program = Program(id, source, self.seconds, tests.source, tests.setup, tests.calls)
        self.waiting.put((program, future))
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
        self.thread.join(timeout=2 * self.seconds)
        self.box.close()
