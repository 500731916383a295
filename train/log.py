"""What the stack says to a person (progress, tables) and to a program (JSON lines).

Every function here is silent on all processes but the first, and in quiet mode. `rich` is imported when a bar
or a table is first drawn, and only where the output is a terminal: `jaxmerge --help` does not wait for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

PLAIN_EVERY_SECONDS = 10.0  # between two lines of one bar where the output is not a terminal

_quiet = os.environ.get("JAXMERGE_QUIET", "") not in ("", "0")


class UserError(Exception):
    """A mistake the user can mend: the command prints the message on one line and exits with code 2."""


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """Raise the library's errors as the user's mistakes they are here."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


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


def rich_wanted() -> bool:
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
    kind = _Silent if not is_speaker() else _Rich if rich_wanted() else Bar
    bar = kind(title, total=total, unit=unit, done=done, scale=scale)
    try:
        yield bar
    finally:
        bar.finish()


# --- the table at the end ----------------------------------------------------------------------------------


def format_percent(fraction: float | None) -> str:
    """Write a share with one decimal: `42.3 %`; a dash where it is unknown."""
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


# --- JSON lines --------------------------------------------------------------------------------------------
