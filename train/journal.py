"""The folder of a run: which phases are committed, and how one is committed whole or not at all.

    phases/<name>.partial/   work in progress, kept over a kill and reused
    phases/<name>/           committed: record.json and whatever the phase wrote
    metrics.jsonl            one line a committed phase, in order of commitment

The rename of a phase's folder is the commit. The line in metrics.jsonl follows; if a kill falls between the
two, the line is written at the next start, so that every phase is named exactly once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .log import UserError, append_jsonl, read_jsonl_tolerant

Record = dict[str, Any]


class Journal:
    """Opens the run folder `root` (made if missing) and, unless `read_only`, holds it until closed."""

    def __init__(self, root: Path, *, read_only: bool = False):
        self.root, self.metrics = root, root / "metrics.jsonl"
        self._named: set[str] = set()
        if read_only:
            return
        try:
            (root / "phases").mkdir(parents=True, exist_ok=True)
            self._lock = (root / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"{root}: cannot be written: {error.strerror}; choose another folder with out=DIR"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"{root}: another process is running this run; wait for it or choose out=DIR") from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        """Let another process have the run."""
        self._lock.close()

    def reconcile(self, names: Iterable[str]) -> None:
        """Drop a torn last line of metrics.jsonl and add the lines of phases committed without one."""
        self._named = {row["phase"] for row in read_jsonl_tolerant(self.metrics, truncate=True)}
        for name in names:
            record = self.committed(name)
            if record is not None:
                self._name(name, record)

    def committed(self, name: str) -> Record | None:
        """The record of a committed phase, else None."""
        path = self.root / "phases" / name / "record.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not JSON ({error}); remove {path.parent} to run this phase again") from None

    def folder(self, name: str) -> Path:
        """Where a phase in progress keeps what it already has; empty unless it was cut off before."""
        path = self.root / "phases" / f"{name}.partial"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def committed_folder(self, name: str) -> Path:
        return self.root / "phases" / name

    def commit(self, name: str, record: Mapping[str, Any]) -> Record:
        """Make a phase's folder final with its record, then name it in metrics.jsonl."""
        row = {"phase": name, **record}
        partial, final = self.folder(name), self.root / "phases" / name
        write_durably(partial / "record.json", json.dumps(row, indent=1, allow_nan=False))
        for path in partial.iterdir():
            if path.is_file():
                sync(path)
        sync(partial)
        os.rename(partial, final)
        sync(final.parent)
        self._name(name, row)
        return row

    def _name(self, name: str, record: Mapping[str, Any]) -> None:
        if name not in self._named:  # a phase done again after its files were lost has its line already
            append_jsonl(self.metrics, record)
            self._named.add(name)

    def uncommit(self, name: str) -> None:
        """Have a phase done again, because what it made is lost."""
        shutil.rmtree(self.root / "phases" / name)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replace a text file whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)
