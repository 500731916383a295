"""The command `jaxmerge`: one grammar for every verb, `jaxmerge VERB ARGUMENT … key=value …`.

What this module imports needs the standard library alone, so that `--help` answers at once and a missing extra is
named instead of raised.
"""

from __future__ import annotations

import errno
import os
import sys

PROCESSES = f"{(__package__ or '').rpartition('.')[0]}.runtime.processes"
"""The module of several processes, if a verb has imported it."""


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; the exit code.

    0 done, 2 a mistake named on one line, 1 a check that failed, 75 stopped by a signal with all of it saved,
    76 another process of the run is lost; after 75 and 76 the same command goes on.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        from .help import overview
        from .verbs import VERBS

        print(overview(VERBS), end="")
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("jaxmerge"))
        return 0
    from ..runtime.stop import STOPPED

    verb, rest = words[0], words[1:]
    try:
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
    from ..runtime.stop import STOPPED, Stopped
    from .verbs import VERBS

    try:
        return run(name, rest)
    except UserError as error:
        print(f"jaxmerge {name}: {error}", file=sys.stderr)
        return 2
    except Stopped:
        print(f"jaxmerge {name}: stopped as asked; the same command goes on from here", file=sys.stderr)
        return STOPPED
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in ("", "jaxmerge", "train"):
            raise
        way = f"pip install 'jaxmerge[{VERBS[name].extra}]'"
        print(f"jaxmerge {name}: the package {module} is not installed; {way}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EPERM):
            raise
        print(f"jaxmerge {name}: {error.filename or 'a file'}: {os.strerror(error.errno)}", file=sys.stderr)
        return 2


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
