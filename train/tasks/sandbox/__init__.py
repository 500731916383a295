"""Run Python programs that nobody trusts, and say which of them ran to their end.

    pool.py      Sandbox: workers, their programs and verdicts, as seen from outside (`__main__.py`: as a command)
    server.py    the fork server inside the walls: one warm Python, one fork a program
    confine.py   the walls: namespaces or bubblewrap around the server; Landlock, seccomp and limits around a program
    child.py     what a forked child does; calls.py: plain values between tests and program

**Three doors** (files, network, other processes) must be shut, or programs are refused. Around the server: bubblewrap,
else namespaces of our own, else nothing but the locks inside. Around each program: Landlock, seccomp, limits of memory,
processor, files. Whether they hold is tried at the start by a program that tries the doors; `Sandbox.isolation` says.

**Who gives the verdict.** Never the program: neither exit status nor anything it can write counts. A program that came
to its end makes the runner, in the same process, wait in a `read`; the server looks, through the kernel, at where that
process stands, and only the stack pointer of the runner's own frame counts: code called by the program stands deeper
on the stack. There is no secret that walking frames could find. What remains is a program that overwrites the
interpreter's memory: ctypes, tracing and made-up bytecode are refused, but ctypes' types lie in every child, which
shuts itself in through them, and can be dug out. Such a program forges its own verdict, and gets out of no wall.

**Tests apart** (`Program.tests`, `calls`). A program that holds its own tests can also come to its end by weakening
them: an object that equals everything, a patched `len`. So where the tests are known, they run in a second process,
which never runs a line of the program: it calls the functions over a pipe and gets plain values back, and its end is
the verdict. The interpreter that a program may have taken over is then the wrong one.
"""

from .pool import Limits, Program, Sandbox, Verdict

__all__ = ["Limits", "Program", "Sandbox", "Verdict"]
