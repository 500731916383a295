"""The folder of a run: which phases are committed, and how one is committed whole or not at all.

    phases/<name>.partial/   work in progress, kept over a kill and reused
    phases/<name>/           committed: record.json and whatever the phase wrote
    phases/<name>.gone.partial/   what is being removed, because the phase is to be done again
    metrics.jsonl            one line a committed phase, in order of commitment

The rename of a phase's folder is the commit. The line in metrics.jsonl follows; if a kill falls between the
two, the line is written at the next start, so that every phase is named exactly once. The record of a phase that was
cut off and gone on with says `resumed`: its seconds are those since it was gone on with.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxmerge.files.disk import sync

from ..log import UserError, say
from .disk import Busy, write_durably
from .jsonl import append_jsonl, read_jsonl
from .processes import gather_values, on_first, several

Record = dict[str, Any]


class Journal:
    """Opens the run folder `root` (made if missing) and, unless `read_only`, holds it until closed.

    Of several processes the first writes; the others hear from it what is committed, for a shared file system may show
    them a file late.
    """

    def __init__(self, root: Path, *, read_only: bool = False):
        self.root, self.metrics = root, root / "metrics.jsonl"
        self._named: set[str] = set()
        self._resumed: set[str] = set()
        self._lock: Any = None
        if read_only:
            self._records = self._read()
            return
        token = on_first(self._open)
        if several():
            check_shared(root / ".lock", token)
        self._records = on_first(self._read)

    def _open(self) -> str:
        """Take the lock; what its file says."""
        try:
            (self.root / "phases").mkdir(parents=True, exist_ok=True)
            self._lock = (self.root / ".lock").open("a+")
        except OSError as error:
            raise UserError(
                f"{self.root}: cannot be written: {error.strerror}; choose another folder with out=DIR"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise Busy(f"{self.root}: another process is running this run; wait for it or choose out=DIR") from None
        for left in (self.root / "phases").glob("**/*.gone.partial"):
            shutil.rmtree(left, ignore_errors=True)
        token = os.urandom(8).hex()
        self._lock.truncate(0)
        self._lock.write(token)
        self._lock.flush()
        os.fsync(self._lock.fileno())
        return token

    def _read(self) -> dict[str, Record]:
        """The records of all committed phases by name."""
        phases, records = self.root / "phases", {}
        for path in sorted(phases.glob("**/record.json")):
            name = path.parent.relative_to(phases)
            if any(part.endswith(".partial") for part in name.parts):
                continue
            try:
                records[name.as_posix()] = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: not JSON ({error}); remove {path.parent} to run this phase again") from None
        return records

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        """Let another process have the run."""
        if self._lock is not None:
            self._lock.close()

    def reconcile(self, names: Iterable[str]) -> None:
        """Drop a torn last line of metrics.jsonl, add the lines of phases committed without one; say what is there."""
        names = list(names)
        on_first(self._reconcile, names)
        done = sum(name in self._records for name in names)
        begun = on_first(lambda: [name for name in names if self._partial(name).is_dir()])
        if done < len(names) and (done or begun):
            more = f", {begun[0]} was begun" if begun else ""
            say(f"{self.root}: {done} of {len(names)} phases are there{more}; going on")

    def _reconcile(self, names: list[str]) -> None:
        self._named = {row["phase"] for row in read_jsonl(self.metrics, torn="mend")}
        for name in names:
            record = self.committed(name)
            if record is not None:
                self._name(name, record)

    def committed(self, name: str) -> Record | None:
        """The record of a committed phase, else None."""
        return self._records.get(name)

    def folder(self, name: str) -> Path:
        """Where a phase in progress keeps what it already has; empty unless it was cut off before."""
        path = self._partial(name)
        on_first(self._begin, name, path)
        return path

    def _begin(self, name: str, path: Path) -> None:
        if path.exists():
            self._resumed.add(name)
        path.mkdir(parents=True, exist_ok=True)

    def _partial(self, name: str) -> Path:
        return self.root / "phases" / f"{name}.partial"

    def committed_folder(self, name: str) -> Path:
        return self.root / "phases" / name

    def commit(self, name: str, record: Mapping[str, Any]) -> Record:
        """Make a phase's folder final with its record, then name it in metrics.jsonl."""
        self._records[name] = on_first(self._commit, name, record)
        return self._records[name]

    def _commit(self, name: str, record: Mapping[str, Any]) -> Record:
        row = {"phase": name, **record} | ({"resumed": True} if name in self._resumed else {})
        partial, final = self._partial(name), self.root / "phases" / name
        if final.is_dir() and not (final / "record.json").exists():
            shutil.rmtree(final)  # what a kill left of a phase that was being removed
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
        del self._records[name]
        on_first(self._remove, self.root / "phases" / name)

    def _remove(self, final: Path) -> None:
        """Remove a committed folder; killed at any point, it is there whole or is not committed."""
        gone = final.with_name(f"{final.name}.gone.partial")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(final, gone)
        sync(final.parent)
        shutil.rmtree(gone)


def check_shared(path: Path, token: str) -> None:
    """Refuse, on every process alike, a folder that only some of them see as the first one does."""
    try:
        seen = path.read_text() == token
    except OSError:
        seen = False
    blind = [i for i, sees in enumerate(gather_values(seen)) if not sees]
    if blind:
        raise UserError(
            f"{path.parent}: process {', '.join(map(str, blind))} does not see what process 0 writes there; "
            "the folder of a run of several processes lies on a file system they share: choose one with out=DIR"
        )
