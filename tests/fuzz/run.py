"""Damage files of twelve kinds by seeds, and hold what happens to the rules: `python tests/fuzz/run.py count=300`.

A damaged file is read, or refused in one line of at most 2,000 characters that names a file, folder or key. A
traceback, raised or told on stderr, a reading that takes longer than 10 s, a file left behind, and a file that is read
though its reference library refuses it are faults: their seeds are printed, and the exit code is 1.
`kinds=recipe,index` chooses kinds, `first=1000` the first seed, `workers=2` the processes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SECONDS = 10
LONGEST = 2000
BATCH = 100


class Hang(BaseException):
    """Reading took too long; no `except Exception` may swallow it."""


def _ring(*_: Any) -> None:
    raise Hang


def try_batch(name: str, first: int, count: int) -> list[tuple[int, str, str]]:
    """Read mutants of one kind; (seed, what happened, detail)."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from fuzz.kinds import KINDS

    from train.log import set_quiet

    set_quiet(True)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what Orbax says of every damaged checkpoint
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _ring)
    kind = KINDS[name]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder = pathlib.Path(place)
        os.chdir(folder)
        kind.make(folder)
        kind.read(folder)  # the seed itself is right, and what is compiled once is compiled
        kind.refuses(folder)
        with _stderr_in(folder.parent / f"{folder.name}.stderr") as told:
            found = [(seed, *try_mutant(name, kind, folder, seed)) for seed in range(first, first + count)]
        # A thread of a library may tell what was raised in it long after: it belongs to the batch.
        return [*found, (first, "told", lines[-200:])] if "Traceback" in (lines := told()) else found


@contextlib.contextmanager
def _stderr_in(file: pathlib.Path) -> Iterator[Callable[[], str]]:
    """What the process and its threads write to stderr goes to a file; its text is had after the block."""
    kept, text = os.dup(2), ""
    with file.open("w") as there:
        os.dup2(there.fileno(), 2)
    try:
        yield lambda: text
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        text = file.read_text(errors="replace")
        file.unlink()


def try_mutant(name: str, kind: Any, folder: pathlib.Path, seed: int) -> tuple[str, str]:
    """Damage one file, read the folder, put the file back."""
    from fuzz.mutate import mutate

    from train.log import UserError

    rng = random.Random(f"{name} {seed}")
    files = sorted({file for pattern in kind.files for file in folder.glob(pattern) if file.is_file()})
    file = rng.choice(files)
    before, listing = file.read_bytes(), _listing(folder)
    file.write_bytes(mutate(before, rng))
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            kind.read(folder)
            verdict = ("read", "")
        except (UserError, ValueError) as error:
            verdict = _judge(str(error), type(error).__name__, folder, before + file.read_bytes())
        except Hang:
            verdict = ("hang", file.name)
        except BaseException as error:
            verdict = ("traceback", f"{type(error).__name__}: {str(error)[:200]}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if verdict[0] == "read" and _is_refused_elsewhere(kind, folder):
            verdict = ("taken", file.name)
        if _listing(folder) != listing:
            verdict = ("litter", ", ".join(sorted(_listing(folder) ^ listing))[:200])
    finally:
        for left in _listing(folder) - listing:
            path = folder / left
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        file.write_bytes(before)
    return verdict


def _judge(message: str, kind: str, folder: pathlib.Path, data: bytes) -> tuple[str, str]:
    if len(message) > LONGEST:
        return "long", f"{len(message)} characters: {message[:120]}"
    if "\n" in message.strip():
        return "lines", message[:200]
    # Plain errors of Python and NumPy name nothing that is in the folder, or in the file before or after.
    named = [*(path.name for path in folder.rglob("*")), *re.findall(r"[\w.]{2,}", data.decode(errors="replace"))]
    return ("refused", "") if any(word in message for word in named) else ("unnamed", f"{kind}: {message[:200]}")


def _is_refused_elsewhere(kind: Any, folder: pathlib.Path) -> bool:
    try:
        kind.refuses(folder)
    except BaseException:  # a panic of a library in Rust is no Exception
        return True
    return False


def _listing(folder: pathlib.Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run(kinds: list[str], count: int, first: int, workers: int) -> int:
    """Try `count` mutants of each kind; print a table, and the seeds of faults."""
    begin = time.perf_counter()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fuzz.kinds"])
    totals: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in kinds}
    faults: list[str] = []
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = {
            pool.submit(try_batch, name, at, min(BATCH, first + count - at)): name
            for at in range(first, first + count, BATCH)
            for name in kinds
        }
        for job in concurrent.futures.as_completed(jobs):
            name = jobs[job]
            for seed, verdict, detail in job.result():
                totals[name][verdict] += 1
                if verdict not in ("read", "refused"):
                    faults.append(f"{name} seed {seed}: {verdict}: {detail}")
    print("| kind | mutants | read | refused | faults |\n|---|---|---|---|---|")
    for name, found in totals.items():
        bad = found.total() - found["read"] - found["refused"]
        print(f"| {name} | {found.total()} | {found['read']} | {found['refused']} | {bad} |")
    print(f"\n{sum(found.total() for found in totals.values())} mutants in {time.perf_counter() - begin:.0f} s")
    print("\n".join(sorted(faults)))
    return 1 if faults else 0


def main(words: list[str]) -> int:
    from fuzz.kinds import KINDS

    given = dict(word.split("=", 1) for word in words)
    if unknown := set(given) - {"kinds", "count", "first", "workers"}:
        print(f"unknown: {', '.join(unknown)}; give kinds=, count=, first=, workers=")
        return 2
    kinds = given["kinds"].split(",") if "kinds" in given else list(KINDS)
    if lost := [name for name in kinds if name not in KINDS]:
        print(f"no kind {', '.join(lost)}; there are {', '.join(KINDS)}")
        return 2
    workers = int(given.get("workers", os.cpu_count() or 1))
    return run(kinds, int(given.get("count", 300)), int(given.get("first", 0)), workers)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
