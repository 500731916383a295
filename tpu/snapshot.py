"""A run folder in a bucket, whole or not at all.

    python -m tpu.snapshot keep FOLDER gs://… -- COMMAND    restore, run COMMAND, save every minute and at its end
    python -m tpu.snapshot save FOLDER gs://…
    python -m tpu.snapshot restore gs://… FOLDER

`keep` ends with COMMAND's exit code, or with 74 where what COMMAND left could not be saved.

In the bucket:

    objects/<sha256>   contents of files, written once and never changed
    manifest.json      path → sha256 of every file of the snapshot; replacing it is the commit

A machine may go away at any moment. `gcloud storage rsync` of a folder would then leave a mixture of two moments,
such as a phase that is committed and weights that are not there; here the manifest of the last whole upload stands,
and only contents that neither the old nor the new manifest names are ever deleted.

A snapshot is what a kill at that moment would have left on the disk, so resuming from it is resuming from a kill,
which the run folder is made for. Standard library alone: the machine runs this around the job.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

LINKED = "checkpoints/"  # large, and never changed once there; everything else may be appended to, and is copied
TRIES = 5  # of catching a folder while the job renames in it
OBJECTS, MANIFEST = "objects", "manifest.json"
NOT_SAVED = 74  # EX_IOERR of sysexits.h


class Failed(Exception):
    """A snapshot that was not taken or not brought back; the one before stands."""


def keep(folder: Path, remote: str, work: Path, command: Sequence[str], *, every: float = 60, retry: float = 10) -> int:
    """Run `command` on `folder`: what the bucket holds is there first, and what the command leaves is saved.

    A SIGTERM or SIGINT is handed on to the command, which may still save its state; no signal reaches it twice.

    Args:
      work: as for `save`.
      every: seconds between two snapshots while the command runs.
      retry: seconds before the second try to save the end; later ones wait longer.

    Raises:
      Failed: the folder is kept already, by another process of this machine; or what the bucket holds is damaged.

    Returns:
      The command's exit code, 128 + n if signal n killed it; `NOT_SAVED` if the bucket did not take its end.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failed(f"{folder} is kept by another process already; see to that one, or end it first") from None
        restore(remote, folder, work)
        with started(command) as child:
            while (code := wait(child, every)) is None:
                try:
                    save(folder, remote, work)
                except Failed as error:
                    say(f"{error}; the snapshot before stands")
            say(f"the command ended with {code}")
            for attempt in range(4):
                time.sleep(attempt * retry)
                try:
                    save(folder, remote, work)
                    return code if code >= 0 else 128 - code
                except Failed as error:
                    say(f"{error}; try {attempt + 1} of 4 to save the end")
        return NOT_SAVED


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen]:
    """The command's process; signals go to it alone, and to nobody once it has ended."""
    child = subprocess.Popen(command, start_new_session=True)  # a Ctrl-C comes here, and is handed on once
    asked = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: child.send_signal(number)) for number in asked]
    try:
        yield child
    finally:
        for number, handler in zip(asked, before, strict=True):
            signal.signal(number, handler)


def wait(child: subprocess.Popen, seconds: float) -> int | None:
    """The child's exit code, or None if it still runs after so many seconds."""
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def say(line: str) -> None:
    print(f"snapshot: {line}", file=sys.stderr, flush=True)


def save(folder: Path, remote: str, work: Path) -> bool:
    """Upload what `folder` holds now as the newest snapshot at `remote`; False if it is the newest already.

    Args:
      work: a folder on the same file system, kept between calls: staged contents and their digests.
    """
    work.mkdir(parents=True, exist_ok=True)
    stage = work / OBJECTS
    manifest = catch(folder, stage, work / "digests.json") if folder.exists() else {}
    text = json.dumps(manifest, indent=1, sort_keys=True)
    committed = work / "committed.json"
    if committed.exists() and committed.read_text() == text:
        return False
    if not manifest:
        return False
    gcloud("rsync", str(stage), f"{remote}/{OBJECTS}", "--recursive", "--no-clobber")
    (work / MANIFEST).write_text(text)
    gcloud("cp", str(work / MANIFEST), f"{remote}/{MANIFEST}")
    (work / MANIFEST).replace(committed)
    gcloud("rsync", str(stage), f"{remote}/{OBJECTS}", "--recursive", "--delete-unmatched-destination-objects")
    return True


