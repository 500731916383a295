"""What SkyPilot leaves behind of the folder that a job is sent from: `tpu.files` refuses what a config names of it.

Every other file travels, committed or not. A test holds this against SkyPilot's own code (`.ci/run skypilot`).
"""

from __future__ import annotations

import glob
import subprocess
from collections.abc import Sequence
from pathlib import Path

from train.log import UserError


def ignored(files: Sequence[Path], root: Path) -> list[Path]:
    """Those of `files`, all below `root`, that SkyPilot leaves behind.

    git is asked without its index: a file that is tracked and matches a pattern counts as ignored, since SkyPilot
    reads the patterns alone where it sends by rsync.
    """
    if (root / ".skyignore").exists():
        return by_skyignore(files, root)
    given = "\0".join(str(file.relative_to(root)) for file in files)
    command = ["git", "-C", str(root), "check-ignore", "--no-index", "-z", "--stdin"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode == 128 and "not a git repository" in done.stderr:
        return []
    if done.returncode > 1:  # 1: none is ignored
        raise UserError(f"{root}: git check-ignore ended with {done.returncode}: {done.stderr.strip()}")
    return [root / name for name in done.stdout.split("\0") if name]


def by_skyignore(files: Sequence[Path], root: Path) -> list[Path]:
    """SkyPilot reads each line as a pattern for glob that holds at any depth, or with a first `/` at the root alone."""
    excluded: set[Path] = set()
    for line in (root / ".skyignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            pattern = pattern.removeprefix("/") if pattern.startswith("/") else f"**/{pattern}"
            excluded |= {Path(found) for found in glob.glob(str(root / pattern), recursive=True)}
    return [file for file in files if excluded & {file, *file.parents}]
