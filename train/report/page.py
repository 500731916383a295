"""The report of a run: one HTML file that opens from disk, asks the network for nothing, and prints.

Reads what the run has written so far (`config.yaml`, `metrics.jsonl`, `summary.json`) and writes `report.html`
and `figures/*.svg` beside them; a run that is not finished gets a report of what is there.
"""

from __future__ import annotations

import os
import pathlib

from ..runtime.disk import write_durably
from . import about, examples, markdown, pictures, sections
from . import trees as search_page
from .analysis import section_of_report
from .frontier import frontier
from .html import page, part
from .lengths import lengths
from .read import Run, read_run
from .rows import pooled_rows
from .style import css
from .verdict import verdict

REFRESH = 15
"""Seconds after which a browser loads the page of an unfinished run again."""


def render(run: Run) -> str:
    """Write the page of a run as one string of HTML."""
    search = bool(run.of_kind("search"))
    said = verdict(run.summary.get("paired") or (), run.rows, finished=run.finished)
    body = [
        ("result", "Result", sections.headline(run, said.meaning)),
        ("picture", "What was gained, what was forgotten", pictures.picture(run)),
        ("table", "Accuracy", "" if search else sections.accuracy_table(run)),
        ("paired", "Paired differences", pictures.paired(run) + sections.paired_table(run)),
        ("gate", "Teacher and student", sections.gates(run)),
        ("pass", "pass@k", sections.pass_table(run)),
        ("lengths", "Length of answers", lengths(run)),
        ("families", "By family", pictures.families(run)),
        ("answers", "Questions and answers", examples.answers(run)),
        ("samples", "Samples", sections.samples(run)),
        ("examples", "Solutions accepted and rejected", examples.samples_shown(run)),
        ("training", "Training loss", pictures.training(run)),
        ("layers", "Weight change per layer", pictures.layers(run)),
        ("analysis", "Analysis", section_of_report(run.folder)),
        ("search", "Search", search_page.numbers(run.phases)),
        ("trees", "Trees", search_page.trees(run.folder)),
        ("time", "Time", sections.time(run)),
        ("markdown", "To copy", markdown.copied(run, said)),
        ("again", "Doing it again", sections.again(run)),
    ]
    body = [section for section in body if section[2]]
    # A page that no running program writes again need not be loaded again.
    watched = not run.finished and bool(run.summary.get("planned"))
    last = run.phases[-1].get("phase", "unnamed") if run.phases else "none yet"
    return page(
        "run.html", css=css(methods=sum(isinstance(look.fill, int) for look in run.looks.values())), name=run.name,
        said="" if search else part("said", verdict=said, looks=run.looks),
        facts=part("facts", rows=about.facts(run)), whole=about.whole(run),
        finished=run.finished, last=last, sections=body, refresh=REFRESH if watched else None,
    )  # fmt: skip


def write_report(run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Write `report.html` and `figures/frontier.svg` into a run folder; return the path of the page.

    Each file is replaced as a whole: a reader, or a crash, meets the old one or the new one. The same folder
    gives the same bytes.
    """
    run = read_run(run_dir)
    options = {"style": run.looks, "shared": pictures.shared(run)}
    drawn = frontier(pooled_rows(run.rows), width=640, height=460, name="frontier", standalone=True, **options)
    if drawn:
        write_durably(run.folder / "figures" / "frontier.svg", drawn)
    path = run.folder / "report.html"
    write_durably(path, render(run))
    return path
