"""The report of a run: one HTML file that opens from disk, asks the network for nothing, and prints.

Reads what the run has written so far (`config.yaml`, `metrics.jsonl`, `summary.json`) and writes `report.html`
and `figures/*.svg` beside them; a run that is not finished gets a report of what is there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from . import report_pictures as pictures
from . import report_sections as sections
from .analysis.page import section_of_report
from .charts import frontier
from .figures import escape
from .log import UserError, pooled_rows, read_jsonl_tolerant
from .report_style import css
from .search import page as search_page

Row = Mapping[str, Any]


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

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the phases of one kind, in the order in which they were committed."""
        return [phase for phase in self.phases if phase.get("kind") == kind]


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
    phases = read_jsonl_tolerant(folder / "metrics.jsonl")
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
    )


def render(run: Run) -> str:
    """Write the page of a run as one string of HTML."""
    body = [
        ("result", "Result", sections.headline(run)),
        ("picture", "What was gained, what was forgotten", pictures.picture(run)),
        ("table", "Accuracy", "" if run.of_kind("search") else sections.accuracy_table(run)),
        ("paired", "Paired differences", sections.paired_table(run)),
        ("pass", "pass@k", sections.pass_table(run)),
        ("families", "By family", pictures.families(run)),
        ("samples", "Samples", sections.samples(run)),
        ("examples", "Solutions accepted and rejected", sections.examples(run)),
        ("training", "Training loss", pictures.training(run)),
        ("layers", "Weight change per layer", pictures.layers(run)),
        ("analysis", "Analysis", section_of_report(run.folder)),
        ("search", "Search", search_page.numbers(run.phases)),
        ("trees", "Trees", search_page.trees(run.folder)),
        ("time", "Time", sections.time(run)),
        ("again", "Doing it again", sections.again(run)),
    ]
    body = [part for part in body if part[2]]
    nav = " ".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in body)
    parts = [
        f'<section id="{key}" aria-labelledby="{key}-h">\n<h2 id="{key}-h">{escape(title)}</h2>\n{content}\n</section>'
        for key, title, content in body
    ]
    warning = ""
    if not run.finished:
        last = run.phases[-1].get("phase", "unnamed") if run.phases else "none yet"
        warning = (
            '<p class="warning" role="status"><strong>Unfinished run.</strong> This is what is there so far;'
            f" the last committed phase is <code>{escape(last)}</code>. Start the same command again to go on.</p>"
        )
    title = f"{run.name} · jaxmerge report"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{css()}
</style>
</head>
<body>
<header>
<h1>{escape(run.name)}</h1>
{sections.facts(run)}
<nav aria-label="Sections">{nav}</nav>
{warning}
</header>
<main>
{chr(10).join(parts)}
</main>
<footer>Written by jaxmerge from config.yaml, metrics.jsonl and summary.json in the folder of this file.</footer>
</body>
</html>
"""


def write_report(run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Write `report.html` and `figures/frontier.svg` into a run folder; return the path of the page.

    Each file is replaced as a whole: a reader, or a crash, meets the old one or the new one. The same folder
    gives the same bytes.
    """
    run = read_run(run_dir)
    drawn = frontier(pooled_rows(run.rows), width=640, height=460, name="frontier", standalone=True)
    if drawn:
        _replace(run.folder / "figures" / "frontier.svg", drawn)
    page = run.folder / "report.html"
    _replace(page, render(run))
    return page


def _replace(path: pathlib.Path, text: str) -> None:
    """Write a file beside its place, flush it to disk, and move it there."""
    try:
        path.parent.mkdir(exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"{path}: cannot write here ({error.strerror}); expected a writable run folder") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes it private; a report is for showing
        os.replace(temporary, path)
    except OSError as error:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written ({error.strerror}); free some space and try again") from error
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
