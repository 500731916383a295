"""The command `jaxmerge`: one grammar for every verb, `jaxmerge VERB ARGUMENT … key=value …`.

This module imports the standard library alone, so that `--help` answers at once and a missing extra is named
instead of raised.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable

PROCESSES = f"{(__package__ or '').rpartition('.')[0]}.runtime.processes"
"""The module of several processes, if a verb has imported it."""
USAGE = """\
jaxmerge: self-improve, extrapolate and merge language models on a JAX mesh

  jaxmerge improve  CONFIG [key=value …]       run or resume a self-improvement run (out=DIR, --dry-run)
  jaxmerge merge    RECIPE OUT [key=value …]   merge checkpoints on disk by a recipe (mergekit's YAML is read)
  jaxmerge inspect  BASE MODELS [key=value …]  what changed between checkpoints, per layer (picture=, json=)
  jaxmerge extract-lora BASE TUNED OUT rank=N  the change between two checkpoints as a LoRA adapter
  jaxmerge sft      CONFIG | MODEL DATA OUT    fine-tune or pretrain a model on examples
  jaxmerge sample   MODEL PROMPTS OUT [k=v …]  generate: a line of JSON a prompt in, a line out
  jaxmerge evaluate MODEL CONFIG|FILE [k=v …]  accuracy of a model on the questions of a config or a file
  jaxmerge harness  MODEL TASKS [key=value …]  tasks of EleutherAI's lm-eval, in process
  jaxmerge export   RUN OUT [method= round=]   write a run's model as a Hugging Face folder
  jaxmerge report   RUN                        write report.html of a run again
  jaxmerge search   CONFIG | MODEL QUESTIONS OUT  look for solutions step by step; trees, examples, a report
  jaxmerge results  [key=value …]              docs/results.md from the rows of the experiments
  jaxmerge analyse  RUN [key=value …]          what training did to a run's layers, weights and samples
  jaxmerge doctor                              devices, versions, extras: what works here and what is missing

MODEL is a Hugging Face folder, a GGUF file, package:NAME/FILE.gguf, a checkpoint of a run, or a hub name.
`jaxmerge VERB --help` lists the keys of a verb; docs/config.md those of configs.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; the exit code.

    0 done, 2 a mistake named on one line, 1 a check that failed, 75 stopped by a signal with all of it saved,
    76 another process of the run is lost; after 75 and 76 the same command goes on.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
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


def attempt(verb: str, rest: list[str]) -> int:
    """Run a verb, its errors put into words."""
    from ..log import UserError
    from ..runtime.stop import STOPPED, Stopped

    try:
        from .verbs import VERBS

        if verb not in VERBS:
            from ..resolve import nearest

            raise UserError(f"no verb {verb!r}{nearest(verb, list(VERBS))}")
        return run(VERBS[verb], verb, rest)
    except UserError as error:
        print(f"jaxmerge {verb}: {error}", file=sys.stderr)
        return 2
    except Stopped:
        print(f"jaxmerge {verb}: stopped as asked; the same command goes on from here", file=sys.stderr)
        return STOPPED
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in ("", "jaxmerge", "train"):
            raise
        extra = "files" if verb in ("merge", "inspect", "extract-lora") else "train"
        print(
            f"jaxmerge {verb}: the package {module} is not installed; pip install 'jaxmerge[{extra}]'", file=sys.stderr
        )
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EPERM):
            raise
        print(f"jaxmerge {verb}: {error.filename or 'a file'}: {os.strerror(error.errno)}", file=sys.stderr)
        return 2


def run(function: Callable[..., int | None], verb: str, words: list[str]) -> int:
    """Split the words after a verb into positionals, assignments and flags, and call its function."""
    from ..log import UserError

    flags = [w for w in words if w.startswith("--")]
    assignments = [w for w in words if re.match(r"[\w.-]+=", w) and not w.startswith("--")]
    positionals = [w for w in words if w not in flags and w not in assignments]
    doc = (function.__doc__ or "").strip()
    if "--help" in flags or "-h" in positionals:
        print(f"jaxmerge {doc}")
        return 0
    allowed = {"--dry-run"} if "--dry-run" in doc else set()
    for flag in flags:
        if flag not in allowed:
            raise UserError(f"no flag {flag}; options are written key=value" + (" (or --dry-run)" if allowed else ""))
    # A verb may be given in several ways: `sft CONFIG | MODEL DATA OUT [key=value …]`.
    ways = [[w for w in way.split() if w.isupper()] for way in doc.splitlines()[0].split(" | ")]
    if len(positionals) not in map(len, ways):
        wanted = " or ".join(" ".join(way) or "no arguments" for way in ways)
        raise UserError(f"wanted {wanted}, found {' '.join(positionals) or 'none'}")
    return function(positionals, assignments, "--dry-run" in flags) or 0


if __name__ == "__main__":
    sys.exit(main())
