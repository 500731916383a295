"""What a run left in its folder, as its page needs it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

from ..log import UserError
from ..resolve import read_yaml
from ..runtime.jsonl import Row, read_jsonl
from .style import Look, looks


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder holds, read once."""

    folder: pathlib.Path
    name: str
    finished: bool
    rows: list[dict[str, Any]]  # one a (method, round, domain, family, split)
    phases: list[dict[str, Any]]  # metrics.jsonl
    summary: dict[str, Any]
    config: str  # the text of config.yaml
    settings: dict[str, Any]  # what it says

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the phases of one kind, in the order in which they were committed."""
        return [phase for phase in self.phases if phase.get("kind") == kind]

    @functools.cached_property
    def methods(self) -> list[str]:
        """The methods in the order of the config, so that none changes its colour while a run goes on."""
        planned = self.settings.get("methods")
        named = [str(name) for name in planned] if isinstance(planned, dict) else []
        named += [row["method"] for row in self.rows if row["method"] != "base"]
        named += [owner for phase in self.phases if "method" in phase for owner in owners(phase) if owner != "base"]
        return list(dict.fromkeys(named))

    @functools.cached_property
    def looks(self) -> dict[str, Look]:
        """How each method is drawn, everywhere on the page."""
        swept = {row["method"] for row in self.rows if row.get("coefficient") is not None}
        swept |= {name for name in self.methods if self.setting("methods", name, "probe", "kind") == "line"}
        return looks(self.methods, swept)

    def setting(self, *path: str) -> Any:
        """What the config says under a path of keys; None where it says nothing."""
        found: Any = self.settings
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found


def owners(phase: Row) -> list[str]:
    """List the methods that a phase was done for."""
    return [str(phase.get("method", "all")), *map(str, phase.get("shared_by") or ())]


def read_run(run_dir: str | os.PathLike[str]) -> Run:
    """Read a run folder, finished or not.

    Raises:
      UserError: the folder is missing, holds nothing of a run, or a file in it is damaged.
    """
    folder = pathlib.Path(run_dir)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; expected the folder that `jaxmerge improve` printed last")
    if not any((folder / name).exists() for name in ("summary.json", "metrics.jsonl", "config.yaml")):
        raise UserError(
            f"{folder}: holds none of config.yaml, metrics.jsonl, summary.json; expected a run folder,"
            " which `jaxmerge improve CONFIG out=DIR` writes"
        )
    phases = read_jsonl(folder / "metrics.jsonl", torn="drop")
    summary: dict[str, Any] = {}
    if (folder / "summary.json").exists():
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{folder / 'summary.json'}: expected JSON, found a damaged file ({error});"
                " remove it to report from metrics.jsonl alone"
            ) from error
    rows = summary.get("rows") or [r for p in phases if p.get("kind") == "evaluate" for r in p.get("rows", ())]
    config = folder / "config.yaml"
    return Run(
        folder=folder,
        name=str(summary.get("name") or folder.resolve().name),
        finished=bool(summary.get("finished", False)),
        rows=[dict(row) for row in rows],
        phases=phases,
        summary=summary,
        config=config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
        settings=read_yaml(config) if config.exists() else {},
    )
