"""Which model of which run a folder holds: told by where it lies, or by what `export` wrote beside the weights."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from jaxmerge.files.documents import read_json

from ..runtime.disk import write_durably

RECORD = "export.json"


@dataclasses.dataclass(frozen=True)
class Origin:
    """A model of a run. root: the run's folder. model: as `round-1/imm/merge`; "" is all merges of the run."""

    root: Path
    model: str


def write_origin(folder: Path, root: Path, model: str) -> None:
    """Write into an exported folder which model of a run it is; the run by its path from there."""
    record = {"run": os.path.relpath(root.resolve(), folder.resolve()), "model": model}
    write_durably(folder / RECORD, json.dumps(record, indent=1) + "\n")


def origin_of(out: str, of: str | None = None) -> Origin | None:
    """Say which model of a run is at `out`, or is said to be there; None where no run has to do with it.

    Args:
      out: the folder of a run, one of its checkpoints, or an exported folder.
      of: the folder of a run or one of its checkpoints, which `out` should be.

    Raises:
      ValueError: the record that `export` wrote cannot be read.
    """
    record = read_json(Path(out) / RECORD)
    run, model = (record[key] if isinstance(record.get(key), str) else "" for key in ("run", "model"))
    if of is not None:
        root = run_above(Path(of))
        return None if root is None else Origin(root, place_of(root, Path(of)) or model)
    if run and model:
        return Origin(Path(os.path.normpath(Path(out).resolve() / run)), model)
    root = run_above(Path(out))
    here = "" if root is None else os.path.relpath(os.path.abspath(out), root)
    # What else lies in a run's folder has a recipe of its own.
    return Origin(root, place_of(root, Path(out))) if root and (here == "." or here.startswith("checkpoints")) else None


def run_above(path: Path) -> Path | None:
    """Return the folder of a run that a path is, or lies in."""
    path = Path(os.path.abspath(path))
    return next((p for p in (path, *path.parents) if (p / "phases").is_dir() and (p / "config.yaml").is_file()), None)


def place_of(root: Path, path: Path) -> str:
    """Name a checkpoint of a run as its phases are named; "" is the run's folder itself.

    Example:
      >>> place_of(Path("/runs/a"), Path("/runs/a/checkpoints/round-1/imm/merge/weights"))
      'round-1/imm/merge'
    """
    parts = Path(os.path.abspath(path)).relative_to(root).parts
    parts = parts[1:] if parts[:1] == ("checkpoints",) else parts
    return "/".join(parts[:-1] if parts[-1:] == ("weights",) else parts)
