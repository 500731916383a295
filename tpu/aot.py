"""Compile the programs of a run for a slice of TPUs without a TPU, and say what a chip of it would hold and receive.

    python -m tpu.aot topology=v5e:4x4 model=llama-3.1-8b step=sft
    python -m tpu.aot table                 # the rows of docs/scale.md; over an hour on two cores

The compiler is the one on the machines (`pip install libtpu`), the functions are the run's own. Exit code 0: it fits;
1: it does not, with by how much and what to change; 2: a mistake of yours, named. The last line is JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from train.log import UserError, say
from train.models.config import ModelConfig
from train.resolve import build, override

from . import paper, topologies
from .layout import Plan, advice, needed, settle
from .topologies import GIB, Topology

OUT_OF_MEMORY = (
    # The whole program's, or that of its temporaries alone.
    (re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"), False),
    (re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"), True),
)
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Compiled(NamedTuple):
    """What the compiler says of a program.

    Attributes:
      memory: bytes of a device, by what they are for; they are there at the same time.
      available: bytes a program may use, where the compiler told because they do not suffice.
      collectives: {kind: {count, bytes}}, one run of the program, a device; None where it did not come so far.
      largest: the collectives that bring most, in words.
      seconds: of compiling.
    """

    memory: dict[str, float]
    available: float | None
    collectives: dict[str, dict[str, int]] | None
    largest: tuple[str, ...]
    seconds: float


def compile_plan(plan: Plan, model: ModelConfig, topology: Topology) -> Compiled:
    """Compile a settled plan; that the memory does not suffice is a result, not an error."""
    mesh = topologies.mesh(topology, (plan.shape["data"], plan.shape["fsdp"], plan.shape["tensor"]))
    import jax

    from . import hlo
    from .programs import PROGRAMS

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    program = PROGRAMS[plan.step](model, plan, mesh)
    lowered = program.lower()
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        memory, available = out_of_memory(str(error), program.argument_bytes)
        return Compiled(memory, available, None, (), time.perf_counter() - start)
    took = time.perf_counter() - start
    found = hlo.collectives(compiled.as_text() or "", topology.chips)
    most = sorted((c for c in found if c.bytes), key=lambda c: -c.times * c.bytes)[:3]
    words = (f"{c.kind} {', '.join(c.shapes[:2])} × {c.times}: {c.times * c.bytes / 1e9:.2f} GB" for c in most)
    return Compiled(memory_of(compiled.memory_analysis()), None, hlo.totals(found), tuple(words), took)


def memory_of(analysis: Any) -> dict[str, float]:
    """Bytes of a device: the arguments, what comes out and does not take an argument's place, the rest."""
    return {
        "arguments": float(analysis.argument_size_in_bytes),
        "results": float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        "temporaries": float(analysis.temp_size_in_bytes),
        "program": float(analysis.generated_code_size_in_bytes),
    }


def out_of_memory(message: str, arguments: float) -> tuple[dict[str, float], float]:
    """(bytes wanted, bytes available) of the compiler's RESOURCE_EXHAUSTED; another error goes on its way."""
    for pattern, temporaries_alone in OUT_OF_MEMORY:
        if match := pattern.search(message):
            wanted, available = (float(match[i]) * UNITS[match[i + 1]] for i in (1, 3))
            rest = wanted if temporaries_alone else max(0.0, wanted - arguments)
            return {"arguments": arguments, "temporaries": rest}, available
    raise UserError(f"the compiler refused the program: {' '.join(message.split())[:600]}")


class Report(NamedTuple):
    """A plan, settled, and what came of it."""

    plan: Plan
    model: ModelConfig
    topology: Topology
    why: str
    compiled: Compiled

    @property
    def bytes_per_device(self) -> float:
        return sum(self.compiled.memory.values()) + self.beside

    @property
    def beside(self) -> float:
        return paper.masters(self.model, self.plan.shape, self.plan.held)

    @property
    def hbm(self) -> float:
        return self.compiled.available or self.topology.chip.hbm

    @property
    def over(self) -> float:
        return self.bytes_per_device - self.hbm

    @property
    def fits(self) -> bool:
        return self.compiled.available is None and self.over <= 0

    @property
    def flops(self) -> float:
        """Of the formula: the compiler counts the body of a loop once."""
        return paper.flops(self.model, self.plan)


def examine(plan: Plan, model: ModelConfig, *, compile: Callable[..., Compiled] = compile_plan) -> Report:
    """Settle a plan, compile it, and report."""
    topology = topologies.read(plan.topology)
    settled, why = settle(plan, model, topology)
    return Report(settled, model, topology, why, compile(settled, model, topology))


def as_json(report: Report) -> dict[str, Any]:
    plan, topology = report.plan, report.topology
    sizes = {
        "sft": ("batch", "micro_batch", "length", "remat", "masters", "layers", "attention"),
        "decode": ("slots", "length"),
    }
    return {
        "topology": topology.name,
        "chips": topology.chips,
        "model": plan.model,
        "step": plan.step,
        "mesh": plan.shape,
        **{name: getattr(plan, name) for name in sizes.get(plan.step, ())},
        "bytes_per_device": round(report.bytes_per_device),
        "memory": {name: round(n) for name, n in report.compiled.memory.items()} | {"beside": round(report.beside)},
        "paper_bytes_per_device": round(needed(report.model, plan)),
        "hbm_bytes": round(report.hbm),
        "fits": report.fits,
        "collectives": report.compiled.collectives,
        "flops": report.flops,
        "flops_per_device": report.flops / topology.chips,
        "compile_seconds": round(report.compiled.seconds, 1),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("jax", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


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
        from .presets import model_of

        if words[0] == "table":
            from . import table

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
