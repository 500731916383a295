"""`jaxmerge improve`: the loop.

For every phase of the plan that is not committed: compute it, commit it. `plan.py` says which phases there are,
`phases.py` what each does, `session.py` what they share.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from ..data.hub import pin
from ..runtime.folder import check_resumable, check_same_config, content, fingerprint, write_config
from ..runtime.journal import Journal
from ..runtime.processes import on_first
from ..runtime.sinks import check_sinks
from ..runtime.stop import check
from . import summary
from .phases import STEPS
from .plan import check_sampled, plan, sft_of
from .rounds import follow_rounds
from .session import Session
from .settings import Improve


def improve(config: Improve, *, name: str, out: Path | None = None, command: str = "", quiet: bool = False) -> Path:
    """Run or resume a self-improvement run; returns its folder.

    Args:
      name: of the config; part of the default folder's name.
      out: run folder; `runs/<name>-<8 hex of the config>` by default.
      command: what reproduces the run, for the report.
      quiet: leave out the table at the end.

    Raises:
      UserError: the folder holds a run of another config, or a phase met a mistake of the user's.
    """
    folder = out or Path("runs") / f"{name}-{fingerprint(content(config))}"
    config = pin(config, folder, on_first)
    on_first(check_same_config, folder, config)
    finished = on_first(summary.read_finished, folder)
    if finished is not None:
        on_first(summary.refresh_report, folder)
        if not quiet:
            summary.show(finished, folder)
        return folder
    on_first(check_resumable, folder, config)
    check_sampled(config)
    todo, outcomes = plan(config)
    for phase in todo.phases:
        if phase.tunes:
            check_sinks(sft_of(phase).watch.sinks)
    with Journal(folder) as journal:
        on_first(write_config, folder, config)
        journal.reconcile(phase.name for phase in todo.phases)
        session = Session(config, journal, todo, outcomes, name=name, command=command)
        redo_lost(session)
        on_first(summary.write, session, finished=False)
        with follow_rounds(session) as send:
            run_phases(session, send)
        found = on_first(summary.write, session, finished=True)
        if not quiet:
            summary.show(found, folder)
    return folder


def run_phases(session: Session, send: Callable[[], None]) -> None:
    """Compute and commit what is not committed; let go of weights after their last use.

    After each phase the page is written again, so that it can be watched; after an evaluation metrics are sent.
    """
    for index, phase in enumerate(session.todo.phases):
        check()
        if session.journal.committed(phase.name) is None:
            start = time.perf_counter()
            record = STEPS[phase.kind](session, phase, session.journal.folder(phase.name))
            seconds = time.perf_counter() - start
            session.journal.commit(
                phase.name,
                {"kind": phase.kind, "round": phase.round, "method": phase.method}
                | ({"shared_by": phase.shared_by} if phase.shared_by else {})
                | {"seconds": seconds, **record},
            )
            found = on_first(summary.write, session, finished=False)
            summary.tell_progress(found, phase.name, seconds)
            if phase.kind == "evaluate":
                send()
        if phase.tunes:
            on_first(shutil.rmtree, session.weights.folder(phase.name) / "state", ignore_errors=True)
        session.weights.release({p.name for p in session.todo.phases if session.todo.last_use(p.name) > index})
        retain(session, index)


def redo_lost(session: Session) -> None:
    """Uncommit phases whose weights or examples are gone but still needed, so that they are made again."""
    for index in reversed(range(len(session.todo.phases))):
        phase = session.todo.phases[index]
        made = session.output_of(phase)
        if made is None or on_first(made.exists) or session.journal.committed(phase.name) is None:
            continue
        later = session.todo.phases[index + 1 :]
        if any(phase.name in p.inputs.values() and session.journal.committed(p.name) is None for p in later):
            session.journal.uncommit(phase.name)


def retain(session: Session, index: int) -> None:
    """Delete the weights of rounds older than `keep` that no later phase reads."""
    if session.config.keep is None:
        return
    done = session.todo.phases[: index + 1]
    oldest = max(p.round for p in done) - session.config.keep
    for phase in done:
        if 0 < phase.round <= oldest and phase.makes_weights and session.todo.last_use(phase.name) <= index:
            on_first(shutil.rmtree, session.weights.folder(phase.name), ignore_errors=True)
