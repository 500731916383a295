"""Run Python programs that nobody trusts, and say which of them ran to their end.

    pool.py      Sandbox: workers, their programs and verdicts, as seen from outside (`__main__.py`: as a command,
                 start.py: how one starts)
    server.py    the fork server inside the walls: one warm Python, one fork a program
    confine.py   the walls: namespaces or bubblewrap around the server; seccomp and limits around a program
    child.py     what a forked child does; calls.py: values and objects between tests and program

**The walls** are bubblewrap or namespaces of our own, around the server: no file but Python's library (under
bubblewrap, shared libraries too), no network, no other process. One of the two is required; whether it holds is found
out at the start by a program that tries the doors, and `Sandbox.isolation` says what it found. Inside, seccomp and
limits keep a program from using up the machine and from most of the kernel. No program has root's uid, as seen from
outside the walls.

**Tests apart** (`Program.tests`, `calls`). The tests run in a second process, which never runs a line of the program:
it calls the functions over a pipe and gets plain values back, or numbers that stand for objects. Its end is the
verdict, and a program can neither see the tests (no process it was forked from has held them) nor reach that process.

**A program that holds its own tests** can weaken them: an object that equals everything, a patched `len`. It can also
try to forge its end. The end is therefore no exit status and nothing it can write: the runner, in the same process,
waits in a `read`; the server looks, through the kernel, at where that process stands, and only the stack pointer of the
runner's own frame counts. Code called by the program stands deeper on the stack. A program that writes to the memory of
its own interpreter (ctypes, a native module, made-up bytecode) forges its verdict all the same, and gets out of no
wall. So nothing is to be trained on verdicts of such programs; the tasks of this package run all tests apart.
"""

from .pool import Limits, Program, Sandbox, Verdict

__all__ = ["Limits", "Program", "Sandbox", "Verdict"]
