"""Whether a job can be sent as it is: its config holds, its mesh fits the slice, and every file it names travels along.

    JOB='improve configs/quickstart.yaml mesh.fsdp=8'
    python -m tpu.check $JOB && sky jobs launch tpu/skypilot.yaml --env RUN=demo --env BUCKET=NAME --env JOB="$JOB"

The words are those of `jaxmerge`: improve, sft or search, a config, key=value …; `task=FILE` names another task than
tpu/skypilot.yaml. Run it where the job is sent from: that folder is what travels. Exit code 0: all is there, and what
is sent is listed; 2: a mistake of yours, each named with its key, its path and the way out. Nothing is sent from here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.improve.settings import Improve
from train.learn.settings import Finetune
from train.log import UserError, say
from train.resolve import build, override, read_yaml
from train.search.settings import SearchRun

from . import machines
from .files import Named, named, place_of

CONFIGS: dict[str, type] = {"improve": Improve, "sft": Finetune, "search": SearchRun}
GIVEN = ("out", "distributed.auto", "distributed.coordinator", "distributed.processes", "distributed.process_id")
"""Keys of the job that tpu/run.sh gives."""


class Task(NamedTuple):
    """What of a SkyPilot task decides whether a job can be sent with it.

    Attributes:
      slice: the chips and hosts of `resources.accelerators`; None where that is no TPU.
      runtime: `resources.accelerator_args.runtime_version`, empty where it says none.
      mounts: folders of the machine that come from a bucket.
      packages: requirements of `envs.PACKAGES`.
    """

    slice: machines.Slice | None
    runtime: str
    mounts: tuple[str, ...]
    packages: tuple[str, ...]


def read_task(path: Path) -> Task:
    values = read_yaml(path)
    resources = values.get("resources") or {}
    accelerator = resources.get("accelerators")
    if not isinstance(accelerator, str):
        raise UserError(f"{path}: resources.accelerators is {accelerator!r}; one is wanted, such as tpu-v6e-8")
    tpu = accelerator.startswith("tpu-")
    found = machines.read(accelerator.removeprefix("tpu-").removesuffix(":1")) if tpu else None
    runtime = (resources.get("accelerator_args") or {}).get("runtime_version") or ""
    packages = str((values.get("envs") or {}).get("PACKAGES") or "").split()
    return Task(found, str(runtime), tuple(values.get("file_mounts") or {}), tuple(packages))


def check(words: Sequence[str], root: Path) -> list[str]:
    """Refuse a job that would fail for want of a file, or by its settings; else a line for all that is sent.

    Args:
      words: verb, config, key=value ….
      root: the folder that travels, and in which the job runs.

    Raises:
      UserError: a wrong word, or all that is wrong with the files, a line each.
    """
    if len(words) < 2 or words[0] not in CONFIGS:
        known = ", ".join(CONFIGS)
        raise UserError(f"{' '.join(words[:1]) or 'nothing'}: a verb ({known}) and a config are wanted, as in JOB")
    verb, config, *assignments = words
    tasks = [word.removeprefix("task=") for word in assignments if word.startswith("task=")]
    assignments = [word for word in assignments if not word.startswith("task=")]
    for key in (word.partition("=")[0] for word in assignments):
        if key in GIVEN:
            raise UserError(f"{key}: tpu/run.sh gives this key itself; leave it out")
    if not (root / "pyproject.toml").is_file():
        raise UserError(f"{root} holds no pyproject.toml; run this in the checkout, which is what travels")
    task = read_task(root / (tasks[-1] if tasks else "tpu/skypilot.yaml"))
    values = override(read_yaml(root / config), assignments)
    if "sweep" in values:
        raise UserError(f"{config}: a sweep writes its rows beside the run's folder, where they would be lost")
    settings = build(CONFIGS[verb], values)
    check_slice(task, values)
    lines, wrong = [], []
    for name in (Named("the config", "file", config), *named(settings, root)):
        try:
            lines.append(f"{name.key}={name.path}: {place_of(name, root, task.mounts, task.packages)}")
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(wrong))
    return lines


def check_slice(task: Task, config: Mapping[str, Any]) -> None:
    """Refuse a mesh that the slice cannot hold, or that leaves chips of several hosts idle; a chip is a device."""
    machine = task.slice
    if machine is None:
        return
    if task.runtime != machine.generation.runtime:
        raise UserError(
            f"resources.accelerator_args.runtime_version is {task.runtime!r}; tpu-{machine.accelerator} wants "
            f"{machine.generation.runtime}"
        )
    mesh = config.get("mesh") or {}
    wanted = math.prod(mesh.get(axis) or 1 for axis in ("data", "fsdp", "tensor", "expert"))
    if wanted > machine.chips or (machine.hosts > 1 and wanted != machine.chips):
        raise UserError(
            f"the mesh has {wanted} device{'s' if wanted > 1 else ''} and tpu-{machine.accelerator} has "
            f"{machine.chips} chips on {machine.hosts} host{'s' if machine.hosts > 1 else ''}; give "
            f"mesh.fsdp={machine.chips}, or another accelerator in the task"
        )


def main(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0 if words else 2
    try:
        lines = check(words, Path.cwd())
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    for line in lines:
        say(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
