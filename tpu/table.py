"""The table of docs/scale.md: a row for each slice, written as soon as it is known.

A run has one mesh: the decoder and the merge are compiled for the one that is chosen for the step.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Sequence
from typing import Any

from train.log import UserError, say

from .compile import Compiled, Report, as_json, examine, versions
from .layout import Plan, advice, needed, settle
from .presets import model_of
from .topologies import GIB, read

ROWS = tuple(
    Plan(topology=topology, model=model, step=step, gather=gather)  # type: ignore[arg-type]  # one of the three
    for model, slices in {
        "llama-3.1-8b": (
            "v5e:4x4", "v5e:8x8", "v5e:16x16", "v6e:2x4", "v6e:8x8", "v6e:16x16", "v5p:2x2x1", "v5p:4x4x4", "v5p:4x8x8",
        ),
        "llama-3.1-70b": (
            "v5e:8x16", "v5e:16x16", "v6e:8x8", "v6e:16x16", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x8x8",
        ),
    }.items()
    for topology in slices
    for step, gather in (("sft", False), ("decode", False), ("decode", True), ("merge", False))
)  # fmt: skip

HEAD = (
    "| model | slice | step | mesh d×f×t | batch or slots | GiB a chip | of | on paper | GB received | of it gathered "
    "| s at peak: products, links | compile s |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def write(words: Sequence[str], *, compile: Callable[..., Compiled]) -> None:
    """Print the rows; `step=sft`, `model=…`, `topology=…` restrict them, `json=FILE` also keeps each as JSON."""
    wanted = {key: value for key, _, value in (word.partition("=") for word in words)}
    file = wanted.pop("json", None)
    if unknown := wanted.keys() - {"step", "model", "topology"}:
        raise UserError(f"table: {', '.join(sorted(unknown))}: no such key; known: step, model, topology, json")
    rows = [row for row in ROWS if all(getattr(row, name) == value for name, value in wanted.items())]
    if not rows:
        raise UserError(f"table: no row has {' '.join(words)}; slices: {', '.join(sorted({r.topology for r in ROWS}))}")
    say(f"jax {versions()['jax']}, libtpu {versions()['libtpu']}")
    for line in HEAD:
        say(line)
    for row in rows:
        model, topology = model_of(row.model), read(row.topology)
        mesh = settle(dataclasses.replace(row, step="sft"), model, topology)[0].mesh
        report = examine(dataclasses.replace(row, mesh=mesh), model, compile=compile)
        say(line_of(report))
        if file is not None:
            with open(file, "a") as stream:
                stream.write(json.dumps(as_json(report)) + "\n")
        clear()


def line_of(report: Report) -> str:
    plan, chip, sums = report.plan, report.topology.chip, report.compiled.collectives
    cells: list[Any] = [
        plan.model,
        report.topology.name,
        plan.step + ", gathered" * plan.gather,
        "×".join(str(n) for n in plan.shape.values()),
        {"sft": plan.batch, "decode": plan.slots, "merge": ""}[plan.step],
        f"{report.bytes_per_device / GIB:.2f}",
        f"{report.hbm / GIB:.2f}",
        f"{needed(report.model, plan) / GIB:.1f}",
    ]
    if report.fits and sums is not None:
        received = sum(kind["bytes"] for kind in sums.values())
        busy = report.flops / report.topology.chips / chip.flops
        cells += [
            f"{received / 1e9:.2f}",
            f"{sums.get('all-gather', {'bytes': 0})['bytes'] / 1e9:.2f}",
            f"{busy:.3g}, {received / chip.ici_rate:.3g}",
        ]
    else:
        more = f"{report.over / GIB:.2f} GiB too much; {advice(plan, report.model, report.topology, report.over)}"
        cells += [f"does not fit: {more}", "", ""]
    return "| " + " | ".join(map(str, [*cells, f"{report.compiled.seconds:.0f}"])) + " |"


def clear() -> None:
    """Forget what was compiled: a hundred programs for 256 chips are gigabytes."""
    import jax

    from train.learn.step import _make_step

    jax.clear_caches()
    _make_step.cache_clear()
    gc.collect()
