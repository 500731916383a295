"""Files of checkpoints, kept open while they are read, and told apart from what has their name later."""

from __future__ import annotations

import errno
import os
import pathlib
import resource
import stat
from collections.abc import Callable, Iterable

Stamp = tuple[int, int, int]


class OpenFile:
    """A plain file, open for reading until the last tensor in it is forgotten.

    So all reads are of one file, even if another one gets its name meanwhile.

    Raises:
      ValueError: there is no plain file of that name (a folder, a pipe or a device is none), or it cannot be read.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.handle = -1
        try:
            self.handle = _open(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        status = os.fstat(self.handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is no plain file but a folder, a pipe or a device; give a file")
        self.size = status.st_size

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # A default, because the module's names may be gone when the interpreter ends.
        if self.handle >= 0:
            close(self.handle)


def read_bytes(path: pathlib.Path, most: int | None = None) -> bytes:
    """Read a plain file; a pipe would hold us up, and a device has no end.

    Raises:
      ValueError: it is no plain file, or has more than `most` bytes.
    """
    opened = OpenFile(path)
    if most is not None and opened.size > most:
        raise ValueError(f"{path} has {opened.size:,} bytes, wanted at most {most:,}; it is no such file")
    parts, size = [], 0
    while part := os.pread(opened.handle, max(opened.size - size, 0) + 1, size):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def _open(path: pathlib.Path) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe without a writer must not hold us up
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    # Several checkpoints of hundreds of shards: more files than a process may open unless it asks.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return os.open(path, flags)


def stamps(files: Iterable[pathlib.Path]) -> dict[pathlib.Path, Stamp | None]:
    """Return what tells a file from another of its name: inode, size, time of change; None where there is none."""
    return {file: _stamp(file) for file in files}


def _stamp(file: pathlib.Path) -> Stamp | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def check_unchanged(before: dict[pathlib.Path, Stamp | None]) -> None:
    """Raise if a file is not what it was when `before` was taken."""
    for file, stamp in before.items():
        now = _stamp(file)
        if now != stamp:
            what = "is gone" if now is None else "has changed"
            raise ValueError(
                f"{file} {what} since this merge opened it, so the result would be a mix and nothing is written; "
                "give the command again when the inputs rest"
            )
