"""The fork server: one warm Python inside the walls, one fork a program (two with separate tests), one verdict each.

It runs no untrusted code itself; its programs cannot trace it or write to its pipes. Started by `pool.py`, it reads
jobs from its standard input and writes verdicts to its standard output, and ends when its input does. Separate tests
come by a pipe of their own, which it never reads: the process that runs them does, so that no fork of the server, and
no program, has them in its memory.
"""

from __future__ import annotations

import functools
import importlib
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from . import calls, child, probe

# Others are read from the standard library when asked for: each module here makes every fork a little slower.
WARM = (
    *("abc", "bisect", "cmath", "collections", "collections.abc", "contextlib", "copy", "enum", "functools", "heapq"),
    *("io", "itertools", "json", "math", "operator", "re", "string", "struct", "time", "types", "typing", "zlib"),
    *("encodings.ascii", "encodings.latin_1"),
)


class Running:
    """A forked child: its pipes, and the stack pointer it had before the program."""

    def __init__(self, pid: int, report: int, gate: int, *, watched: bool):
        self.pid, self.report, self.gate, self.watched = pid, report, gate, watched
        self.base: int | None = None


class Server:
    """Judges programs one after another.

    Attributes:
      facts: what the client is told at the start: layers, doors, and whether verdicts are proved by position.
    """

    def __init__(self, config: dict[str, Any]):
        from . import confine, seccomp  # not for the module: frames of it are above every program's

        for name in WARM:
            importlib.import_module(name)
        self.null, self.jobs = int(config["null"]), int(config["tests"])
        self.tmp: str | None = None
        layers = [config["using"]]
        self.proc = -1
        match config["using"]:
            case "namespaces":
                self.proc = confine.enter_namespaces(config["base"], config["tmp_mb"], (0, 1, self.jobs))
                self.tmp = "/tmp"
            case "bubblewrap":
                self.proc = _inside_bubblewrap(confine, config["tmp_mb"])
                self.tmp = "/tmp"
            case _:
                self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                if os.getuid() == 0:
                    confine.require_open_library()
                    confine.become_nobody()
                confine.drop_capabilities()
                layers.clear()
        confine.harden_server()
        filtered = "seccomp" in config["locks"]
        self.shut_in: Callable[..., None] | None
        self.shut_in, inner = confine.limiter(config["memory_mb"], config["file_mb"], filtered=filtered)
        os.dup2(self.null, 2)
        os.dup2(self.null, 0)
        os.dup2(self.null, 1)
        self.offsets: set[int] | None = None
        self.reader = getattr(seccomp.machine(), "read", None)
        confine.hide(self.shut_in)
        doors = self._doors()
        if "position" in config["locks"]:
            self._calibrate()
        self.facts = {
            "layers": layers + inner,
            "doors": doors,
            "position": self.offsets is not None,
            "uid": os.getuid(),
        }

    # --- one program ---------------------------------------------------------------------------------------

    def judge(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run one job; {passed, reason, seconds}."""
        started = time.monotonic()
        seconds = float(job["timeout"])
        token = b"" if job["apart"] else os.urandom(16)
        children: list[Running] = []
        shared: list[int] = []
        try:
            if not job["apart"]:
                children.append(self._start(functools.partial(child.whole, job["source"]), seconds, token, []))
                passed, reason = self._wait(children, started + seconds, token)
            else:
                there, asked = os.pipe()
                answered, back = os.pipe()
                shared += [there, asked, answered, back]
                make = functools.partial(child.tests, self.jobs, asked, answered)
                children.append(self._start(make, seconds, b"", [self.jobs, asked, answered], watched=False))
                make = functools.partial(child.candidate, job["source"], there, back)
                children.append(self._start(make, seconds, b"", [there, back], watched=False))
                while shared:
                    os.close(shared.pop())
                passed, reason = self._wait(children, started + seconds, token)
        finally:
            for descriptor in shared:
                os.close(descriptor)
            self._clear(children)
        if not passed and reason == "timed out":
            reason = f"timed out after {seconds:g} s"
        return {"passed": passed, "reason": "" if passed else reason, "seconds": round(time.monotonic() - started, 6)}

    def _start(
        self, make: Callable[[], Callable[[Any], None]], seconds: float, token: bytes, kept: list[int], *,
        watched: bool = True,
    ) -> Running:  # fmt: skip
        """Fork a child and wait until it stands before the program, shut in.

        Args:
          make, watched: of `child.main`.
          seconds: wall clock given to the program, for the limit on processor time.
          token: proof of the end where the kernel does not tell where a child stands.
          kept: descriptors the child keeps.
        """
        report, theirs = os.pipe()
        gate, ours = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _close_all_but({0, 1, 2, theirs, gate, *kept})
                child.main(gate, theirs, self._take(seconds, watched), token, make, watched=watched)
            finally:
                while True:
                    os._exit(70)
        os.close(theirs)
        os.close(gate)
        running = Running(pid, report, ours, watched=watched)
        said = os.read(report, 2000)
        if said != child.READY:
            self._clear([running])
            raise RuntimeError(f"a child could not be shut in: {said[1:].decode(errors='replace') or 'it died'}")
        if watched and self.proc >= 0 and self.offsets is not None:
            while (seen := self._standing(pid)) is None:
                time.sleep(0)
            running.base = seen
        return running

    def _take(self, seconds: float, seen: bool) -> Callable[[], None]:
        """In a child: the way to shut itself in, which nothing refers to any more afterwards."""
        shut_in, self.shut_in = self.shut_in, None
        assert shut_in is not None, "a child shuts itself in once"
        return functools.partial(shut_in, seconds, seen)

    def _wait(self, children: list[Running], deadline: float, token: bytes) -> tuple[bool, str]:
        """Open the gates and wait for the first child (the program, or its tests) to end, or the deadline."""
        judged, *others = children
        reason = ""
        poll = select.poll()
        for running in children:
            poll.register(running.report, select.POLLIN)
            os.write(running.gate, b"g")
        while True:
            left = deadline - time.monotonic()
            ready = poll.poll(max(0.0, left) * 1000) if left > 0 else []
            if not ready:
                return False, "timed out"
            for descriptor, _ in ready:
                said = os.read(descriptor, 2000)
                if descriptor != judged.report:
                    poll.unregister(descriptor)
                    reason = _said(others[0].pid, said)
                    continue
                passed, found = False, ""
                if said[:1] == child.END:
                    passed, found = self._verify(judged, said, token, deadline)
                else:
                    found = _said(judged.pid, said)
                for running in others:  # tests fail where the untrusted part ended, whatever they made of it
                    if not reason and select.select([running.report], [], [], 0)[0]:
                        reason = _said(running.pid, os.read(running.report, 2000))
                return passed and not reason, reason or found

    def _verify(self, running: Running, said: bytes, token: bytes, deadline: float) -> tuple[bool, str]:
        """Whether a child that says it reached its end stands where only the end leads."""
        if not running.watched:  # tests, which nobody forges
            return said == child.END, "" if said == child.END else "left threads running"
        if self.offsets is None:
            if said[:17] != child.END + token:
                return False, "forged its verdict"
            return (True, "") if len(said) == 17 else (False, "left threads running")
        said_more = select.poll()
        said_more.register(running.report, select.POLLIN)
        try:
            while (seen := self._standing(running.pid)) is None:
                if time.monotonic() > deadline or said_more.poll(0):  # it said so and went on, or ended
                    return False, "forged its verdict"
                time.sleep(0.0001)
        except OSError:  # it ended, and nobody may look at what is left of it
            return False, "forged its verdict"
        if running.base is None or running.base - seen not in self.offsets:
            return False, "forged its verdict"
        for _ in range(50):
            if self._threads(running.pid) == 1:
                return True, ""
            time.sleep(0.002)
        return False, "left threads running"

    # --- where a child stands ------------------------------------------------------------------------------

    def _standing(self, pid: int) -> int | None:
        """The stack pointer of a process that waits in `read`, or None while it does anything else."""
        words = self._of(pid, "syscall").split()
        return int(words[-2], 16) if len(words) > 3 and words[0] == str(self.reader) else None

    def _threads(self, pid: int) -> int:
        return int(self._of(pid, "stat").rpartition(")")[2].split()[17])

    def _of(self, pid: int, name: str) -> str:
        descriptor = os.open(f"{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.proc)
        try:
            return os.read(descriptor, 4096).decode()
        finally:
            os.close(descriptor)

    def _calibrate(self) -> None:
        """Learn how far the end stands from the start, and see that no other place looks the same."""
        try:
            if self.reader is None or self.proc < 0:
                return
            self.offsets = set()
            ends = {offset for source in probe.HONEST if (offset := self._offset(source)) is not None}
            within = {offset for source in probe.WITHIN if (offset := self._offset(source)) is not None}
            # a program's own frames must lie well below: one C frame of `exec` is several hundred bytes
            self.offsets = ends if min(within) - max(ends) > 200 else None
        except (OSError, ValueError, IndexError):
            self.offsets = None  # the kernel does not tell; the hello says that a token is the proof then

    def _offset(self, source: str) -> int | None:
        """How much deeper than at its start a program stands that says END; None if it cannot (no threads here)."""
        running = self._start(functools.partial(child.whole, source), 5.0, b"", [])
        try:
            os.write(running.gate, b"g")
            said = os.read(running.report, 2000) if select.select([running.report], [], [], 5.0)[0] else b""
            deadline = time.monotonic() + 5
            while said[:1] == child.END and running.base is not None and time.monotonic() < deadline:
                seen = self._standing(running.pid)
                if seen is not None:
                    return running.base - seen
            return None
        finally:
            self._clear([running])

    def _doors(self) -> dict[str, str]:
        """Have a child try the doors; the error a door was shut with, or "" for an open one."""
        ours, theirs = os.pipe()
        make = functools.partial(child.whole, probe.DOORS.format(descriptor=theirs))
        running = self._start(make, 10.0, b"", [theirs])
        os.close(theirs)
        try:
            os.write(running.gate, b"g")
            return calls.receive(ours) if select.select([ours], [], [], 10.0)[0] else {}
        except calls.Gone:
            return {}
        finally:
            os.close(ours)
            self._clear([running])

    # --- nothing is left behind ----------------------------------------------------------------------------

    def _clear(self, children: list[Running]) -> None:
        for running in children:
            os.kill(running.pid, signal.SIGKILL)
            os.close(running.report)
            os.close(running.gate)
        for running in children:
            os.waitpid(running.pid, 0)
        if os.getpid() == 1:
            _kill_the_rest()
        if self.tmp and os.listdir(self.tmp):
            _empty(self.tmp)


def _inside_bubblewrap(confine: Any, tmp_mb: int) -> int:
    try:
        proc = confine.hide_proc("/proc")
        confine.unmount("/sandbox")  # the code of this server, which is imported by now
        confine.mount_tmp("/tmp", tmp_mb)  # bubblewrap's own has no limit on the number of files
    except OSError:  # bubblewrap kept the right to mount to itself: its mounts stay as they are
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if os.getuid() == 0:
        confine.become_nobody()
    confine.drop_capabilities()
    os.chdir("/tmp")
    return proc


def _kill_the_rest() -> None:
    """As process 1: end whatever else lives in this namespace."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        return
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _empty(folder: str) -> None:
    """Remove everything in a folder, whatever its permissions and however deep; raise if something stays."""
    os.chdir(folder)
    above: list[str] = []
    while True:
        deeper = ""
        with os.scandir(".") as entries:
            for entry in list(entries):
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.name, 0o700)
                    deeper = entry.name
                else:
                    os.unlink(entry.name)
        if deeper:
            os.chdir(deeper)
            above.append(deeper)
        elif above:
            os.chdir("..")
            os.rmdir(above.pop())
        else:
            return


