r"""Milliseconds a program in the sandbox: python benchmarks/sandbox.py [key=value …]

  programs=200     of each kind a batch
  repeats=5        in turns, medians of
  workers=1,2      programs side by side
  using=           bubblewrap, namespaces or none; the first that shuts all doors if left out
  peer=20          programs of the peer, `subprocess.run([python, "-c", …])`, one process a program and no walls

Kinds: `file`, a program with its tests in it; `apart`, tests in a process of their own (two forks); `solution`, a
canonical solution of HumanEval each with its tests apart, where its package is installed.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from train.log import UserError
from train.tasks.code import as_program, read_humaneval
from train.tasks.sandbox import Program, Sandbox

OPTIONS = {"programs": "200", "repeats": "5", "workers": "1,2", "using": "", "peer": "20"}
SOURCE = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(2) == 4\nassert double(-1) == -2\n"


def kinds(count: int) -> dict[str, list[Program]]:
    """The programs of each kind."""
    found = {
        "file": [Program(str(i), SOURCE + TESTS) for i in range(count)],
        "apart": [Program(str(i), SOURCE, tests=TESTS, calls=("double",)) for i in range(count)],
    }
    try:
        found["solution"] = [as_program(p, p.solution or "") for p in read_humaneval()]
    except UserError as error:
        print(f"without HumanEval: {error}")
    return found


def timed(run: Callable[[], object], count: int) -> float:
    """Milliseconds a program."""
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) / count * 1e3


def alone(programs: Sequence[Program]) -> None:
    """The peer: a Python of its own for each."""
    for program in programs:
        subprocess.run([sys.executable, "-c", program.source], check=True, capture_output=True)


def passing(box: Sandbox, programs: Sequence[Program]) -> None:
    failed = [v for v in box.run(programs) if not v.passed]
    assert not failed, failed[:3]


def main(arguments: list[str]) -> None:
    given = {name: value for name, _, value in (argument.partition("=") for argument in arguments)}
    if unknown := set(given) - set(OPTIONS):
        sys.exit(f"no option {', '.join(sorted(unknown))}; options: {', '.join(OPTIONS)}")
    options = OPTIONS | given
    batches = kinds(int(options["programs"]))
    boxes = {n: Sandbox(n, using=options["using"] or None) for n in map(int, options["workers"].split(","))}
    print(f"{next(iter(boxes.values())).isolation}; {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(int(options["repeats"])):
        for workers, box in boxes.items():
            for kind, programs in batches.items():
                took = timed(lambda box=box, programs=programs: passing(box, programs), len(programs))
                found.setdefault((kind, f"{workers} worker{'s' * (workers > 1)}"), []).append(took)
        peers = batches["file"][: int(options["peer"])]
        if peers:
            found.setdefault(("file", "subprocess.run"), []).append(timed(lambda p=peers: alone(p), len(peers)))
    for box in boxes.values():
        box.close()
    for (kind, how), times in found.items():
        print(
            f"{kind:10s} {how:16s} {statistics.median(times):6.2f} ms a program ({min(times):.2f} … {max(times):.2f})"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
