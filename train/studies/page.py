"""docs/results.md from the rows of all experiments: claims beside what was seen, with n, intervals and pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..log import UserError, say
from ..report.rows import DOMAIN_NAMES
from ..resolve import read_yaml
from ..runtime.disk import write_durably
from ..runtime.jsonl import Row
from . import pictures
from .cells import judge_cells, tune_cells, unique
from .read import Finished, runs
from .stats import holm, paired_t
from .sweep import Experiment
from .tables import (
    Pair,
    accuracy,
    against,
    against_first,
    balance,
    base_row,
    by_axis,
    by_round,
    data,
    differences,
    families,
    folded,
    frontier_gain,
    less,
    over_seeds,
    p_text,
    percent,
    searches,
    table,
)

HEAD = """# Results

Written by `jaxmerge results` from the rows in [results/](results/). Every row is one finished run and names its
commit, its command and its device.

- n counts seeds, which are the unit of intervals and tests. If a seed ran under several regimes, these are averaged
  first.
- Intervals are 95 % (Student's t). p-values are of Student's paired test against the control, after Holm's correction
  for the number of methods.
- No setting was chosen on the questions that its results are reported on. Tuning and searches look at validation
  questions, with seeds of their own.
- What a method adds to the frontier is an area in the picture of accuracy in domain against accuracy out of domain:
  the part that the method's rounds cover and the base does not. Chance adds to this area, and adds more if there are
  more rounds. So methods are compared by it only if they have the same number of rounds.
"""


def write(folder: Path, configs: Path) -> Path:
    """Write `folder`.md and the pictures in `folder`, one section an experiment in the order of their files' names."""
    experiments = [Experiment.of(path.stem, read_yaml(path)) for path in sorted(configs.glob("*.yaml"))]
    if not experiments:
        raise UserError(f"{configs}: no experiments (*.yaml with a sweep: block)")
    folder.mkdir(parents=True, exist_ok=True)
    parts = [HEAD]
    for experiment in experiments:
        parts.append(section(experiment, folder))
    page = folder.with_suffix(".md")
    write_durably(page, "\n".join(parts))
    say(str(page))
    return page


def section(experiment: Experiment, folder: Path) -> str:
    """One experiment: claim, state, tables, pictures."""
    sweep, done = experiment.sweep, experiment.done()
    chosen = experiment.chosen(done)
    cells = unique(judge_cells(experiment.values, sweep, chosen or dict.fromkeys(sweep.tune.candidates, 0)))
    everything = judge_cells(experiment.values, sweep, chosen or {})
    lines = [f"## {sweep.title or experiment.name}", "", f"**The claim.** {sweep.claim}".rstrip(), ""]
    lines += [f"**What we saw.** {sweep.seen}", ""] if sweep.seen else []
    lines += [provenance(experiment, list(done.values())), ""]
    if sweep.tune.candidates:
        lines += tuning(experiment, done, chosen)
    finished = sum(cell.id in done for cell in cells)
    if chosen is None:
        return "\n".join([*lines, "Not all candidates have run yet. Nothing is judged before they have.", ""])
    if finished < len(cells):
        lines += [f"*{finished} of {len(cells)} runs are finished; the numbers below are of these.*", ""]
    found = runs(everything, done)
    if not found:
        return "\n".join([*lines, "No run is finished yet.", ""])
    kinds: dict[str, Callable[[Experiment, list[Finished], Path], list[str]]] = {
        "frontier": frontier, "curve": curve, "layers": layers,
    }  # fmt: skip
    return "\n".join([*lines, *kinds[sweep.judge](experiment, found, folder)])


def provenance(experiment: Experiment, rows: Sequence[Row]) -> str:
    command = f"jaxmerge improve configs/experiments/{experiment.name}.yaml"
    if not rows:
        return f"`{command}`"
    devices = ", ".join(sorted({row["device"] for row in rows}))
    commits = Counter(row["commit"] for row in rows)
    named = ", ".join(f"{c} ({n})" for c, n in commits.most_common(3)) + (", …" if len(commits) > 3 else "")
    minutes = sum(row["seconds"] for row in rows) / 60
    return f"`{command}` · {len(rows)} runs, {minutes:.0f} minutes on {devices} · commits {named}"


def tuning(experiment: Experiment, done, chosen) -> list[str]:
    """Each candidate's validation score, the chosen one in bold."""
    scores = experiment.candidate_scores(done)
    lines = []
    for method, candidates in experiment.sweep.tune.candidates.items():
        cells = []
        for number, candidate in enumerate(candidates):
            values = scores[method][number]
            mean = f"{100 * sum(values) / len(values):.1f}" if values else "–"
            text = f"{mean} `{flat(candidate)}`"
            cells.append(f"**{text}**" if chosen and chosen[method] == number else text)
        lines.append([method, *cells])
    count = max(len(row) for row in lines) - 1
    seeds = len({str(cell.axes) for cell in tune_cells(experiment.values, experiment.sweep)})
    head = ["method", *(f"candidate {i + 1}" for i in range(count))]
    said = f"Tuning: validation score (mean of the domains' accuracies, %) after the last round, mean of {seeds} seeds."
    return folded("Candidates and what tuning chose", [said, "", *table(head, lines)])


def flat(value: Any, prefix: str = "") -> str:
    """`sft.learning_rate=0.0007` of nested overrides."""
    if (
        isinstance(value, dict)
        and value
        and not any("/" in str(k) or k in ("importance", "search") for k in value)
        and not {"schedule", "start"} <= value.keys()  # an α that changes over rounds, and not `sft.schedule`
    ):
        return " ".join(flat(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items())
    return f"{prefix}={value}"


def frontier(experiment: Experiment, found: list[Finished], folder: Path) -> list[str]:
    """Accuracy by domain, what each method adds to the base's frontier, and tests against the control."""
    methods = list(dict.fromkeys(run.method for run in found))
    domains = [d for d in DOMAIN_NAMES if any(d in run.domains for run in found)]
    of = {name: [run for run in found if run.method == name] for name in methods}
    pairs = against(of, experiment.sweep.control)
    p_mean = p_values(pairs, balance)
    # Each round is one more chance to add: methods of fewer rounds are not compared.
    p_area = p_values({name: own for name, own in pairs.items() if alike_in_rounds(own)}, frontier_gain)
    k = max((int(k) for run in found for s in run.scores for k in s.pass_at), default=0)
    head = ["method", "n", *(f"{DOMAIN_NAMES[d]} %" for d in domains)]
    head += [f"{DOMAIN_NAMES[d]} pass@{k} %" for d in domains if k and d in ("id", "ood")]
    head += ["mean of in and out", "p", "adds to the frontier, %²", "p"]
    rows = [base_row(found, domains, k)]
    ranked = sorted(methods, key=lambda m: -sum(map(balance, of[m])) / len(of[m]))
    for name in ranked:
        row = [f"**{name}** (control)" if name == experiment.sweep.control else name, count_text(of[name])]
        row += [over_seeds(of[name], accuracy(d)) for d in domains]
        row += [over_seeds(of[name], accuracy(d, k=k)) for d in domains if k and d in ("id", "ood")]
        row += [over_seeds(of[name], balance), p_text(p_mean.get(name))]
        row += [over_seeds(of[name], frontier_gain, scale=1e4), p_text(p_area.get(name))]
        rows.append(row)
    lines = table(head, rows)
    best = [name for name in ranked if not pictures.COEFFICIENT.match(name)][: pictures.BEST]
    drawn = {f"{experiment.name}.svg": {*best, "plain"}}
    if "plain" in of and "plain" not in best:
        # Far below the others it presses them into a corner.
        drawn[f"{experiment.name}-best.svg"] = {*best}
    for name, shown in drawn.items():
        write_durably(folder / name, pictures.frontier(of, found, shown))
        lines += [f"![accuracy in domain against out of domain]({folder.name}/{name})", ""]
    lines += differences(pairs, f"Difference from the control ({experiment.sweep.control})", k)
    lines += [*by_round(of), *families(found, of, methods)]
    axes = [axis for axis in experiment.sweep.axes if axis != "seed"]
    for axis in axes:
        lines += by_axis(axis, found, methods)
    curves = {name for name in methods if " " in name}
    if curves:
        picture = folder / f"{experiment.name}-lines.svg"
        write_durably(picture, pictures.lines_of_coefficients(found))
        lines += [f"![accuracy along the lines from the base]({folder.name}/{picture.name})", ""]
    return [*lines, *data(of), *searches(found)]


def p_values(pairs: Mapping[str, Sequence[Pair]], measure: Callable[[Finished], float]) -> dict[str, float]:
    """Each method against the control, corrected for their number; none of two seeds, which may agree by chance."""
    found = {name: less(own, measure) for name, own in pairs.items()}
    return holm({name: paired_t(values) for name, values in found.items() if len(values) > 2})


def alike_in_rounds(pairs: Sequence[Pair]) -> bool:
    return all(a.rounds == b.rounds for a, b in pairs)


def count_text(found: Sequence[Finished]) -> str:
    """`5`, or `5 (15 runs)` where a seed has several points."""
    seeds = len({run.seed for run in found})
    return str(seeds) if seeds == len(found) else f"{seeds} ({len(found)} runs)"


def curve(experiment: Experiment, found: list[Finished], folder: Path) -> list[str]:
    """Accuracy over the values of the first axis."""
    axis = next(iter(experiment.sweep.axes))
    methods = list(dict.fromkeys(run.method for run in found))
    labels = list(dict.fromkeys(run.axes[axis] for run in found))
    domains = [d for d in DOMAIN_NAMES if any(d in run.domains for run in found)]
    rows = []
    for name in methods:
        for label in labels:
            here = [run for run in found if run.method == name and run.axes[axis] == label]
            rows.append([name, label, count_text(here), *(over_seeds(here, accuracy(d)) for d in domains)])
    picture = folder / f"{experiment.name}.svg"
    write_durably(picture, pictures.curve(axis, found))
    head = ["method", axis, "n", *(f"{DOMAIN_NAMES[d]} %" for d in domains)]
    lines = [*table(head, rows), f"![accuracy over {axis}]({folder.name}/{picture.name})", ""]
    return lines + differences(against_first(found, axis), f"Difference from the same method at {axis} {labels[0]}")


def layers(experiment: Experiment, found: list[Finished], folder: Path) -> list[str]:
    """Spearman's ρ between importance and change, run by run, and the layers' means."""
    looked = [run for run in found if run.row.get("analysis")]
    rows = []
    for name in dict.fromkeys(run.method for run in looked):
        for score in ("skip", "taylor"):
            tests = [
                t for run in looked if run.method == name
                for t in run.row["analysis"]["importance"]["correlation"]
                if t["importance"] == score and t["round"] == run.last and t["rho"] is not None
            ]  # fmt: skip
            if tests:
                small = sum(t["p"] < 0.05 for t in tests)
                rho = percent([t["rho"] for t in tests], scale=1.0, digits=2, most=1.0)
                rows.append([name, score, str(len(tests)), rho, str(small)])
    lines = table(["method", "importance by", "n", "Spearman's ρ after the last round", "runs with p < 0.05"], rows)
    count = max((run.row["analysis"]["layers"] for run in looked), default=0)
    columns = {}
    for label, pick in (("importance (skip)", "skip"), ("importance (Taylor)", "taylor")):
        # It is the base's: however many runs have measured the same, a model counts once, and two have no interval.
        values = {str(v): v for run in looked if (v := run.row["analysis"]["importance"][pick])}.values()
        columns[label] = [f"{sum(v[i] for v in values) / len(values):.2f}" if values else "–" for i in range(count)]
    for name in dict.fromkeys(run.method for run in looked):
        changes = [pictures.last_change(run) for run in looked if run.method == name]
        columns[f"change by {name}, %"] = [
            percent([c.get(f"model/layers/{i}", math.nan) for c in changes], digits=3) for i in range(count)
        ]
    lines += table(["layer", *columns], [[str(i), *(column[i] for column in columns.values())] for i in range(count)])
    if count:
        picture = folder / f"{experiment.name}.svg"
        write_durably(picture, pictures.layers(looked, count))
        lines += [f"![change against importance]({folder.name}/{picture.name})", ""]
        if count < 6:
            least = f"1/{math.factorial(count)}"
            lines.append(f"With {count} layers the smallest p of a permutation test is {least}: read ρ, not p.\n")
    return lines
