"""Every reply of a search on disk, so that a killed search goes on from where it was.

A search depends on its replies alone, so nothing else need be kept: at the next start its generator is run again and
given what the log holds, and only what was still being decoded is decoded again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from ..log import UserError, is_first_process
from ..runtime.disk import named
from ..runtime.jsonl import read_jsonl
from ..runtime.processes import on_first
from .ask import Reply

SYNC_EVERY_SECONDS = 1.0
"""A killed process loses nothing that was written; this is what a machine that loses its power may lose."""


class Replies:
    """The log at `path`; opened by the first process alone, known to all."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[str] = []
        rows = on_first(read_jsonl, path, torn="mend")
        try:
            self.known = {(row.pop("id"), row.pop("name")): Reply(**row) for row in rows}
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: a line is no reply ({error}); remove {path} to begin again") from None
        self.file: Any = None
        self.synced = time.monotonic()

    def __enter__(self) -> Replies:
        if is_first_process():
            self.file = self.path.open("ab", buffering=0)
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush(sync=True)
        if self.file is not None:
            self.file.close()

    def add(self, id: str, name: str, reply: Reply) -> None:
        row = {"id": id, "name": name, **dataclasses.asdict(reply)}
        self.lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def flush(self, *, sync: bool = False) -> None:
        """Write what was added: whole lines in one write, of which a kill leaves at most the last one torn."""
        if self.file is None:
            self.lines.clear()
            return
        if self.lines:
            data = "".join(self.lines).encode()
            self.lines.clear()
            with named(self.path):
                written = self.file.write(data)
            if written != len(data):
                raise OSError(f"{self.path}: only a part of {len(data)} bytes could be written")
        if sync or time.monotonic() - self.synced > SYNC_EVERY_SECONDS:
            os.fsync(self.file.fileno())
            self.synced = time.monotonic()
