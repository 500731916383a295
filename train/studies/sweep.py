"""Run what a sweep has not run yet: `jaxmerge improve CONFIG` where the config has a `sweep:` block.

Finished cells are lines of `sweep.rows`, which is committed: a fresh clone goes on where they end. Several processes
may work at one sweep; each takes cells that no other is at.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..improve.run import improve
from ..improve.settings import Improve
from ..log import UserError, say
from ..resolve import build
from ..runtime.disk import Busy, locked
from ..runtime.jsonl import Row, append_jsonl, read_jsonl
from .analyse import layers_of_run
from .cells import Cell, Values, judge_cells, score, tune_cells, unique, with_first_candidates
from .settings import AnalyseOptions, Sweep

WAIT = 5.0
"""Seconds between two looks at whether other processes have finished the candidates they are at."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config with its sweep, and where its results lie."""

    name: str
    values: Values
    sweep: Sweep
    checked: Improve
    """The config as it is checked, with the first candidate of each tuned method."""
    looks: AnalyseOptions | None
    """How each trained run is looked into; None where it is not."""

    @classmethod
    def of(cls, name: str, values: Values) -> Experiment:
        """Take the `sweep:` block out of a config's values and check both."""
        values = dict(values)
        sweep = build(Sweep, values.pop("sweep"), "sweep")
        checked = build(Improve, with_first_candidates(values, sweep))
        if checked.distributed.wanted:
            raise UserError("distributed: a sweep's runs are of one process each; start the command several times")
        for cell in (*tune_cells(values, sweep), *judge_cells(values, sweep, dict.fromkeys(sweep.tune.candidates, 0))):
            build(Improve, cell.values)
        looks = None
        if sweep.analyse is not False:
            looks = build(AnalyseOptions, {} if sweep.analyse is True else sweep.analyse, "sweep.analyse")
        return cls(name, values, sweep, checked, looks)

    @property
    def rows(self) -> Path:
        return Path(self.sweep.rows or f"docs/results/{self.name}.jsonl")

    def done(self) -> dict[str, Row]:
        """Finished cells by id."""
        return {row["cell"]: row for row in read_jsonl(self.rows, torn="drop")}

    def chosen(self, done: Mapping[str, Row]) -> dict[str, int] | None:
        """The best candidate of each tuned method on validation; None while some are not run."""
        if any(cell.id not in done for cell in tune_cells(self.values, self.sweep)):
            return None
        best = {}
        for method, candidates in self.candidate_scores(done).items():
            means = [sum(scores) / len(scores) for scores in candidates]
            best[method] = max(range(len(means)), key=lambda i: (means[i], -i))
        return best

    def candidate_scores(self, done: Mapping[str, Row]) -> dict[str, list[list[float]]]:
        """Method → candidate → the validation scores of its finished runs."""
        found = {method: [[] for _ in candidates] for method, candidates in self.sweep.tune.candidates.items()}
        for cell in tune_cells(self.values, self.sweep):
            if cell.id in done:
                assert cell.candidate is not None, "a run of tuning is of a candidate"
                found[cell.method][cell.candidate].append(score(done[cell.id]["results"][cell.method], "validation"))
        return found

    def todo(self, done: Mapping[str, Row]) -> list[Cell]:
        """Cells not finished, of the stage that can run now."""
        chosen = self.chosen(done)
        cells = tune_cells(self.values, self.sweep)
        if chosen is not None:
            cells = judge_cells(self.values, self.sweep, chosen)
        return [cell for cell in unique(cells) if cell.id not in done]


def run(experiment: Experiment, *, command: str, out: Path) -> Path:
    """Run all cells that are not done; returns the file of their rows."""
    experiment.rows.parent.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / "lock"):
        read_jsonl(experiment.rows, torn="mend")
    while cells := experiment.todo(experiment.done()):
        busy = 0
        for cell in cells:
            done = experiment.done()
            if cell.id in done:
                continue
            left = sum(c.id not in done for c in cells)
            say(f"{experiment.name}: {cell} ({len(done)} cells done, {left} of this stage to do)")
            try:
                run_cell(experiment, cell, out, command)
            except Busy:
                busy += 1
        if busy == len(cells):
            time.sleep(WAIT)
    say(str(experiment.rows))
    return experiment.rows


def run_cell(experiment: Experiment, cell: Cell, out: Path, command: str) -> None:
    """One cell, its rows and, with `keep_runs: false`, the end of its weights.

    Raises:
      Busy: another process is at it, or looks into its layers; a finished run alone would not say so.
    """
    folder = out / cell.id
    with locked(out / f"{cell.id}.lock", wait=False):
        if cell.id in experiment.done():
            return
        improve(build(Improve, cell.values), name=experiment.name, out=folder, command=command, quiet=True)
        looked = {}
        if experiment.looks and cell.stage != "base":
            looked = {"analysis": layers_of_run(folder, experiment.looks)}
        with locked(out / "lock"):
            append_jsonl(experiment.rows, {**describe_cell(cell, folder, command), **looked})
        if not experiment.sweep.keep_runs:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def describe_cell(cell: Cell, folder: Path, command: str) -> Row:
    """What is kept of a finished cell: one line."""
    summary = json.loads((folder / "summary.json").read_text())
    results: dict[str, list[list[Any]]] = {}
    for row in summary["rows"]:
        if row["family"] == "all" or row["split"] == "test":
            extra = [row.get("pass_at"), row.get("coefficient")]
            results.setdefault(row["method"], []).append(
                [row["round"], row["split"], row["domain"], row["family"], round(row["accuracy"] * row["n"]), row["n"]]
                + (extra if any(e is not None for e in extra) else [])
            )
    metrics = read_jsonl(folder / "metrics.jsonl", torn="drop")
    # Runs begun before searches were counted sampled plainly: what they kept is what they generated.
    generated = {m["round"]: m.get("generated", m["tokens"]) for m in metrics if m["kind"] == "sample"}
    return {
        "cell": cell.id,
        "stage": cell.stage,
        "axes": cell.axes,
        "method": cell.method,
        "candidate": cell.candidate,
        "results": results,
        "rounds": [
            [m["round"], m["sampled"], m["correct"], m["kept"], generated[m["round"]]]
            for m in metrics
            if m["kind"] == "select"
        ],
        "coefficients": {m["phase"]: m["coefficients"] for m in metrics if m["kind"] in ("merge", "probe")},
        "search": {
            m["phase"]: {key: m[key] for key in ("validation", "trials", "search_seconds", "notes")}
            for m in metrics
            if "trials" in m
        },
        "seconds": round(summary["seconds"], 1),
        "commit": summary["commit"],
        "device": summary["device"],
        "versions": {key: summary["versions"][key] for key in ("python", "jax", "jaxlib")},
        "command": command,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def show_plan(experiment: Experiment) -> None:
    """What `--dry-run` says: how many cells there are and how many are done."""
    done = experiment.done()
    tune = unique(tune_cells(experiment.values, experiment.sweep))
    chosen = experiment.chosen(done)
    assumed = chosen or dict.fromkeys(experiment.sweep.tune.candidates, 0)
    judge = unique(judge_cells(experiment.values, experiment.sweep, assumed))
    for stage, cells in (("tune", tune), ("judge", judge)):
        finished = [done[c.id]["seconds"] for c in cells if c.id in done]
        known = chosen is not None or stage == "tune"
        mean = f", {sum(finished) / len(finished):.0f} s each" if finished else ""
        say(f"{stage}: {len(cells)} runs" + (f", {len(finished)} done{mean}" if known else " after that"))
    if chosen:
        say(f"chosen: {chosen}")