def _said(pid: int, said: bytes) -> str:
    """The reason in a report, or how a process ended that closed it: by a signal, by itself, or not at all."""
    if said[:1] == child.FAILED:
        return _printable(said[1:])
    if said:
        return "" if said == child.UNASKED else "wrote to its report"
    for _ in range(100):
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            if ended.si_code == os.CLD_EXITED:
                return f"left by itself with status {ended.si_status}"
            return f"killed by {signal.Signals(ended.si_status).name}"
        time.sleep(0.001)
    return "closed its report"


def _printable(reason: bytes) -> str:
    text = reason.decode("ascii", "replace")
    return "".join(c if c.isprintable() else " " for c in text).strip()[:300] or "failed"


def _close_all_but(kept: set[int]) -> None:
    low = 0
    for descriptor in [*sorted(d for d in kept if d >= 0), 64]:
        if low < descriptor:  # closerange(0, 0) would close everything
            os.closerange(low, descriptor)
        low = descriptor + 1


def serve(config: dict[str, Any]) -> None:
    """Judge jobs until the input ends. Anything unexpected ends the worker: the client starts another."""
    processors = sorted(os.sched_getaffinity(0))
    # one processor for a server and its programs, which take turns: waking another one up costs more than they do
    os.sched_setaffinity(0, {processors[config["place"] % len(processors)]})
    requests, answers = os.dup(0), os.dup(1)
    try:
        server = Server(config)
    except Exception as error:
        calls.send(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    calls.send(answers, server.facts)
    import gc

    gc.collect()
    gc.freeze()  # forked children then copy fewer pages
    while True:
        try:
            job = calls.receive(requests)
        except calls.Gone:
            return
        calls.send(answers, server.judge(job))
