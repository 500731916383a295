"""Compile one step of a run for a slice and report what a chip of it would hold and receive.

A settled plan and a model go in, a `Report` comes out; `tpu.aot` shows one, `tpu.table` a row for each slice.
"""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from train.improve import paper
from train.log import UserError
from train.models.config import ModelConfig

from . import topologies
from .layout import Plan, needed, settle
from .topologies import Topology

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
