"""Files and folders put on disk whole or not at all, and locks between processes.

The library's `jaxmerge.files.disk` does the work; here its errors become the command's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from jaxmerge.files import disk
from jaxmerge.files.disk import sync

from ..log import UserError

PathLike = str | os.PathLike[str]


class Busy(UserError):
    """Another process is at this run."""


def write_durably(path: PathLike, content: str | bytes) -> None:
    """Replace a file whole or not at all: a temporary name beside it, fsync, rename. Its folder is made if need be.

    Raises:
      UserError: it could not be written; names the path and why.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder itself may be gone, or be a file
            scratch.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written: {error.strerror or error}") from error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` when the block ends well, and vanishes otherwise.

    Raises:
      UserError: `folder` is there and not empty, or the disk is full; nothing is left behind.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already there and not empty; remove it or name another folder")
    try:
        with disk.new_folder(folder) as temporary:
            yield temporary
    except disk.DiskError as error:
        raise UserError(f"{folder}: could not be written ({error})") from error
    except OSError as error:
        why = "no space left" if error.errno == errno.ENOSPC else error.strerror or error
        raise UserError(f"{folder}: could not be written ({why}); nothing was left behind") from error


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """One process at a time; the others wait, or are told that it is busy."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another process is at {path}") from None
        yield
