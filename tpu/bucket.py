"""What stands in the bucket beside the run: code, config, settings; shipped once, and read from any computer.

runs/RUN/launch.json     the settings, the code's name, the config's digest: the run exists once this does
runs/RUN/code-ID.tar.gz  what is run, of the first start; ID is a commit's or a tarball's digest
runs/RUN/CONFIG.yaml     as it was at the first start
runs/RUN/job.env         what the scripts on the workers read
runs/RUN/state/ or run/  the run folder: snapshots of one host's disk, or what several hosts mount
runs/RUN/logs/           what the job printed, a file a start and host
compile-cache/           JAX's, for all runs
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.log import UserError
from train.resolve import build, override, to_dict

from . import commands, queue
from .settings import Launch, is_placement
from .shell import Failed, Shell, absent

PLACE = ("project", "zone", "accelerator", "capacity", "vm")  # another machine if one of these changes


def ensure_bucket(launch: Launch, shell: Shell) -> None:
    """Make the bucket if it is not there; refuse one that several hosts cannot keep a run folder in."""
    result = shell.run(commands.describe_bucket(launch))
    if result.code and absent(result.error):
        shell.say(f"{launch.bucket} is not there: making it, with a hierarchical namespace")
        shell.need(commands.create_bucket(launch))
        return
    if result.code:
        raise UserError(f"{launch.bucket} cannot be read: {' '.join(result.error.split())[-400:]}")
    data = json.loads(result.out)
    data = data[0] if isinstance(data, list) else data
    if launch.mounted and not launch.shared and not (data.get("hierarchicalNamespace") or {}).get("enabled"):
        raise UserError(
            f"{launch.bucket} has no hierarchical namespace, without which a folder is not renamed whole, and "
            f"{launch.accelerator} has {launch.slice.hosts} hosts that share a run folder; name a bucket that does not "
            "exist yet (it is made right), or give shared=HOST:/EXPORT"
        )


def ship(launch: Launch, shell: Shell) -> str:
    """Put code, config and settings where the workers find them; the code's name.

    A run's code and config are those of its first start. A later one with another config is refused; one with other
    code is told so and goes on with the old, since the same weights need the same code.
    """
    before = read_record(launch.remote, shell)
    name, commit = identify(launch.code, shell)
    digest = hashlib.sha256(Path(launch.job.config).read_bytes()).hexdigest()
    if before is None:
        upload_code(launch, name, commit, shell)
        shell.need(commands.copy(launch.job.config, f"{launch.remote}/{commands.config_name(launch)}"))
    else:
        theirs = build(Launch, before["launch"])
        if (digest, identity(launch)) != (before["config_sha256"], identity(theirs)):
            raise UserError(
                f"{launch.remote} holds a run of another config, verb or other set. keys; give another run=, or go on "
                f"with it: python -m tpu.launch resume {launch.run} bucket={launch.bucket}"
            )
        if before["code"] != name:
            shell.say(f"{launch.run} goes on with the code of its first start, {before['code']}, not with {name}")
        name = before["code"]
        move(theirs, launch, shell)
    write_record(launch, name, digest, shell)
    return name


def identity(launch: Launch) -> tuple[str, ...]:
    """What of a job may not change over the starts of a run."""
    return (launch.job.verb, *(a for a in launch.job.assignments if not is_placement(a)))


def read_record(remote: str, shell: Shell) -> dict[str, Any] | None:
    """launch.json of a run, None if there is none."""
    result = shell.run(commands.read(f"{remote}/launch.json"))
    if result.code == 0:
        return json.loads(result.out)
    if absent(result.error):
        return None
    raise Failed(commands.read(f"{remote}/launch.json"), result)


def write_record(launch: Launch, code: str, digest: str, shell: Shell) -> None:
    """job.env, and launch.json last: it says that the rest is there. Secrets stand in both by their names alone."""
    text = json.dumps({"launch": to_dict(launch), "code": code, "config_sha256": digest}, indent=1) + "\n"
    shell.need(commands.copy("-", f"{launch.remote}/job.env"), given=commands.job_env(launch))
    shell.need(commands.copy("-", f"{launch.remote}/launch.json"), given=text)


def recall(name: str, words: Sequence[str], shell: Shell, *, only: bool = True) -> tuple[Launch, str]:
    """The settings a run was last started with, and its code's name.

    Args:
      only: no key but `bucket` is taken, since nothing would come of it. A dry run, which cannot read, takes all.
    """
    given = override({}, words)
    bucket = given.get("bucket")
    other = [key for key in given if key != "bucket"]
    if only and other and not shell.dry:
        raise UserError(
            f"{other[0]} is the run's own setting and read from the bucket; leave it out, or resume with it"
        )
    if not isinstance(bucket, str):
        raise UserError(f"bucket is missing: the run {name} is looked up in bucket=gs://NAME")
    found = read_record(f"{bucket}/runs/{name}", shell)
    if shell.dry:  # nothing was read
        place = {"project": "project", "zone": "zone", "accelerator": "v6e-8"}
        values = override(place | {"run": name, "job": {"config": "CONFIG.yaml"}}, words)
        return build(Launch, values), "CODE.tar.gz"
    if found is None:
        raise UserError(f"{bucket} holds no run {name}; start it: python -m tpu.launch run CONFIG run={name} …")
    return build(Launch, found["launch"]), found["code"]


def reset(launch: Launch, words: Sequence[str], shell: Shell) -> Launch:
    """A recalled run with other settings: those that say where and how patiently, not those that say what."""
    placed = tuple(w.removeprefix("set.") for w in words if w.startswith("set.") and is_placement(w[4:]))
    words = [w for w in words if w.removeprefix("set.") not in placed]
    fixed = [key for key in ("run", "job", "code", "set", "settings") if key in override({}, words)]
    if fixed:
        raise UserError(f"{fixed[0]} belongs to the run {launch.run} since its first start; leave it out")
    values = override(to_dict(launch), words)
    new = {a.partition("=")[0] for a in placed}
    kept = [a for a in launch.job.assignments if a.partition("=")[0] not in new]
    values["job"]["assignments"] = [*kept, *placed]
    after = build(Launch, values)
    if after == launch or shell.dry:
        return after
    before = read_record(launch.remote, shell)
    if before is None:
        raise UserError(f"{launch.remote}/launch.json is gone")
    move(launch, after, shell)
    write_record(after, before["code"], before["config_sha256"], shell)
    return after


def move(before: Launch, after: Launch, shell: Shell) -> None:
    """Take a run off the machine it had, if the new settings want another; two would write one run folder."""
    if (before.mounted, before.shared) != (after.mounted, after.shared):
        raise UserError(
            f"the run folder of {after.run} is {place(before)}, with the new settings it would be {place(after)}; keep "
            "shared= and the kind of slice (one host, several hosts), or start another run with run="
        )
    if before.slice != after.slice:
        shell.say(
            f"from {before.accelerator} to {after.accelerator}: the run goes on, but another number of devices adds in "
            "another order, so its weights are not bit for bit those of an undisturbed run"
        )
    if all(getattr(before, key) == getattr(after, key) for key in PLACE):
        return
    if queue.state(before, shell).name != queue.ABSENT:
        shell.say(f"deleting the machine in {before.zone}: the new settings want another")
        queue.remove(before, shell)


def place(launch: Launch) -> str:
    if launch.shared:
        return f"on {launch.shared}"
    return "on the mounted bucket" if launch.mounted else "on one host's disk, with snapshots in the bucket"


def identify(code: str, shell: Shell) -> tuple[str, str]:
    """The name the code has in the bucket, and its commit if it is a git ref's: of that, or of a tarball's digest."""
    if code.endswith((".tar.gz", ".tgz")):
        path = Path(code)
        if not path.is_file():
            raise UserError(f"code is {code!r}: no such file")
        with tarfile.open(path) as archive:
            if not {"pyproject.toml", "./pyproject.toml"} & set(archive.getnames()):
                raise UserError(f"{code}: no pyproject.toml at its root; make it with git archive or tar -C CHECKOUT .")
        return f"code-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}.tar.gz", ""
    commit = git("rev-parse", "--verify", "--quiet", f"{code}^{{commit}}", wrong=f"code is {code!r}: no such git ref")
    changed = git("status", "--porcelain", "--untracked-files=no")
    if changed and code == "HEAD":
        count = len(changed.splitlines())
        shell.say(f"not shipped: uncommitted changes in {count} files; commit them, or give code=FILE.tar.gz")
    return f"code-{commit[:12]}.tar.gz", commit


def upload_code(launch: Launch, name: str, commit: str, shell: Shell) -> None:
    """A git ref travels as an archive too: the workers need no access to a repository."""
    if not commit:
        shell.need(commands.copy(launch.code, f"{launch.remote}/{name}"))
        return
    with tempfile.TemporaryDirectory(prefix="jaxmerge-") as folder:
        path = name if shell.dry else f"{folder}/{name}"
        shell.need(["git", "-C", str(CHECKOUT), "archive", "--format=tar.gz", f"--output={path}", commit], tries=1)
        shell.need(commands.copy(path, f"{launch.remote}/{name}"))


CHECKOUT = Path(__file__).parent.parent


def git(*words: str, wrong: str = "") -> str:
    """What git says of this checkout; it only looks, so it is asked in a dry run too."""
    done = subprocess.run(["git", "-C", str(CHECKOUT), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(wrong or f"git {words[0]}: {done.stderr.strip()}; give code=FILE.tar.gz instead of a git ref")
    return done.stdout.strip()
