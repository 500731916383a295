"""summary.json of a run: every accuracy, the paired differences, and what made them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluate import accuracy as evaluate
from ..log import UserError, format_seconds, say
from ..report.page import write_report
from ..report.rows import print_table
from ..runtime.disk import write_durably
from ..runtime.folder import provenance
from .plan import BASE

if TYPE_CHECKING:
    from .session import Session


def write(session: Session, *, finished: bool) -> dict[str, Any]:
    """Gather what is committed into summary.json and report.html.

    `planned` names all phases in order, and `left` those that are still to be done.
    """
    planned = [phase.name for phase in session.todo.phases]
    records = [r for p in session.todo.phases if (r := session.journal.committed(p.name)) is not None]
    evaluated = [o for o in session.outcomes if session.journal.committed(o.evaluate) is not None]
    rows = []
    for outcome in evaluated:
        record = session.journal.committed(outcome.evaluate) or {}
        # A shared evaluation was committed under the first method's name.
        rows += [{**row, "method": outcome.method, "round": outcome.round} for row in record["rows"]]
    seconds: Counter[str] = Counter()
    for record in records:
        seconds[record["kind"]] += record["seconds"]
    summary = {
        "name": session.name,
        "finished": finished,
        "rows": rows,
        "paired": paired(session, evaluated),
        "planned": planned,
        "left": [name for name in planned if session.journal.committed(name) is None],
        "majority": next((r["majority"] for r in records if r["kind"] == "load"), []),
        "seconds": sum(seconds.values()),
        "phase_seconds": dict(seconds),
        **provenance(session.command, session.mesh.size),
    }
    write_durably(session.journal.root / "summary.json", json.dumps(summary, indent=1))
    write_report(session.journal.root)
    return summary


def paired(session: Session, evaluated) -> list[dict[str, Any]]:
    """Each method against the base and against the first method, on the same questions."""
    first = next((o.method for o in session.outcomes if o.method != BASE), None)
    plain = {(o.method, o.round): o for o in evaluated if not o.extra}
    pairs = []
    for method, round in plain:
        if method != BASE:
            if (BASE, 0) in plain:
                pairs.append(((method, round), (BASE, 0)))
            if method != first and (first, round) in plain:
                pairs.append(((method, round), (first, round)))
    scores = {name: session.scores(o.evaluate) for name, o in plain.items()}
    questions = [q for split in session.config.evaluation.splits for q in session.suite.questions(split)]
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


def tell_progress(summary: dict[str, Any], name: str, seconds: float) -> None:
    """Say on one line which phase is done, and how many of all are."""
    done, count = len(summary["planned"]) - len(summary["left"]), len(summary["planned"])
    say(f"phase {done} of {count} is done: {name} ({format_seconds(seconds)})")


def show(summary: dict[str, Any], folder: Path) -> None:
    """The table, the report and, last, the folder."""
    print_table(summary)
    say(f"report: {folder / 'report.html'}")
    say(str(folder))
