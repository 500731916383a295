"""What a forked child does: shut itself in, run its part of a program, and stand still where the server can see it.

A program that holds its own tests reports its end by standing in `read(gate)`: the server compares the stack pointer,
which the kernel tells it, with the one this same frame had before the program. Whatever Python code the program calls,
in whatever frame, stack below `exec` is in use, and the pointer is another.
"""

from __future__ import annotations

import _thread
import builtins
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from . import calls

READY, END, FAILED, BROKEN, UNASKED = b"R", b"E", b"F", b"X", b"Q"

# The plain ways for a program with its own tests to move its line of execution, look into other frames, or write to
# memory. There are others: a native module under another name, made-up bytecode (which the standard library makes too).
REFUSED_EVENTS = frozenset(
    {
        *("sys.settrace", "sys.setprofile", "sys._current_frames", "sys._current_exceptions"),
        *("gc.get_objects", "gc.get_referrers", "gc.get_referents"),
        *("sys.monitoring.register_callback", "cpython.PyInterpreterState_New"),
    }
)


def main(
    gate: int,
    report: int,
    shut_in: Callable[[], None],
    token: bytes,
    make: Callable[[], Callable[[Any], None]],
    *,
    watched: bool,
) -> None:
    """Run one part of a program. Never returns.

    Args:
      gate: descriptor whose read is where this process waits, before the program and after it.
      report: descriptor for READY, END, or FAILED with a reason.
      shut_in: of `confine.limiter`, with its arguments.
      token: what END is followed by; proof only where the server cannot see the stack pointer.
      make: gives what to do; that is then given a way to fail with a reason.
      watched: whether the program's own end is the verdict, so that the plain ways to forge it are refused.
    """  # fmt: skip
    # Everything needed at the end is a local variable: the program may change any module, builtins included.
    read, write, leave, call, threads = os.read, os.write, os._exit, operator.call, _thread._count

    def fail(reason: str, _kind: bytes = FAILED, _str: Any = str, _write: Any = write, _leave: Any = leave) -> None:
        while True:  # whatever has become of `_leave`, this does not return
            try:
                _write(report, _kind + _str.encode(reason, "ascii", "backslashreplace")[:1000])
            finally:
                _leave(1)

    work: Any = None
    try:
        work = make()
        del make
        shut_in()
        del shut_in  # nothing else leads to ctypes
        if watched:
            sys.addaudithook(_hook(fail))
        write(report, READY)
    except BaseException as error:
        fail(f"{type(error).__name__}: {error}", BROKEN)
    read(gate, 1)
    # Called from C: all below stands deeper on the stack than this frame. And nothing here catches what it raises,
    # nor does `call` (as `map` would a StopIteration): only an ordinary return, after an ordinary end, goes on.
    call(_guarded, work, fail)
    write(report, END + token + (b"" if threads() == 0 else b"+"))
    read(gate, 1)
    fail("went on after its end")


def _guarded(work: Any, fail: Any, _every: Any = BaseException, _describe: Any = None, _leave: Any = os._exit) -> None:
    try:
        work(fail)
    except _every as error:
        reason = "failed"
        try:
            reason = (_describe or _DESCRIBE)(error)
        finally:
            while True:
                fail(reason)
                _leave(1)


def _description(
    error: BaseException, _type: Any = type, _str: Any = str, _name: Any = type.__dict__["__name__"].__get__
) -> str:
    """`Type: message`, with nothing of the program's called but its `__str__`."""
    name = _name(_type(error))
    message = _str(error)
    return name + (": " + message if message else "")


_DESCRIBE = _description


def _hook(fail: Callable[[str], None]) -> Callable[[str, tuple], None]:
    def refuse(event: str, args: tuple, _events: Any = REFUSED_EVENTS, _fail: Any = fail) -> None:
        del args
        if event in _events or event[:7] == "ctypes.":
            _fail("refused: " + event)

    return refuse


def whole(source: str) -> Callable[[Any], None]:
    """The whole program at once, as `__main__`."""

    def work(fail: Any) -> None:
        del fail
        exec(compile(source, "<program>", "exec", dont_inherit=True), _namespace())

    return work


def candidate(source: str, requests: int, answers: int) -> Callable[[Any], None]:
    """The untrusted part: run it, then answer calls until there are no more."""

    def work(fail: Any) -> None:
        namespace = _namespace()
        exec(compile(source, "<program>", "exec", dont_inherit=True), namespace)
        calls.answer(namespace, requests, answers)
        fail("", UNASKED)

    return work


def tests(jobs: int, requests: int, answers: int) -> Callable[[Any], None]:
    """The trusted part: tests, which call the functions of the other process.

    They are read here, from `jobs`: the server that the program is forked from never holds them.
    """
    job = calls.receive(jobs)
    os.close(jobs)

    def work(fail: Any) -> None:
        namespace = _namespace()
        functions = calls.Link(requests, answers, fail).names(job["calls"])
        namespace.update(functions)
        exec(compile(job["setup"], "<setup>", "exec", dont_inherit=True), namespace)
        namespace.update(functions)  # the setup may hold the stub of a function that the tests call
        exec(compile(job["tests"], "<tests>", "exec", dont_inherit=True), namespace)

    return work


def _namespace() -> dict[str, Any]:
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    return module.__dict__
