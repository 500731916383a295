"""Rows of examples by path, each with its place for errors: lines of a file here, or rows of a dataset on the hub."""

from __future__ import annotations

import os
from pathlib import Path

from ..runtime.jsonl import Row, numbered_jsonl
from . import hub


def read_rows(path: str | os.PathLike[str], split: str = "train") -> list[tuple[str, Row]]:
    """Read (place, row) of every example, in order.

    Args:
      path: a file of JSON lines, or `hf:ORG/NAME…` (hub.py).
      split: of a dataset on the hub, unless its name says one; a file has none.
    """
    if hub.is_hub(path):
        return list(hub.read(path, hub.one_split(path, split)))
    return [(f"{path}:{number}", row) for number, row in numbered_jsonl(path)]


def stem_of(path: str | os.PathLike[str]) -> str:
    """The name of a file without its ending, or of a dataset."""
    return hub.parse(path).stem if hub.is_hub(path) else Path(path).stem


def is_rows(path: str | os.PathLike[str]) -> bool:
    """Whether a path names rows, and no folder of a TFDS version."""
    return hub.is_hub(path) or not Path(path).is_dir()
