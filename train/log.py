"""What the stack says to a person (progress, tables) and to a program (JSON lines).

Every function here is silent on all processes but the first, and in quiet mode. `rich` is imported when a bar
or a table is first drawn, and only where the output is a terminal: `jaxmerge --help` does not wait for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PLAIN_EVERY_SECONDS = 10.0  # between two lines of one bar where the output is not a terminal

_quiet = os.environ.get("JAXMERGE_QUIET", "") not in ("", "0")


class UserError(Exception):
    """A mistake the user can mend: the command prints the message on one line and exits with code 2."""


def set_quiet(quiet: bool) -> bool:
    """Switch lines, bars and tables off (or on again); return the previous setting."""
    global _quiet
    previous, _quiet = _quiet, quiet
    return previous


def is_speaker() -> bool:
    """Whether this process may print: it is not quiet, and it is the first of a multi-host run."""
    return not _quiet and is_first_process()


def is_first_process() -> bool:
    """Whether this is the only process, or the first of a multi-host run.

    Starts no backend: in a single process `jax.process_index()` would claim the devices just to print a line.
    """
    if "jax" not in sys.modules:
        return True
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def say(line: str) -> None:
    """Print one line for the person watching."""
    if is_speaker():
        print(line, flush=True)


def format_seconds(seconds: float | None) -> str:
    """Write a duration for reading: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`.

    Example:
      >>> format_seconds(185)
      '3 min 05 s'
    """
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Bar:
    """The progress of one phase, in plain lines: one at most every ten seconds, and one at the end."""

    def __init__(self, title: str, *, total: int, unit: str, done: int = 0, scale: int = 1):
        self.title, self.total, self.unit, self.done, self.scale = title, total, unit, done, scale
        self.note = ""
        self._first = done  # what a resumed phase found finished: no part of the rate
        self._start = self._spoke = time.monotonic()

    @property
    def rate(self) -> float:
        """Units, as counted, a second since the bar was opened."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, n: int = 1, *, note: str = "") -> None:
        """Count `n` more units as done; `note` replaces the remark at the end of the line."""
        self.done += n
        self.note = note or self.note
        if time.monotonic() - self._spoke >= PLAIN_EVERY_SECONDS:
            self._spoke = time.monotonic()
            left = (self.total - self.done) / self.rate if self.rate > 0 else None
            self._print(f"{format_seconds(left)} left")

    def finish(self) -> None:
        self._print(f"took {format_seconds(time.monotonic() - self._start)}")

    def _print(self, ending: str) -> None:
        note = f" · {self.note}" if self.note else ""
        say(f"{self.title}: {self._count()} {self.unit} · {self._speed()} · {ending}{note}")

    def _count(self) -> str:
        if self.scale == 1:
            return f"{self.done:,}/{self.total:,}"
        return f"{self.done / self.scale:,.2f}/{self.total / self.scale:,.2f}"

    def _speed(self) -> str:
        return f"{self.rate / self.scale:,.4g} {self.unit}/s"


class _Silent(Bar):
    def advance(self, n: int = 1, *, note: str = "") -> None:
        self.done += n
        self.note = note or self.note

    def finish(self) -> None:
        pass


class _Rich(Bar):
    """The same bar on a terminal: redrawn in place, with the rate and the time left."""

    def __init__(self, title: str, *, total: int, unit: str, done: int = 0, scale: int = 1):
        super().__init__(title, total=total, unit=unit, done=done, scale=scale)
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[count]} {task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
        )
        self._task = self._progress.add_task(title, total=total, completed=done, count="", rate="", note="")
        self._progress.start()

    def advance(self, n: int = 1, *, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        self._progress.update(
            self._task, completed=self.done, count=f"{self._count()} {self.unit}", rate=self._speed(), note=self.note
        )

    def finish(self) -> None:
        self._progress.stop()


def _rich_wanted() -> bool:
    if not sys.stdout.isatty():
        return False
    import importlib.util

    return importlib.util.find_spec("rich") is not None


@contextlib.contextmanager
def progress(title: str, *, total: int, unit: str = "steps", done: int = 0, scale: int = 1) -> Iterator[Bar]:
    """Show how far a phase is, how fast it goes and how long it will take.

    Args:
      title: what is being done, such as `sample round 1`.
      total: units in the whole phase.
      unit: the plural noun the count is of.
      done: units an earlier, interrupted process had finished.
      scale: what `total` and `done` are divided by for the eye: 10**9 for bytes shown in GB.

    Example:
      >>> with progress("sample round 1", total=512, unit="samples") as bar:  # doctest: +SKIP
      ...     bar.advance(32, note="41 % correct")
    """
    kind = _Silent if not is_speaker() else _Rich if _rich_wanted() else Bar
    bar = kind(title, total=total, unit=unit, done=done, scale=scale)
    try:
        yield bar
    finally:
        bar.finish()


# --- the table at the end ----------------------------------------------------------------------------------

DOMAIN_NAMES = {"id": "in domain", "harder": "harder", "ood": "out of domain", "unseen": "never seen"}
DOMAINS = tuple(DOMAIN_NAMES)


def pooled_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keep the pooled families: a row a (method, round, domain, coefficient), test split if there is one.

    Ordered as rows first appear by method, then by round, then id, harder, out of domain.
    """
    pooled = [dict(row) for row in rows if row.get("family", "all") == "all"]
    tested = {(r["method"], r["round"], r["domain"]) for r in pooled if r.get("split", "test") == "test"}
    pooled = [
        r for r in pooled
        if r.get("split", "test") == "test" or (r["method"], r["round"], r["domain"]) not in tested
    ]  # fmt: skip
    methods = list(dict.fromkeys(r["method"] for r in pooled))
    order = {name: i for i, name in enumerate(DOMAINS)}
    return sorted(
        pooled,
        key=lambda r: (
            methods.index(r["method"]),
            r["round"],
            r.get("coefficient") or 0.0,
            order.get(r["domain"], len(order)),
        ),
    )


def format_percent(fraction: float | None) -> str:
    """Write a share with one decimal: `42.3 %`; a dash where it is unknown."""
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def format_interval(row: Mapping[str, Any]) -> str:
    """Write the 95 % interval of a row in percent: `[38.0, 46.6]`."""
    if row.get("low") is None or row.get("high") is None:
        return "–"
    return f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def method_label(row: Mapping[str, Any]) -> str:
    """Name a row's method, with its coefficient where it is a point of a sweep: `line λ=0.5`."""
    coefficient = row.get("coefficient")
    return row["method"] if coefficient is None else f"{row['method']} λ={coefficient:g}"


def print_table(summary: Mapping[str, Any]) -> None:
    """Print method × round × domain with accuracy, 95 % interval, n and seconds.

    Args:
      summary: the contents of `summary.json`. Families are pooled; where both were evaluated, the test split
        stands and the validation split is left out.
    """
    if not is_speaker():
        return
    header = ("method", "round", "domain", "accuracy", "95 % interval", "n", "seconds")
    body = [
        (
            method_label(row),
            str(row["round"]),
            str(DOMAIN_NAMES.get(row["domain"], row["domain"]))
            + ("" if row.get("split", "test") == "test" else f" ({row['split']})"),
            format_percent(row.get("accuracy")),
            format_interval(row),
            f"{row['n']:,}" if row.get("n") is not None else "–",
            f"{row['seconds']:.1f}" if row.get("seconds") is not None else "–",
        )
        for row in pooled_rows(summary.get("rows", ()))
    ]
    if not body:
        say("nothing evaluated yet")
        return
    left = (0, 2)
    title = f"{summary.get('name', 'run')}" + ("" if summary.get("finished", True) else " (unfinished)")
    if _rich_wanted():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(title))
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i in left else "right", no_wrap=True)
        for i, row in enumerate(body):
            ends = i + 1 == len(body) or body[i + 1][:2] != row[:2]
            table.add_row(*(escape(cell) for cell in row), end_section=ends)
        Console().print(table)
        return
    widths = [max(len(header[i]), *(len(row[i]) for row in body)) for i in range(len(header))]
    for row in (header, tuple("-" * width for width in widths), *body):
        cells = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        say("  ".join(cells).rstrip())


# --- JSON lines --------------------------------------------------------------------------------------------


def append_jsonl(path: str | os.PathLike[str], row: Mapping[str, Any]) -> None:
    """Add one object as one line, on disk when this returns.

    One write of one whole line: a process killed inside it leaves at most a torn last line, which
    `read_jsonl_tolerant` knows. NaN and infinity are refused, since no JSON reader but Python's takes them.
    """
    line = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(", ", ": ")) + "\n"
    with open(path, "ab", buffering=0) as file:
        # A torn line left by a killed process must not swallow this one.
        torn = file.tell() > 0 and _last_byte(path) != b"\n"
        if torn:
            raise UserError(
                f"{os.fspath(path)}: the last line is torn (no newline at its end); expected whole lines"
                " before appending: call read_jsonl_tolerant(path, truncate=True) first, as a resumed run does"
            )
        data = line.encode()
        if file.write(data) != len(data):
            raise OSError(f"{os.fspath(path)}: only a part of {len(data)} bytes could be written")
        os.fsync(file.fileno())


def _last_byte(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def read_jsonl_tolerant(path: str | os.PathLike[str], *, truncate: bool = False) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file whose writer may have been killed.

    Args:
      path: the file; one that does not exist reads as no rows.
      truncate: also cut a torn last line from the file, so that appending can go on.

    Returns:
      The rows of all whole lines. A last line without a newline at its end is torn (its writer was killed in
      the middle) and dropped. A bad line anywhere else is damage, and an error naming the line.
    """
    path = pathlib.Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    end = data.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(data[:end].split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: expected one JSON object a line, found {line[:60]!r} ({error});"
                " only a torn last line is mended by itself: restore the file or start in a new folder"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    if truncate and end < len(data):
        with open(path, "r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
    return rows
