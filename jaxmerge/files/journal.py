r"""What of a merge is done, so that one killed anywhere goes on where it was and ends with the same bytes.

Beside the folder to make, `out`, lies `.out.merging/` until `out` is whole:

  journal.jsonl   first line: the plan's digest and the inputs' files with their sizes and times; then a line for each
                  tensor written: digests of its inputs and of its bytes, and its statistics; each with its own digest
  result/         the folder itself, its files pre-sized, tensors at their places; renamed to `out` at the end
  modules/        of a merge of adapters: the merged factors of each module, until their ranks are all known

A line is written after its tensor. Files are flushed to disk only at the end: after a crash of the machine a line may
stand for bytes that never got there, so what the journal says is done is digested again before it is believed.
Digests are xxh3 with 128 bits: a hundred times cheaper than the merge, where sha256 would cost several times it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import xxhash

from jaxmerge.files.disk import check_free, sync, sync_all

VERSION = 3
CHECK = b',"check":'  # the last key of each line: a digest of what stands before it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Kept(ValueError):
    """A merge ends before it is done, and what is done is kept: the same command goes on."""


class Changed(Kept):
    """An input is another than when the merge was begun. What is done is kept, for when it is put back."""


class Journal:
    """The unfinished merge of `out`: `done` has the records of an earlier try, by tensor."""

    def __init__(self, out: pathlib.Path, plan_digest: str, files: Mapping[str, Sequence[int]]):
        self.out = out
        self.folder = out.absolute().parent / f".{out.name}.merging"
        self.result = self.folder / "result"
        self.done: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self.touched: set[str] = set()  # input files with another time than the journal's, of the same size
        self._start = {"version": VERSION, "plan": plan_digest, "files": files}
        self._path = self.folder / "journal.jsonl"
        self._file: Any = None

    def open(self) -> None:
        """Take up what an earlier try left, or begin; two processes on one `out` are refused."""
        self.result.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115 - held until the merge ends
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is merging into {self.out} now; wait for it, or choose another"
            ) from None
        records = self._records()
        if records and self._continues(records[0]):
            self.done = {record["tensor"]: record for record in records[1:]}
            return
        if records:
            self.notes.append(
                f"what was left of an unfinished merge into {self.out} of another recipe, tokenizer or version is gone"
            )
        shutil.rmtree(self.result)
        self.result.mkdir()
        self._file.truncate(0)
        self._write(self._start)

    def _records(self) -> list[dict[str, Any]]:
        """Read the lines up to the first that is damaged, and cut the file there: what follows is merged again."""
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        records: list[dict[str, Any]] = []
        for line in lines:
            body, _, check = line.rpartition(CHECK)
            if check != _check(body):
                break
            records.append(json.loads(body + b"}"))
        # A line cut short by a crash is no damage, but would swallow the next one.
        if len(records) < len(lines) and lines[len(records)].endswith(b"\n"):
            self.notes.append(f"line {len(records) + 1} of {self._path} was damaged; merged again from there on")
        self._file.truncate(sum(map(len, lines[: len(records)])))
        return records

    def _continues(self, start: Mapping[str, Any]) -> bool:
        if start.get("version") != VERSION or start.get("plan") != self._start["plan"]:
            return False
        for file, (size, time) in start["files"].items():
            now = self._start["files"].get(file)
            if now is None or now[0] != size:
                raise Changed(
                    f"{file} has changed since this merge was begun ({size} bytes then, "
                    f"{'gone' if now is None else f'{now[0]} bytes'} now); put it back to go on, or remove "
                    f"{self.folder} to begin again"
                )
            if now[1] != time:
                self.touched.add(file)
        return True

    def add(self, record: Mapping[str, Any]) -> None:
        """Say that a tensor is written."""
        self._write(record)
        self.done[record["tensor"]] = dict(record)

    def _write(self, record: Mapping[str, Any]) -> None:
        body = json.dumps(record, separators=(",", ":")).encode().removesuffix(b"}")
        line = body + CHECK + _check(body)
        while line:  # an unbuffered file may take a part
            line = line[self._file.write(line) :]

    def finish(self) -> None:
        """Make the result durable and give it its name."""
        self.result.chmod(0o755)
        sync_all(self.result)
        if self.out.exists():
            self.out.rmdir()
        self.result.rename(self.out)
        sync(self.out.absolute().parent)
        self.remove()

    def remove(self) -> None:
        """Forget the merge."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let go of the lock; what is done stays for the next try."""
        if self._file is not None:
            self._file.close()


def stages_of(out: pathlib.Path) -> pathlib.Path:
    """The folder of what the stages of a recipe make on the way to `out`."""
    return out.absolute().parent / f".{out.name}.stages"


def count_done(out: pathlib.Path) -> int:
    """How many tensors an unfinished merge into `out` has written, its stages' among them."""
    beside = out.absolute().parent
    places = [beside / f".{out.name}.merging", *stages_of(out).glob("**/.*.merging")]
    paths = [path for place in places if (path := place / "journal.jsonl").is_file()]
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in paths)


def has_begun(out: pathlib.Path) -> bool:
    """Whether an unfinished merge into `out` left something to go on from: a tensor, or a stage that is done."""
    between = stages_of(out)
    done = [between / "result", *between.glob("stages/*")]
    return count_done(out) > 0 or any(folder.is_dir() and not folder.name.startswith(".") for folder in done)


def _check(body: bytes) -> bytes:
    """The end of a line that begins with `body`, after CHECK."""
    return f'"{xxhash.xxh3_64_hexdigest(body)}"}}\n'.encode()


def stamp(file: pathlib.Path) -> tuple[str, list[int]]:
    """Return a file's name with its size and time of change."""
    status = file.stat()
    return str(file), [status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def unfinished(
    out: pathlib.Path, plan_digest: str, files: Mapping[str, Sequence[int]], wanted: int
) -> Iterator[Journal]:
    """Yield the journal of a merge into `out`; at the end of the block the result gets its name.

    A full disk, an interrupt and an input that changed leave what is done for the next try; an error of the inputs
    leaves nothing.
    """
    check_free(out)
    try:
        journal = Journal(out, plan_digest, files)
        parent = journal.folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free + _taken(journal.result)
        if free < wanted:
            raise Kept(f"no space left for {out}: it needs {wanted / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
        with contextlib.ExitStack() as stack:
            stack.callback(journal.close)
            journal.open()
            stack.pop_all()
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}; choose another output folder") from None
    try:
        yield journal
        journal.finish()
    except OSError as error:
        if error.errno in FULL:
            raise Kept(
                f"no space left while writing {out}; free some and give the same command again: it goes on where it was"
            ) from None
        raise
    except Kept:
        raise
    except ValueError:
        journal.remove()
        raise
    finally:
        journal.close()


def _taken(folder: pathlib.Path) -> int:
    """Bytes on disk of an earlier try: pre-sized files take only what was written to them."""
    return sum(os.stat(file).st_blocks * 512 for file in folder.iterdir()) if folder.is_dir() else 0
