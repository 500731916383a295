"""The test before distillation: does the teacher, as it will be shown the questions, beat the student?

A teacher that does not has nothing to teach; one that is shown demonstrations is only as good as the model's learning
in context. It is a phase of its own, so that its result is committed whatever becomes of the run.
"""

from __future__ import annotations

from pathlib import Path

from ..evaluate import accuracy
from ..evaluate.answer import is_right
from ..log import UserError, format_percent, say
from ..runtime.journal import Record
from ..runtime.jsonl import Row
from ..runtime.processes import on_first
from .plan import Phase
from .session import Session


def gate(session: Session, phase: Phase, folder: Path) -> Row:
    questions = session.suite.questions("validation", domain="id")
    shown = phase.settings["demonstrates"]
    student = session.weights.model_of(phase.inputs["model"])
    teacher = session.teacher_of(phase.settings["distill"]) or student
    scores = {}
    for name, model, demonstrate in (("student", student, False), ("teacher", teacher, shown)):
        on_first((folder / name).mkdir, exist_ok=True)
        answers = session.answer(model, questions, folder / name, f"{phase.name} {name}", demonstrate=demonstrate)
        right = is_right(answers.rows)
        scores[name] = [right[q.id] for q in questions]
    difference, low, high = accuracy.paired_interval(scores["teacher"], scores["student"])
    record = {
        **{name: sum(found) / len(found) for name, found in scores.items()},
        "difference": difference, "low": low, "high": high, "n": len(questions), "average": teacher is student,
        "demonstrates": shown, "better": low > 0,
    }  # fmt: skip
    say(f"{phase.name}: {told(record)}")
    return record


def told(record: Record) -> str:
    """The result in a sentence."""
    teacher = "the teacher, shown the worked solution," if record["demonstrates"] else "the teacher"
    verb = "beats" if record["better"] else "does not beat"
    share, own, difference, low, high = (
        format_percent(record[key]) for key in ("teacher", "student", "difference", "low", "high")
    )
    return (
        f"{teacher} {verb} the student: {share} against {own} of {record['n']} validation questions, a difference of "
        f"{difference} with the 95 % interval [{low}, {high}]"
    )


def check_passed(record: Record | None, where: str, wanted: str) -> None:
    """Refuse to learn from a teacher that is not better, where `wanted` says so."""
    if record is not None and not record["better"] and wanted == "refuse":
        raise UserError(
            f"{where}: {told(record)}; set improver.gate: go_on to learn from it nevertheless, or take a larger "
            "teacher or an easier task"
        )
