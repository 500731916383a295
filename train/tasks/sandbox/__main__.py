"""python -m train.tasks.sandbox < programs.jsonl > verdicts.jsonl

Each line {"id": …, "program": …, "timeout": seconds (10)} is answered, in order, by {"id", "passed", "reason",
"seconds"}. With "tests": … and "calls": [names] the tests run in a process of their own and call the functions of the
program from there, after "setup": … if given.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from typing import IO, Any

from ...log import UserError
from .pool import WAYS, Limits, Program, Sandbox, open_doors

BATCH = 256  # programs between two writes of verdicts
KEYS = {"id", "program", "timeout", "tests", "setup", "calls"}


def read(lines: IO[str]) -> Iterator[Program]:
    """Read programs, one a line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"sandbox: line {number} is no JSON ({error})") from error
        if not isinstance(row, dict) or not {"id", "program"} <= set(row) or set(row) - KEYS:
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"sandbox: line {number} has {found}; wanted id, program and, if need be, timeout, tests, calls, setup"
            )
        if not isinstance(row["program"], str) or not isinstance(row.get("timeout", 10.0), int | float):
            raise UserError(f"sandbox: line {number}: program must be text, and timeout a number of seconds")
        yield Program(
            id=row["id"], source=row["program"], timeout=row.get("timeout", 10.0), tests=row.get("tests"),
            setup=row.get("setup", ""), calls=tuple(row.get("calls", ())),
        )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.tasks.sandbox", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="programs run side by side (1)")
    parser.add_argument("--memory-mb", type=int, default=Limits.memory_mb, help="address space of a program")
    parser.add_argument("--using", choices=WAYS, help="one way of confining; default: the first that shuts all doors")
    parser.add_argument("--unsafe", action="store_true", help="run programs even where they cannot be confined")
    parser.add_argument("--check", action="store_true", help="say how programs are confined here, and run none")
    chosen = parser.parse_args(arguments)
    try:
        with Sandbox(
            chosen.workers, Limits(memory_mb=chosen.memory_mb), allow_unsafe=chosen.unsafe, using=chosen.using
        ) as box:
            if chosen.check:
                print(box.isolation)
                for note in box.notes:
                    print(f"not {note}")
                return 0
            if open_doors(box.facts):
                print(f"sandbox: UNSAFE: {box.isolation}", file=sys.stderr)
            programs = read(sys.stdin)
            while batch := list(itertools.islice(programs, BATCH)):
                for verdict in box.run(batch):
                    print(json.dumps(dataclasses.asdict(verdict)))
                sys.stdout.flush()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
