"""JSON lines: rows read with errors that name file and line, and written whole or one at a time."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..log import UserError
from .disk import PathLike, write_durably

Row = dict[str, Any]


def read_jsonl(path: PathLike, *, required: Collection[str] = ()) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; blank lines are passed over.

    Args:
      path: the file.
      required: keys every object must have.

    Raises:
      UserError: the file is not there, or a line (named by number) is no JSON object or lacks a key.
    """
    return [row for _, row in numbered_jsonl(path, required=required)]


def numbered_jsonl(path: PathLike, *, required: Collection[str] = ()) -> list[tuple[int, dict[str, Any]]]:
    """As `read_jsonl`, each object with the number of its line."""
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); expected one JSON object a line") from error
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error.strerror or error}") from error
    rows = []
    # Not splitlines: U+2028 and its kin may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: no JSON ({error}); found {line.strip()[:60]!r}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        missing = [key for key in required if key not in row]
        if missing:
            raise UserError(f"{path}:{number}: missing {', '.join(missing)}; found the keys {', '.join(row) or 'none'}")
        rows.append((number, row))
    return rows


def write_jsonl(path: PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, the whole file or nothing: a temporary name, synced, renamed."""
    path = pathlib.Path(path)
    try:
        lines = [json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: a row is no JSON: {error}") from error
    write_durably(path, "".join(lines))


def append_jsonl(path: PathLike, row: Mapping[str, Any]) -> None:
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


def _last_byte(path: PathLike) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def read_jsonl_tolerant(path: PathLike, *, truncate: bool = False) -> list[dict[str, Any]]:
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
