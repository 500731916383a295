"""A `gcloud storage` for tests: buckets are folders below ROOT/buckets.

Installed as ROOT/bin/gcloud by fake_worker.py. What starts slowly is imported where it is used: a run calls this often.
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).absolute().parent.parent


def fail(message, code=1):
    print(f"ERROR: {message}", file=sys.stderr)
    sys.exit(code)


def local(address):
    return ROOT / "buckets" / address.removeprefix("gs://") if address.startswith("gs://") else pathlib.Path(address)


def write_whole(path, data):
    """Write as a bucket does: an object is there whole or not at all, also if this process is killed in between."""
    partial = ROOT / "uploads" / f"{os.getpid()}-{path.name}"
    partial.parent.mkdir(exist_ok=True)
    partial.write_bytes(data)
    partial.rename(path)


def cat(paths, flags):
    if not local(paths[0]).is_file():
        fail("The following URLs matched no objects or files: " + paths[0])
    sys.stdout.write(local(paths[0]).read_text())


def cp(paths, flags):
    source, to = map(local, paths)
    if (ROOT / "refuse-uploads").exists() and paths[1].startswith("gs://"):
        fail("HTTPError 503: the bucket is away")
    if not source.is_file():
        fail("The following URLs matched no objects or files: " + paths[0])
    to.parent.mkdir(parents=True, exist_ok=True)
    write_whole(to, source.read_bytes())


def rsync(paths, flags):
    source, to = map(local, paths)
    to.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if not ("--no-clobber" in flags and (to / path.name).exists()):
            write_whole(to / path.name, path.read_bytes())
    if "--delete-unmatched-destination-objects" in flags:
        for path in to.iterdir():
            if not (source / path.name).exists():
                path.unlink()


def buckets(paths, flags):
    """`buckets describe … --format=value(hierarchicalNamespace.enabled)`."""
    if paths[0] != "describe" or "--raw" not in flags:
        fail(f"unrecognized arguments: {paths}", 2)
    print("True" if (local(paths[1]) / ".hierarchical").exists() else "")


def main(words):
    flags = [word for word in words if word.startswith("--")]
    plain = [word for word in words if not word.startswith("--")]
    verbs = {"cat": cat, "cp": cp, "rsync": rsync, "buckets": buckets}
    if plain[:1] != ["storage"] or plain[1] not in verbs:
        fail(f"unrecognized arguments: {words}", 2)
    verbs[plain[1]](plain[2:], flags)


if __name__ == "__main__":
    main(sys.argv[1:])
