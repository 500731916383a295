"""The report of a run: one HTML file that opens from disk, asks the network for nothing, and prints.

Reads what the run has written so far (`config.yaml`, `metrics.jsonl`, `summary.json`) and writes `report.html`
and `figures/*.svg` beside them; a run that is not finished gets a report of what is there.
"""

from __future__ import annotations

import os
import pathlib
import tempfile

from ..log import UserError
from . import pictures, sections
from . import trees as search_page
from .analysis import section_of_report
from .frontier import frontier
from .html import page
from .read import Run, read_run
from .rows import pooled_rows
from .style import css


def render(run: Run) -> str:
    """Write the page of a run as one string of HTML."""
    body = [
        ("result", "Result", sections.headline(run)),
        ("picture", "What was gained, what was forgotten", pictures.picture(run)),
        ("table", "Accuracy", "" if run.of_kind("search") else sections.accuracy_table(run)),
        ("paired", "Paired differences", pictures.paired(run) + sections.paired_table(run)),
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
    last = run.phases[-1].get("phase", "unnamed") if run.phases else "none yet"
    return page(
        "run.html", css=css(), name=run.name, facts=sections.facts(run), finished=run.finished, last=last, sections=body
    )


def write_report(run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Write `report.html` and `figures/frontier.svg` into a run folder; return the path of the page.

    Each file is replaced as a whole: a reader, or a crash, meets the old one or the new one. The same folder
    gives the same bytes.
    """
    run = read_run(run_dir)
    drawn = frontier(pooled_rows(run.rows), width=640, height=460, name="frontier", standalone=True)
    if drawn:
        _replace(run.folder / "figures" / "frontier.svg", drawn)
    path = run.folder / "report.html"
    _replace(path, render(run))
    return path


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
