"""The command in processes of their own that need not import everything again.

A process forked from one that has imported jax, Flax and the stack, and begun no backend, is in every other way what
`python -m train.cli` is: its own memory, environment, folder, streams, signals and exit code. It saves the 3.5 s of
processor time that the imports take. All forks of a test process have one seed of `hash`; what must not depend on
it is compared with a run of `python -m train.cli`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from helpers import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["helpers.imported"])


def begin(program, words: Sequence[str], environment: dict[str, str], cwd: str, streams: tuple[str, ...], die) -> None:
    """In the fork: give it what a new process has of its own, then be the program."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in enumerate((os.devnull, *streams)):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(i, "w", buffering=1, closefd=False) for i in (1, 2))
    sys.argv = ["jaxmerge", *words]

    import jax

    jax.config.update("jax_compilation_cache_dir", environment["JAX_COMPILATION_CACHE_DIR"])
    try:
        code = program(list(words), die)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves without them
    sys.exit(code)


def command(words: list[str], die: tuple[str, int] | None) -> int:
    """`jaxmerge WORDS`, which `helpers.killer` ends at the point and call `die`."""
    if die:
        from helpers.killer import arm

        arm(*die)
    from train.cli.__main__ import main

    return main(words)


class Fork:
    """A command under way, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, words, environment, cwd, streams: tuple[Path, Path], die=None, program=command):
        paths = tuple(map(str, streams))
        given = (program, list(map(str, words)), dict(environment), str(cwd), paths, die)
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [path])])
        try:  # the server, which the first fork starts, finds what it imports
            self.process = CONTEXT.Process(target=begin, args=given, daemon=False)
            self.process.start()
        finally:
            os.environ.pop("PYTHONPATH")
            os.environ.update({"PYTHONPATH": path} if path else {})

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, seconds: float) -> int:
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("jaxmerge", seconds)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    words, environment, cwd=ROOT, die=None, program=command, seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its exit code and what it said."""
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "out"), Path(folder, "err")
        for stream in streams:
            stream.touch()
        fork = Fork(words, environment, cwd, streams, die, program)
        try:
            code = fork.wait(seconds)
        finally:
            fork.kill()
        return subprocess.CompletedProcess(list(words), code, *(stream.read_text() for stream in streams))
