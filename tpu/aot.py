"""Compile the programs of a run for a slice of TPUs without a TPU, and say what a chip of it would hold and receive.

    python -m tpu.aot topology=v5e:4x4 model=llama-3.1-8b step=sft
    python -m tpu.aot table                 # the rows of docs/scale.md; over an hour on two cores

The compiler is the one on the machines (`pip install libtpu`), the functions are the run's own. Exit code 0: it fits;
1: it does not, with by how much and what to change; 2: a mistake of yours, named. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence

from train.log import UserError, say
from train.resolve import build, override

from . import table, topologies
from .compile import Compiled, Report, as_json, compile_plan, examine
from .layout import Plan, advice, needed
from .presets import model_of
from .topologies import GIB


def show(report: Report) -> None:
    """A few lines for a person."""
    plan, topology, chip = report.plan, report.topology, report.topology.chip
    axes = " ".join(f"{name}={n}" for name, n in plan.shape.items())
    what = {
        "sft": f"batch={plan.batch} length={plan.length} remat={plan.remat} masters={plan.masters}",
        "decode": f"slots={plan.slots} length={plan.length} {plan.dtype}",
        "merge": "imm, float32",
    }[plan.step]
    parts = {**report.compiled.memory, "beside it": report.beside}
    lines = [
        f"{plan.step} of {plan.model}: {what}",
        f"slice        {topology.name}, {topology.chips} chips of {report.hbm / GIB:.2f} GiB",
        f"mesh         {axes} ({report.why})",
        f"memory       {report.bytes_per_device / GIB:.2f} GiB a chip: "
        + ", ".join(f"{name} {n / GIB:.2f}" for name, n in parts.items() if n),
        f"             {needed(report.model, plan) / GIB:.2f} GiB on paper",
        f"operations   {report.flops:.3g} in all, {report.flops / topology.chips / chip.flops:.3g} s at the peak",
    ]
    for kind, sums in (report.compiled.collectives or {}).items():
        lines.append(f"{kind:<20} {sums['count']:>7,} times {sums['bytes'] / 1e9:>9.3f} GB to a chip")
    if report.compiled.collectives:
        total = sum(sums["bytes"] for sums in report.compiled.collectives.values())
        lines.append(f"in all       {total / 1e9:.2f} GB, {total / chip.ici_rate:.3g} s at the links' peak")
    lines += [f"  most       {words}" for words in report.compiled.largest]
    lines.append(f"compiled in  {report.compiled.seconds:.0f} s")
    for line in lines:
        say(line)


def complaint(report: Report) -> str:
    """Why it does not fit, and what would help."""
    return (
        f"does not fit: {report.bytes_per_device / GIB:.2f} GiB are wanted on a chip that has {report.hbm / GIB:.2f}, "
        f"{report.over / GIB:.2f} GiB too much; {advice(report.plan, report.model, report.topology, report.over)}"
    )


def plan_of(words: Sequence[str]) -> Plan:
    """The plan of `key=value …`."""
    for word in words:
        if "=" not in word:
            raise UserError(f"{word!r}: keys are written key=value, e.g. topology=v5e:4x4 model=llama-3.1-8b step=sft")
    return build(Plan, override({}, words))


def main(words: Sequence[str], *, compile: Callable[..., Compiled] = compile_plan) -> int:
    if not words or words[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0 if words else 2
    try:
        if compile is compile_plan:
            topologies.require_libtpu()
            topologies.without_a_machine()
        if words[0] == "table":
            table.write(words[1:], compile=compile)
            return 0
        plan = plan_of(words)
        report = examine(plan, model_of(plan.model), compile=compile)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(report)
    if not report.fits:
        print(f"error: {complaint(report)}", file=sys.stderr, flush=True)
    say(json.dumps(as_json(report)))
    return 0 if report.fits else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
