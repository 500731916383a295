"""The page of an analysis, and the same sections for a run's report: figures with the tables of their numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..log import UserError, format_seconds
from ..runtime.disk import write_durably
from . import analysis_samples as sections_samples
from . import analysis_weights as sections
from .html import Table, page, part
from .style import css

Found = Mapping[str, Any]
SECTIONS: tuple[Callable[[Found], sections.Section | None], ...] = (
    sections.importance,
    sections.change,
    sections.agreement,
    sections.rank,
    sections.contribution,
    sections_samples.line,
    sections_samples.plane,
    sections_samples.diversity,
    sections_samples.passes,
    sections_samples.limem,
    sections_samples.faithfulness,
)
WANTED = (
    "run", "method", "rounds", "layers", "texts", "importance", "change", "agreement", "rank", "tuco", "line", "plane",
    "diversity", "limem", "faithfulness", "notes", "seconds",
)  # fmt: skip


def read(folder: Path) -> dict[str, Any] | None:
    """Read `analysis.json` of a folder; None if there is none."""
    path = folder / "analysis.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); write it again with jaxmerge analyse, or remove it") from None
    missing = [key for key in WANTED if key not in found] if isinstance(found, dict) else list(WANTED)
    if missing:
        raise UserError(f"{path}: it lacks {', '.join(missing)}; write it again with jaxmerge analyse, or remove it")
    return found


def made(found: Found) -> list[sections.Section]:
    """Make every section that there is something to show in."""
    return [section for make in SECTIONS for section in [make(found)] if section is not None]


def content(found: Found) -> str:
    """Write the sections under one heading each, for a page that has the report's style."""
    texts = "; ".join(
        f"{domain}: {t['questions']} questions, {t['tokens']:,} tokens" for domain, t in found["texts"].items()
    )
    spent = [[name, format_seconds(value)] for name, value in found["seconds"].items()]
    return part(
        "analysis", method=found["method"], rounds=", ".join(map(str, found["rounds"])), texts=texts,
        notes=found["notes"], spent=Table(["measure", "time"], spent, "Wall-clock time."),
        sections=[(section, [draw(False) for draw in section.figures.values()]) for section in made(found)],
    )  # fmt: skip


def section_of_report(folder: Path) -> str:
    """Write the report's section; empty if the run was not analysed."""
    found = read(folder)
    return "" if found is None else content(found)


def render(found: Found) -> str:
    """Write the page as one string of HTML."""
    return page("analysis.html", css=css(), name=found["run"], content=content(found))


def write_page(folder: Path) -> Path:
    """Write `analysis.html` and `analysis/*.svg` from a folder's `analysis.json`; the same numbers, the same bytes."""
    found = read(folder)
    if found is None:
        raise UserError(f"{folder}: no analysis.json; run jaxmerge analyse first")
    figures = folder / "analysis"
    figures.mkdir(exist_ok=True)
    for section in made(found):
        for name, draw in section.figures.items():
            write_durably(figures / f"{name}.svg", draw(True))
    write_durably(folder / "analysis.html", render(found))
    return folder / "analysis.html"
