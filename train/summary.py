"""summary.json of a run: every accuracy, the paired differences, and what made them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import evaluate
from .log import UserError, say
from .plan import BASE
from .report.page import write_report
from .report.rows import print_table
from .runtime.disk import write_durably
from .runtime.folder import made_by

if TYPE_CHECKING:
    from .run import Run


def write(run: Run, *, finished: bool) -> dict[str, Any]:
    """Gather what is committed into summary.json and report.html."""
    records = [r for p in run.todo.phases if (r := run.journal.committed(p.name)) is not None]
    evaluated = [o for o in run.outcomes if run.journal.committed(o.evaluate) is not None]
    rows = []
    for outcome in evaluated:
        record = run.journal.committed(outcome.evaluate) or {}
        # A shared evaluation was committed under the first method's name.
        rows += [{**row, "method": outcome.method, "round": outcome.round} for row in record["rows"]]
    seconds: Counter[str] = Counter()
    for record in records:
        seconds[record["kind"]] += record["seconds"]
    summary = {
        "name": run.name,
        "finished": finished,
        "rows": rows,
        "paired": paired(run, evaluated),
        "majority": next((r["majority"] for r in records if r["kind"] == "load"), []),
        "seconds": sum(seconds.values()),
        "phase_seconds": dict(seconds),
        **made_by(run.command, run.mesh.size),
    }
    write_durably(run.journal.root / "summary.json", json.dumps(summary, indent=1))
    write_report(run.journal.root)
    return summary


def paired(run: Run, evaluated) -> list[dict[str, Any]]:
    """Each method against the base and against the first method, on the same questions."""
    first = next((o.method for o in run.outcomes if o.method != BASE), None)
    plain = {(o.method, o.round): o for o in evaluated if not o.extra}
    pairs = []
    for method, round in plain:
        if method != BASE:
            if (BASE, 0) in plain:
                pairs.append(((method, round), (BASE, 0)))
            if method != first and (first, round) in plain:
                pairs.append(((method, round), (first, round)))
    scores = {name: run.scores(o.evaluate) for name, o in plain.items()}
    questions = [q for split in run.config.evaluation.splits for q in run.suite.questions(split)]
    return evaluate.paired_rows(questions, scores, pairs)


def read_finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run, else None."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it to write it again") from None
    return summary if summary["finished"] else None


def refresh_report(folder: Path) -> None:
    """Write the page of a finished run if a kill fell between its summary and its page."""
    page = folder / "report.html"
    if not page.exists() or page.stat().st_mtime_ns < (folder / "summary.json").stat().st_mtime_ns:
        write_report(folder)


def show(summary: dict[str, Any], folder: Path) -> None:
    """The table, the report and, last, the folder."""
    print_table(summary)
    say(f"report: {folder / 'report.html'}")
    say(str(folder))
