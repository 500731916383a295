"""Workers of the sandbox as seen from outside: started, fed with programs, replaced when they break."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import selectors
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ...log import UserError
from . import calls
from .start import Broken, children, command_of, environment, uid_of

WAYS = ("bubblewrap", "namespaces", "none")
LOCKS = ("seccomp", "position")
GRACE = 5.0  # seconds over a program's own limit after which its worker counts as broken
_SANDBOXES = itertools.count()


@dataclasses.dataclass(frozen=True)
class Program:
    """What is to be run.

    Attributes:
      id: comes back with the verdict.
      source: Python source nobody trusts; passes if it runs to its end.
      timeout: wall clock in seconds.
      tests: Python source that is trusted, run in another process, where each of `calls` is a function that calls
        the one of that name in `source`; the verdict is then that of the tests. None: `source` holds its own tests.
      setup: trusted source run before the tests, for helpers and imports.
      calls: names of the functions of `source` that the tests call.
    """

    id: str
    source: str
    timeout: float = 10.0
    tests: str | None = None
    setup: str = ""
    calls: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0 < self.timeout < 86400:
            raise UserError(f"sandbox: program {self.id}: timeout is {self.timeout!r}; give seconds, more than 0")
        if self.tests is not None and not self.calls:
            raise UserError(
                f"sandbox: program {self.id} has tests but no calls; name the functions that they call, or append the"
                " tests to the program"
            )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a program passed; if not, why. `seconds` is wall clock from fork to end."""

    id: str
    passed: bool
    reason: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
      memory_mb: address space.
      tmp_mb: the tmpfs at /tmp, which is empty for every program (none without namespaces).
      file_mb: the largest file.
    """

    memory_mb: int = 512
    tmp_mb: int = 8
    file_mb: int = 4


class Sandbox:
    """Run programs in `workers` confined processes.

    Args:
      workers: programs run side by side.
      limits: what a program may use.
      allow_unsafe: run programs although they are not kept from files, network or other processes.
      using: one of `WAYS`; None takes the first that shuts all doors.
      locks: further locks inside, of `LOCKS`; the tests leave some away.

    Raises:
      UserError: the programs cannot be confined here, and `allow_unsafe` was not given.

    Example:
      >>> with Sandbox() as box:
      ...     [v.passed for v in box.run([Program("a", "assert 1 + 1 == 2"), Program("b", "assert 1 + 1 == 3")])]
      [True, False]
    """

    def __init__(
        self,
        workers: int = 1,
        limits: Limits | None = None,
        *,
        allow_unsafe: bool = False,
        using: str | None = None,
        locks: Sequence[str] = LOCKS,
    ):
        if workers < 1:
            raise UserError(f"sandbox: workers is {workers}; give 1 or more")
        if using is not None and using not in WAYS:
            raise UserError(f"sandbox: using is {using!r}; choose one of {', '.join(WAYS)}")
        self.limits = limits or Limits()
        self.locks = tuple(locks)
        self.restarts = 0
        self._first = next(_SANDBOXES)  # two sandboxes of one process do not share a processor if they need not
        self._workers: list[_Worker] = []
        self.way, self.facts, self.notes = self._choose(using, allow_unsafe)
        try:
            while len(self._workers) < workers:
                self._workers.append(self._worker(len(self._workers)))
        except BaseException:
            self.close()
            raise

    def _worker(self, place: int = 0) -> _Worker:
        locks = [lock for lock in self.locks if self.way != "none" or lock == "position"]
        return _Worker(self.way, self.limits, locks, self._first + place)

    def _choose(self, using: str | None, allow_unsafe: bool) -> tuple[str, dict[str, Any], list[str]]:
        """Take the first way that shuts all doors, or the last resort if that is allowed."""
        notes = []
        for way in (using,) if using else WAYS:
            self.way = way
            try:
                worker = self._worker()
            except (Broken, OSError) as error:
                notes.append(f"{way}: {error}")
                continue
            leaks = open_doors(worker.facts)
            if worker.facts["uid"] == 0:
                worker.kill()
                notes.append(f"{way}: programs would be root's")
                continue
            if not leaks or (allow_unsafe and (using or way == "none")):
                self._workers.append(worker)
                return way, worker.facts, notes
            worker.kill()
            notes.append(f"{way}: programs would reach {', '.join(leaks)}")
        raise UserError(
            "sandbox: programs cannot be confined on this machine, and untrusted ones are refused ("
            + "; ".join(notes)
            + "). Install bubblewrap, or allow user namespaces; to run them with your own rights all the same, give"
            " --unsafe (allow_unsafe=True), but not as root"
        )

    @property
    def isolation(self) -> str:
        """What the programs are confined by, in one line."""
        leaks = open_doors(self.facts)
        proof = "position" if self.facts["position"] else "token"
        words = [
            " + ".join(self.facts["layers"]) or "NO ISOLATION",
            f"uid {self.facts['uid']}",
            f"verdict by {proof}",
            f"OPEN: {', '.join(leaks)}" if leaks else "no files, network, processes, signals (tried)",
        ]
        return "; ".join(words)

    def run(self, programs: Sequence[Program]) -> list[Verdict]:
        """Run programs, as many side by side as there are workers; verdicts in the order of `programs`."""
        if not self._workers:
            raise UserError("sandbox: it is closed; open another")
        verdicts: list[Verdict | None] = [None] * len(programs)
        waiting = collections.deque(range(len(programs)))
        busy: dict[_Worker, int] = {}
        idle = list(self._workers)
        with selectors.DefaultSelector() as selector:
            while waiting or busy:
                while waiting and idle:
                    worker, i = idle.pop(), waiting.popleft()
                    busy[worker] = i
                    selector.register(worker.answers, selectors.EVENT_READ, worker)
                    with contextlib.suppress(Broken):  # its pipe then ends, which is seen below
                        worker.send(programs[i])
                soonest = min(worker.deadline for worker in busy)
                ready = {key.data for key, _ in selector.select(max(0.0, soonest - time.monotonic()))}
                for worker in [w for w in busy if w in ready or w.deadline <= time.monotonic()]:
                    i = busy.pop(worker)
                    selector.unregister(worker.answers)
                    try:
                        verdicts[i] = worker.receive(programs[i])
                    except Broken as error:
                        verdicts[i] = Verdict(programs[i].id, False, f"the worker broke: {error}", worker.age())
                        worker = self._replace(worker)
                    idle.append(worker)
        return [v for v in verdicts if v is not None]

    def _replace(self, worker: _Worker) -> _Worker:
        worker.kill()
        self.restarts += 1
        place = self._workers.index(worker)
        fresh = self._workers[place] = self._worker(place)
        return fresh

    def close(self) -> None:
        """End the workers and whatever they still run."""
        while self._workers:
            self._workers.pop().kill()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_doors(facts: Mapping[str, Any]) -> list[str]:
    """Which doors programs found open; all of them if the attempt told nothing.

    In a process namespace of its own (`bubblewrap`, `namespaces`) new processes and signals stay inside.
    """
    doors = facts["doors"]
    inside = {"bubblewrap", "namespaces"} & set(facts["layers"])
    wanted = ("files", "network") if inside else ("files", "network", "processes", "signals")
    return [name for name in wanted if not doors.get(name)]


class _Worker:
    """One fork server and its pipes."""

    def __init__(self, way: str, limits: Limits, locks: Sequence[str], place: int):
        self.folder: str | None = tempfile.mkdtemp(prefix="jaxmerge-sandbox-")
        self.process: subprocess.Popen | None = None
        self.inside: list[int] = []
        self.tests = -1
        self.deadline = self.started = time.monotonic()
        null = os.open(os.devnull, os.O_RDWR)
        theirs, self.tests = os.pipe()
        try:
            config = {"using": way, "base": self.folder, "null": null, "locks": list(locks), "place": place}
            config["tests"] = theirs
            config |= dataclasses.asdict(limits)
            command = command_of(way, config)
            with tempfile.TemporaryFile() as errors:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, pass_fds=(null, theirs),
                    start_new_session=True, cwd="/", env=environment(),
                )  # fmt: skip
                assert self.process.stdin is not None
                assert self.process.stdout is not None
                self.requests, self.answers = self.process.stdin, self.process.stdout
                self.deadline = time.monotonic() + 30
                try:
                    self.facts = self._read()
                except Broken as error:
                    errors.seek(0)
                    said = errors.read(4000).decode(errors="replace").strip().splitlines()
                    raise Broken(said[-1] if said else str(error)) from None
            if "error" in self.facts:
                raise Broken(self.facts["error"])
            self.inside = children(self.process.pid)
            self.facts["uid"] = uid_of(self.process.pid)
            self._remove_folder()  # the new root was built there, and is a root of its own by now
        except BaseException:
            self.kill()
            raise
        finally:
            os.close(null)
            os.close(theirs)

    def send(self, program: Program) -> None:
        """Hand over one program."""
        self.started = time.monotonic()
        self.deadline = self.started + program.timeout + GRACE
        job = {"source": program.source, "timeout": program.timeout, "apart": program.tests is not None}
        try:
            calls.send(self.requests.fileno(), job)
            if program.tests is not None:  # by a pipe of their own: what the server holds, its programs can look at
                calls.send(self.tests, {"tests": program.tests, "setup": program.setup, "calls": program.calls})
        except (calls.Gone, ValueError) as error:
            raise Broken("it has ended") from error

    def receive(self, program: Program) -> Verdict:
        """Take its verdict."""
        return Verdict(id=program.id, **self._read())

    def age(self) -> float:
        return round(time.monotonic() - self.started, 6)

    def _read(self) -> dict[str, Any]:
        (length,) = struct.unpack("<I", self._exactly(4))
        return json.loads(self._exactly(length))

    def _exactly(self, count: int) -> bytes:
        parts = b""
        descriptor = self.answers.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while len(parts) < count:
                if not selector.select(max(0.0, self.deadline - time.monotonic())):
                    raise Broken("it did not answer in time")
                part = os.read(descriptor, count - len(parts))
                if not part:
                    raise Broken("it has ended")
                parts += part
        return parts

    def kill(self) -> None:
        """End it; its programs die with it."""
        while self.inside:
            server = self.inside.pop()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(server, signal.SIGKILL)
            os.close(server)
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self.process = None
        if self.tests >= 0:
            os.close(self.tests)
            self.tests = -1
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None
