"""JSON lines: rows read with errors that name file and line, and written whole or one at a time."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from ..log import UserError
from .disk import PathLike, named, read_bytes, write_durably

Row = dict[str, Any]
Torn = Literal["refuse", "drop", "mend"]


def read_jsonl(path: PathLike, *, torn: Torn = "refuse", required: Collection[str] = ()) -> list[Row]:
    """Read the objects of a file of one JSON object a line.

    Args:
      path: the file.
      torn: refuse: a person's file; blank lines are passed over, and it must be there. drop: a file that
        `append_jsonl` writes and whose writer may have been killed: a last line without a newline at its end is left
        out, and a file that is not there has no rows. mend: as drop, and the torn line is cut from the file, so that
        appending can go on.
      required: keys every object must have.

    Raises:
      UserError: the file cannot be read, or a line (named by number) is no JSON object or lacks a key.
    """
    return [row for _, row in numbered_jsonl(path, torn=torn, required=required)]


def numbered_jsonl(path: PathLike, *, torn: Torn = "refuse", required: Collection[str] = ()) -> list[tuple[int, Row]]:
    """As `read_jsonl`, each object with the number of its line."""
    path = pathlib.Path(path)
    try:
        data = read_bytes(path)
    except UserError:
        if torn != "refuse" and not path.exists():
            return []
        raise
    end = len(data) if torn == "refuse" else data.rfind(b"\n") + 1
    lines = data[:end].split(b"\n")
    rows = []
    for number, line in enumerate(lines if torn == "refuse" else lines[:-1], start=1):
        if line.strip() or torn != "refuse":  # in a file of ours a blank line is damage
            row = parse(line, f"{path}:{number}", ours=torn != "refuse")
            missing = [key for key in required if key not in row]
            if missing:
                found = ", ".join(row) or "none"
                raise UserError(f"{path}:{number}: missing {', '.join(missing)}; found the keys {found}")
            rows.append((number, row))
    if torn == "mend" and end < len(data):
        with open(path, "r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
    return rows


def parse(line: bytes, where: str, *, ours: bool) -> Row:
    """The object of one line; `ours`: of a file that a program of ours wrote."""
    try:
        row = json.loads(line, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: expected one JSON object a line, found what is not UTF-8 text ({error})") from error
    except (ValueError, RecursionError) as error:
        if not ours:
            raise UserError(
                f"{where}: no JSON ({error}); found {line.strip()[:60].decode(errors='replace')!r}"
            ) from error
        raise UserError(
            f"{where}: expected one JSON object a line, found {line[:60]!r} ({error}); only a torn last line is mended "
            "by itself: restore the file or start in a new folder"
        ) from error
    if not ours and (b"\\ud" in line.lower() or b"\xed" in line):
        check_text(row, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _no_number(word: str) -> float:
    # Python alone reads these; what was read would be refused once it is written, when all work is done.
    raise ValueError(f"{word} is no number of JSON; write null, or leave the key out")


def check_text(row: Any, where: str) -> None:
    """Refuse halves of surrogate pairs, which are no characters: neither a tokenizer nor a file takes them."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: \\u{ord(error.object[error.start]):04x} is half of a pair of code units and no character; write"
            " both halves, or take it out"
        ) from error


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
    `read_jsonl` can drop or mend. NaN and infinity are refused, since no JSON reader but Python's takes them.
    """
    line = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(", ", ": ")) + "\n"
    with named(path), open(path, "ab", buffering=0) as file:
        # A torn line left by a killed process must not swallow this one.
        torn = file.tell() > 0 and _last_byte(path) != b"\n"
        if torn:
            raise UserError(
                f"{os.fspath(path)}: the last line is torn (no newline at its end); expected whole lines"
                " before appending: call read_jsonl(path, torn='mend') first, as a resumed run does"
            )
        data = line.encode()
        if file.write(data) != len(data):
            raise OSError(f"{os.fspath(path)}: only a part of {len(data)} bytes could be written")
        os.fsync(file.fileno())


def _last_byte(path: PathLike) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