def restore(remote: str, folder: Path, work: Path) -> int:
    """Make `folder` what the newest snapshot at `remote` says; how many files, 0 if there is none.

    Files that a snapshot does not name are left alone where `folder` already has some: the job may have come
    further on this machine than the bucket knows, and then the folder is not touched at all.
    """
    if folder.exists() and any(folder.iterdir()):
        return 0
    work.mkdir(parents=True, exist_ok=True)
    answer = subprocess.run(
        ["gcloud", "storage", "cat", f"{remote}/{MANIFEST}"], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        if "matched no objects" in answer.stderr:
            return 0
        raise Failed(f"{remote}/{MANIFEST} cannot be read: {answer.stderr.strip()[-400:]}")
    manifest = json.loads(answer.stdout)
    stage = work / OBJECTS
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    gcloud("rsync", f"{remote}/{OBJECTS}", str(stage), "--recursive")
    whole = folder.with_name(folder.name + ".restoring")
    shutil.rmtree(whole, ignore_errors=True)
    for name, wanted in manifest.items():
        found = digest(stage / wanted) if (stage / wanted).is_file() else "nothing"
        if found != wanted:
            raise Failed(
                f"{name}: {remote}/{OBJECTS}/{wanted} holds {found}; "
                "the snapshot is damaged: restore an older version of the bucket's objects, or start a new run"
            )
        path = whole / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(stage / wanted, path)  # not linked: the job appends to some of these
    whole.mkdir(exist_ok=True)
    if folder.exists():
        folder.rmdir()
    whole.rename(folder)
    shutil.rmtree(stage)
    return len(manifest)


def catch(folder: Path, stage: Path, digests: Path) -> dict[str, str]:
    """Link or copy every file of a folder in use to `stage/<sha256>`; path → sha256.

    A folder that comes or goes while this looks (a phase is committed by a rename, a checkpoint appears by one) means
    starting over, so that no phase is caught without the weights it names.
    """
    for _ in range(TRIES):
        before = folders(folder)
        try:
            manifest = catch_once(folder, stage, digests)
        except FileNotFoundError:
            continue
        if folders(folder) == before:
            return manifest
    raise Failed(f"{folder} changed {TRIES} times while it was read; the next call tries again")


def catch_once(folder: Path, stage: Path, digests: Path) -> dict[str, str]:
    known: dict[str, str] = json.loads(digests.read_text()) if digests.exists() else {}
    stage.mkdir(parents=True, exist_ok=True)
    manifest, seen = {}, {}
    for path in files(folder):
        name = path.relative_to(folder).as_posix()
        temporary = stage / "catching"
        temporary.unlink(missing_ok=True)
        if not name.startswith(LINKED):
            shutil.copyfile(path, temporary)
            manifest[name] = digest(temporary)
        else:
            os.link(path, temporary)
            stat = temporary.stat()
            key = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"
            manifest[name] = known.get(key) or digest(temporary)
            seen[key] = manifest[name]
        temporary.replace(stage / manifest[name])
    wanted = set(manifest.values())
    for path in stage.iterdir():
        if path.name not in wanted:
            path.unlink()
    digests.write_text(json.dumps(seen))
    return manifest


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders and their files in path order, but for what Orbax is still writing: a kill would lose it too."""
    for root, inside, names in os.walk(folder):
        inside[:] = sorted(name for name in inside if "orbax-checkpoint-tmp" not in name)
        yield root, sorted(name for name in names if name != ".lock" and not name.endswith(".tmp"))


def folders(folder: Path) -> list[str]:
    return [root for root, _ in walk(folder)]


def files(folder: Path) -> list[Path]:
    return [Path(root, name) for root, names in walk(folder) for name in names]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def gcloud(*words: str) -> None:
    done = subprocess.run(["gcloud", "storage", *words, "--quiet"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"gcloud storage {words[0]} ended with {done.returncode}: {done.stderr[-400:]}")


def main(words: list[str]) -> int:
    try:
        match words:
            case ["keep", folder, remote, "--", *command] if command:
                path = Path(folder).absolute()
                every = float(os.environ.get("JAXMERGE_EVERY", "60"))
                return keep(path, remote, beside(path), command, every=every)
            case ["save", folder, remote]:
                path = Path(folder).absolute()
                say("saved" if save(path, remote, beside(path)) else "nothing new")
            case ["restore", remote, folder]:
                path = Path(folder).absolute()
                say(f"{restore(remote, path, beside(path))} files restored")
            case _:
                say("usage: snapshot keep FOLDER gs://… -- COMMAND | save FOLDER gs://… | restore gs://… FOLDER")
                return 2
    except Failed as error:
        say(str(error))
        return NOT_SAVED
    return 0


def beside(folder: Path) -> Path:
    """Where staged contents and their digests lie: on the folder's own file system."""
    return folder.with_name(folder.name + ".snapshot")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
