"""Files and folders written whole or not at all: the free space, the lock on a folder being made, fsync."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class DiskError(ValueError):
    """A folder cannot be written: its name is taken, or there is no room for it."""


LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of Linux and its file systems
SPARE_NAME, SPARE_PATH = len("..partial-12345678"), 500  # of the temporary name beside it, and of what lies below


def check_name(out: pathlib.Path) -> None:
    """Raise unless a file or folder can be given the name `out` in the end: asked before any work is done."""
    if out.name in ("", ".."):
        raise DiskError(f"{str(out)!r} names no new file or folder; give one a name")
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in out.parts[:-1]):
        raise DiskError(f"{str(out)[:60]}…: a folder in it has a name of more than {LONGEST_NAME} bytes")
    if (length := len(os.fsencode(out.name))) > LONGEST_NAME - SPARE_NAME:
        raise DiskError(
            f"{out.name[:60]}…: a name of {length} bytes; at most {LONGEST_NAME - SPARE_NAME}, since it is first "
            "written under a longer one"
        )
    if (length := len(os.fsencode(out.absolute()))) > LONGEST_PATH - SPARE_PATH:
        raise DiskError(f"{str(out)[:60]}…: a path of {length} bytes; at most {LONGEST_PATH - SPARE_PATH}")
    if out.is_symlink():
        raise DiskError(f"{out} is a link to {os.readlink(out)}; give what it stands for, or another name")
    standing = next(above for above in out.absolute().parents if above.exists())
    if not standing.is_dir():
        raise DiskError(f"{out}: {standing} is no folder; choose another output folder")


def check_free(out: pathlib.Path) -> None:
    """Raise unless `out` can be made and is a name that nothing, or an empty folder, has."""
    check_name(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DiskError(f"{out} exists already; give another output folder, or remove it")


@contextmanager
def new_folder(out: pathlib.Path, wanted_bytes: int = 0) -> Iterator[pathlib.Path]:
    """Yield a temporary folder beside `out` that becomes `out` when the block ends well, else goes away.

    A process that is killed leaves its temporary folder behind; the next to write the same `out` removes it. The lock
    on the folder itself, which ends with its process, tells those of the dead from those being written.
    """
    check_free(out)
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f".{glob.escape(out.name)}.partial-*"):
            # Another process may have removed it meanwhile, and another user's is not ours to remove.
            with suppress(FileNotFoundError, PermissionError), _locked(left) as held:
                if held:
                    shutil.rmtree(left)
        free = shutil.disk_usage(parent).free
        if free < wanted_bytes:
            raise DiskError(
                f"no space left for {out}: it needs {wanted_bytes / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB free"
            )
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=parent))
    except OSError as error:
        raise DiskError(f"cannot write {out}: {error.strerror}; choose another output folder") from None
    with _locked(partial):  # until it has its name or is gone
        try:
            yield partial
            partial.chmod(0o755)
            sync_all(partial)
            if out.exists():
                out.rmdir()
            partial.rename(out)
            sync(parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DiskError(f"no space left while writing {out}; nothing was kept") from None
            raise
        finally:
            if partial.exists():
                shutil.rmtree(partial)


@contextmanager
def new_file(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary name beside `out`; the file written there becomes `out` when the block ends well."""
    check_name(out)
    if out.exists():
        raise DiskError(f"{out} exists already; give another name, or remove it")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync(partial)
        partial.rename(out)
        sync(out.parent)
    except OSError as error:
        why = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else error.strerror
        raise DiskError(f"cannot write {out}: {why}; nothing was kept") from None
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _locked(folder: pathlib.Path) -> Iterator[bool]:
    """Hold the lock of a folder, if it is free and its file system has locks; yield whether it is held."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def sync_all(folder: pathlib.Path) -> None:
    """Flush a folder to disk with all that is below it: files before the folder that names them."""
    for place, _, files in os.walk(folder, topdown=False):
        for path in (*(pathlib.Path(place, file) for file in files), pathlib.Path(place)):
            sync(path)


def sync(path: pathlib.Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
