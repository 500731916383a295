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
from jaxmerge.files.checkpoints import handles
from jaxmerge.files.disk import sync

from ..log import UserError

PathLike = str | os.PathLike[str]


class Busy(UserError):
    """Another process is at this run."""


@contextlib.contextmanager
def named(path: PathLike) -> Iterator[None]:
    """Have an error of writing name the file: the kernel knows its number alone."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error
        raise


def read_bytes(path: PathLike) -> bytes:
    """Read a plain file whole.

    Raises:
      UserError: there is none of that name, it is a pipe, a device or a folder, or it cannot be read.
    """
    if not os.path.exists(path):
        raise UserError(f"{os.fspath(path)}: no such file")
    try:
        return handles.read_bytes(Path(path))
    except ValueError as error:
        raise UserError(str(error)) from error


def check_file(path: PathLike | None) -> None:
    """Raise unless a file can be written at `path` (None: there is none to write); asked before the work it is for.

    Raises:
      UserError: it is a folder, a link or another thing that is no plain file, its name is too long, or its folder
        cannot be written.
    """
    if path is None:
        return
    path = Path(path)
    try:
        disk.check_name(path)
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is {'a folder' if path.is_dir() else 'no plain file'}; name a file")
        standing = next(above for above in path.absolute().parents if above.exists())
    except disk.DiskError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror}") from None
    if not os.access(standing, os.W_OK | os.X_OK):
        raise UserError(f"{path}: could not be written: {standing} is closed to you")


def check_folder(folder: Path) -> None:
    """Raise unless `folder` can be made and is nothing yet, or an empty folder; asked before the work it is for."""
    try:
        disk.check_name(folder)
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except disk.DiskError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{folder}: could not be written: {error.strerror}") from None
    if taken:
        raise UserError(f"{folder}: already there and not empty; remove it or name another folder")


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
    except BaseException as error:  # a signal among them
        with contextlib.suppress(OSError):  # the folder itself may be gone, or be a file
            scratch.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path}: could not be written: {error.strerror or error}") from error
        raise


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` when the block ends well, and vanishes otherwise.

    Raises:
      UserError: `folder` is there and not empty, or the disk is full; nothing is left behind.
    """
    check_folder(folder)
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
