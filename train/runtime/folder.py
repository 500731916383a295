"""The folder of a run: the config it was begun with, and what made a result."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import yaml

from jaxmerge.draw import MASKS

from ..log import UserError
from ..resolve import FINISH_WITH, build, read_date, to_dict
from .disk import write_durably

PLACEMENT = ("mesh", "distributed")
"""Keys that say where a run is computed, not what: a run goes on on another mesh, or with more processes."""


def content(config: Any) -> dict[str, Any]:
    """What a config says of the result: plain data, without `PLACEMENT`.

    A key that came later (`FINISH_WITH`) is left out at its default, so that what was said before it says the same.
    """
    values = {key: value for key, value in to_dict(config).items() if key not in PLACEMENT}
    for (*parents, last), default, _ in later_keys(type(config)):
        inner = functools.reduce(lambda values, key: values[key], parents, values)
        if inner[last] == default:
            del inner[last]
    return values


def later_keys(cls: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """Path, default as plain data and commit of every key that came after runs had been begun; see `FINISH_WITH`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if FINISH_WITH in field.metadata:
            yield (*path, field.name), to_dict(field.default), field.metadata[FINISH_WITH]
        elif isinstance(hints[field.name], type) and dataclasses.is_dataclass(hints[field.name]):
            yield from later_keys(hints[field.name], (*path, field.name))


def check_resumable(folder: Path, config: Any) -> None:
    """Refuse to finish a run that was begun when this version's results were others."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    begun = yaml.safe_load(path.read_text())
    for (*parents, last), _, commit in later_keys(type(config)):
        inner = functools.reduce(lambda values, key: values.get(key, {}), parents, begun)
        if last not in inner:
            raise UserError(
                f"{folder}: this run was begun before there was {'.'.join([*parents, last])}, and this version would "
                f"go on with other numbers; finish it with commit {commit}, or begin it anew with out=DIR"
            )


def write_config(folder: Path, config: Any) -> None:
    """Keep the resolved config; which process this is, is none of its business."""
    values = {key: value for key, value in to_dict(config).items() if key != "distributed"}
    write_durably(folder / "config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def check_same_config(folder: Path, config: Any) -> None:
    """Refuse to mix two runs in one folder."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    theirs = yaml.safe_load(path.read_text())
    there = {key: value for key, value in theirs.items() if key not in PLACEMENT} if isinstance(theirs, dict) else {}
    with contextlib.suppress(UserError):  # a key that is gone is a difference, too
        there = content(build(type(config), there))
    changed = differences(content(config), there)
    if changed:
        raise UserError(
            f"{folder} holds a run of another config ({'; '.join(changed)}); choose another folder with out=DIR"
        )


def keep_date(folder: Path) -> str:
    """The date a run tells chat templates that ask for today's, as 2026-01-31: that of its first start, kept there."""
    path = folder / "date.txt"
    if not path.exists():
        write_durably(path, f"{datetime.date.today().isoformat()}\n")
    return read_date(path.read_text().strip(), str(path)).isoformat()


def fingerprint(config: Any) -> str:
    """8 hex digits of the resolved config: two runs of one name share a folder only if they are the same."""
    text = json.dumps(to_dict(config), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: theirs → ours` for every leaf at which two resolved configs differ."""
    lines = []
    for key in sorted({*ours, *theirs}):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
            if list(a) != list(b) and set(a) == set(b):  # the first pattern that matches wins
                lines.append(f"{prefix}{key}: order {list(b)} → {list(a)}")
        elif a != b:
            lines.append(f"{prefix}{key}: {b!r} → {a!r}")
    return lines


PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tensorflow-datasets", "numpy")


def provenance(command: str, devices: int) -> dict[str, Any]:
    """What made a result: versions, device, command, commit."""
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version(), "masks": MASKS} | versions(PACKAGES),
        "device": f"{device.platform} × {devices} ({device.device_kind})",
        "command": command,
        "commit": commit(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str | None:
    """The checkout's commit, or None where there is no checkout, or no git."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        result = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
