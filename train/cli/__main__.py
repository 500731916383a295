"""The command `jaxmerge`: one grammar for every verb, `jaxmerge VERB ARGUMENT … key=value …`.

What this module imports needs the standard library alone, so that `--help` answers at once and a missing extra is
named instead of raised.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any

PROCESSES = f"{(__package__ or '').rpartition('.')[0]}.runtime.processes"
"""The module of several processes, if a verb has imported it."""
LOST = 141
"""Exit code: standard output is closed or full. (As shells have it for a process that SIGPIPE ended.)"""
DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
)
"""Errors of files that are the user's to mend."""


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; the exit code.

    0 done, 2 a mistake named on one line, 1 a check that failed, 75 stopped by a signal with all of it saved,
    76 another process of the run is lost; after 75 and 76 the same command goes on. 130 stopped by a signal, and
    nothing is kept. 141 nobody takes what it prints.
    """
    words = sys.argv[1:] if arguments is None else arguments
    given = sys.stdout
    sys.stdout = Output(given)
    try:
        code = answer(words)
        sys.stdout.flush()
        return code
    except OutputLost:
        with contextlib.suppress(OSError, ValueError):  # Python flushes once more at its end; then nothing is said
            os.dup2(os.open(os.devnull, os.O_WRONLY), given.fileno())
        return LOST
    finally:
        sys.stdout = given


class OutputLost(Exception):
    """Standard output is closed or full. No OSError: a writer of files around it would hold that for its own."""


class Output:
    """Standard output, whose errors are told from those of files."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputLost(str(error)) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputLost(str(error)) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def answer(words: list[str]) -> int:
    """Print help, or run a verb."""
    if not words or words[0] in ("-h", "--help", "help"):
        from .help import overview
        from .verbs import VERBS

        print(overview(VERBS), end="")
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("jaxmerge"))
        return 0
    from ..runtime.stop import STOPPED, interruptible

    verb, rest = words[0], words[1:]
    try:
        with interruptible():
            code = attempt(verb, rest)
    except BaseException as error:
        if processes := sys.modules.get(PROCESSES):
            processes.failed(error)
        raise
    if processes := sys.modules.get(PROCESSES):
        processes.end(code, with_all=code in (0, STOPPED))
    return code


def attempt(name: str, rest: list[str]) -> int:
    """Run a verb, its errors put into words."""
    from ..log import UserError
    from ..runtime.stop import INTERRUPTED, STOPPED, Stopped
    from .verbs import VERBS

    try:
        return run(name, rest)
    except UserError as error:
        print(f"jaxmerge {name}: {error}", file=sys.stderr)
        return 2
    except Stopped:
        print(f"jaxmerge {name}: stopped as asked; the same command goes on from here", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        if keeps(name, rest):
            print(f"jaxmerge {name}: stopped; the same command goes on from what is saved", file=sys.stderr)
            return STOPPED
        print(f"jaxmerge {name}: stopped; nothing is kept, the same command begins again", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in ("", "jaxmerge", "train"):
            raise
        from jaxmerge import install

        way = install.extra(VERBS[name].extra)
        print(f"jaxmerge {name}: the package {module} is not installed; {way}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK:
            raise
        print(f"jaxmerge {name}: {error.filename or 'a file'}: {os.strerror(error.errno)}", file=sys.stderr)
        return 2


def keeps(name: str, words: list[str]) -> bool:
    """Whether something of a verb that was stopped is kept, from which the same command goes on."""
    from .verbs import VERBS
    from .words import parse

    verb = VERBS[name]
    return verb.resumes(parse(verb, words)[0]) if callable(verb.resumes) else verb.resumes


def run(name: str, words: list[str]) -> int:
    """Call the function of a verb with its words told apart, or print its help."""
    from ..log import UserError
    from ..resolve import nearest
    from .verbs import VERBS
    from .words import HELP, parse

    if name not in VERBS:
        raise UserError(f"no verb {name!r}{nearest(name, list(VERBS))}")
    verb = VERBS[name]
    if any(word in HELP for word in words):
        from .help import explain

        print(explain(verb), end="")
        return 0
    arguments, assignments, flags = parse(verb, words)
    return verb.run(arguments, assignments, "--dry-run" in flags)


if __name__ == "__main__":
    sys.exit(main())
