"""The files that a config names, and whether each is among what travels to the machine: `tpu.check` asks both.

What travels is the folder the job is sent from, as SkyPilot sends it: every file in it, committed or not, that
`.skyignore` does not name; without a `.skyignore`, that git does not ignore. Symbolic links stay behind.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxmerge.files.checkpoints.hub import is_hub_name
from train.data import hub
from train.improve.settings import BLOCKS, Improve
from train.log import UserError
from train.models.open import PACKAGES
from train.resolve import build, read_yaml
from train.tasks.settings import Tasks

from .sent import ignored

Kind = Literal["file", "model", "config", "args"]

PATHS: dict[str, dict[str, Kind]] = {
    "Data": {"path": "file", "chat_template": "file", "exclude": "config"},
    "EmulatedFineTuning": {"tuned": "model", "small": "model"},
    "FamilySpec": {"args": "args"},
    "Ingredient": {"args": "args"},
    "Merge": {"reference": "model"},
    "Part": {"path": "file"},
    "ProxyTuning": {"expert": "model", "antiexpert": "model"},
    "Questions": {"path": "file"},
    "SearchRun": {"prompts": "file"},
    "Source": {"path": "model"},
    "UniR": {"reasoners": "model"},
}
"""Settings' class → its fields that name a file or folder. file: a file or folder of this machine. model: that, or a
package's file or a hub name; a list is of several. config: an improve config, of which the tasks are read. args: a map
in which `path` is a file. A test holds this against every class: a new text field is put here or into the test's list
of others."""


class Named(NamedTuple):
    """One file that a config names.

    Attributes:
      key: where, as a person finds it: `data.parts[1].path`.
      path: as it is written there, relative to the folder the job runs in.
    """

    key: str
    kind: Kind
    path: str


def named(settings: Any, root: Path, where: str = "") -> Iterator[Named]:
    """Every file that `settings`, a dataclass, names, and those that the configs among them name."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        key = f"{where}.{field.name}" if where else field.name
        kind = PATHS.get(type(settings).__name__, {}).get(field.name)
        if kind == "args":
            if value.get("path"):
                yield Named(f"{key}.path", "file", str(value["path"]))
        elif kind and isinstance(value, tuple):
            yield from (Named(f"{key}[{number}]", kind, path) for number, path in enumerate(value))
        elif kind and value and (field.name, value) != ("reference", "anchor"):
            yield Named(key, kind, value)
            if kind == "config" and (root / value).is_file():
                tasks = build(Tasks, read_yaml(root / value).get("tasks"), f"{value}: tasks")
                yield from named(tasks, root, f"{key}={value}: tasks")
        yield from inside(value, root, key)
    if isinstance(settings, Improve):
        for method, own in settings.methods.items():
            for block in BLOCKS:
                if getattr(own, block):
                    yield from named(settings.block(method, block), root, f"methods.{method}.{block}")


def inside(value: Any, root: Path, key: str) -> Iterator[Named]:
    """The files named by the dataclasses in a field's value."""
    if dataclasses.is_dataclass(value):
        yield from named(value, root, key)
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from inside(entry, root, f"{key}.{name}")
    elif isinstance(value, (tuple, list)):
        for number, entry in enumerate(value):
            yield from inside(entry, root, f"{key}[{number}]")


def place_of(name: Named, root: Path, mounts: Sequence[str] = (), packages: Sequence[str] = ()) -> str:
    """Where the machine has a named file from, in words.

    Args:
      mounts: folders of the machine that come from a bucket.
      packages: requirements that the task installs.

    Raises:
      UserError: it would not be there.
    """
    path, at = Path(name.path).expanduser(), f"{name.key} is {name.path!r}"
    if any(path.is_relative_to(mount) for mount in mounts):
        return "from the bucket that is mounted there; not looked at"
    bucket = f", or put it into the bucket and give {mounts[0]}/…" if mounts else ""
    if name.kind == "file" and hub.is_hub(name.path):
        hub.parse(name.path)
        return "from the hub"
    if "://" in name.path:
        raise UserError(f"{at}: jaxmerge reads files, not addresses; copy it into {root}{bucket}")
    if name.kind == "model" and name.path.startswith("package:"):
        return installed_by(name.path.removeprefix("package:").partition("/")[0], at, packages)
    here = root / path
    if not here.exists() and not here.is_symlink():
        if name.kind == "model" and is_hub_name(name.path):
            return "from the hub"
        raise UserError(f"{at}: no such file or folder in {root}; jobs are sent from the folder their paths begin in")
    plain = Path(os.path.normpath(here))
    if not plain.is_relative_to(root):
        raise UserError(f"{at}: it is outside {root}, which is what travels; copy it there{bucket}")
    if path.is_absolute() or name.path.startswith("~"):
        raise UserError(f"{at}: the folder is another one on the machine; give {plain.relative_to(root)}")
    files = sorted(p for p in plain.rglob("*") if p.is_symlink() or not p.is_dir()) if plain.is_dir() else [plain]
    check_travels(at, files, root, bucket)
    return f"travels, {len(files)} file{'s' if len(files) != 1 else ''}, {sum(p.stat().st_size for p in files):,} bytes"


def installed_by(package: str, at: str, requirements: Sequence[str]) -> str:
    """A requirement that brings an importable package, by the names of what is installed here or by its own name."""
    names = {*packages_distributions().get(package, ()), package}
    wanted = {re.sub("[-_.]+", "-", name).lower() for name in names}
    for requirement in requirements:
        if re.sub("[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower() in wanted:
            return f"from {requirement}, which the task installs"
    command = PACKAGES.get(package, f"the package that provides {package}").removeprefix("--no-deps ")
    raise UserError(f"{at}: the task does not install it; add it to PACKAGES in the task ({command})")


def check_travels(at: str, files: Sequence[Path], root: Path, bucket: str) -> None:
    """Refuse files that stay behind: links, and what is ignored."""
    if not files:
        raise UserError(f"{at}: the folder is empty, and an empty folder does not travel")
    for file in files:
        link = next((p for p in (file, *file.parents) if p.is_relative_to(root) and p != root and p.is_symlink()), None)
        if link:
            raise UserError(
                f"{at}: {link.relative_to(root)} is a symbolic link, and links do not travel; put the file itself there"
                f"{bucket}"
            )
    if left := ignored(files, root):
        by, where = (".skyignore", ".skyignore") if (root / ".skyignore").exists() else ("git", ".gitignore")
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UserError(
            f"{at}: {left[0].relative_to(root)}{more} does not travel, because {by} ignores it; move it to a folder "
            f"that {where} does not name{bucket}"
        )
