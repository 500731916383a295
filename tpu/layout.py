"""Which mesh, batch and slots a program gets on a slice where they are not given, and what to change if it is too big.

By the arithmetic of train/improve/paper.py alone: nothing is compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from train.improve import paper
from train.log import UserError
from train.models.config import ModelConfig
from train.resolve import at_least

from .topologies import GIB, Topology, is_along, read

FULL = 0.92
"""Share of a chip's memory that a layout may take on paper, to be chosen."""
RING = 16
"""Devices up to which the compiler passes a weight round instead of gathering it."""
SLOTS = 16
"""Sequences decoded side by side for each part that rows are cut into, where `slots` is not given."""
BESIDE = {"sft": 1, "decode": 1, "merge": 0}


@dataclasses.dataclass(frozen=True)
class Axes:
    """The mesh; an axis that is not given is chosen."""

    data: int | None = None
    fsdp: int | None = None
    tensor: int | None = None

    def __post_init__(self):
        at_least(self, "mesh", **{name: 1 for name, n in vars(self).items() if n is not None})


@dataclasses.dataclass(frozen=True)
class Plan:
    """`python -m tpu.aot`: a program, a model, a slice. Names and values are those of a run's config."""

    topology: str
    """`v5e:4x4`, `v5p:2x2x4`, or an accelerator type, `v6e-64`."""
    model: str
    """A preset (presets.py), or a folder with config.json."""
    step: Literal["sft", "decode", "merge"] = "sft"
    mesh: Axes = Axes()
    batch: int | None = None
    """sft: rows a step; null: one for each data × fsdp."""
    micro_batch: int | None = None
    length: int = 2048
    """sft: tokens a row; decode: tokens a cache holds."""
    slots: int | None = None
    """decode: sequences side by side; null: 16 for each data × fsdp."""
    gather: bool = False
    """decode: the run's `mesh.gather_to_decode`: weights whole over fsdp."""
    remat: Literal["none", "full", "dots"] = "full"
    masters: Literal["float32", "bfloat16"] = "float32"
    layers: Literal["stacked", "unrolled"] = "stacked"
    attention: Literal["auto", "xla", "splash"] = "auto"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    logits_at_once: int = 1024
    beside: int | None = None
    """Whole models in float32 that a run holds on the mesh beside the program; null: 1 beside sft (what the round
    started from) and decode (the masters of the weights it reads), 0 beside the merge. One more for `anchor=original`
    from round 2 on, unless `merge.offload`."""

    def __post_init__(self):
        at_least(self, "aot", length=2, logits_at_once=1)
        given = {name: 1 for name in ("batch", "micro_batch", "slots") if getattr(self, name) is not None}
        at_least(self, "aot", **given)
        if self.beside is not None:
            at_least(self, "aot", beside=0)

    @property
    def shape(self) -> dict[str, int]:
        """The mesh, once it is chosen."""
        return {name: n or 1 for name, n in vars(self.mesh).items()}

    @property
    def held(self) -> int:
        return BESIDE[self.step] if self.beside is None else self.beside


def needed(model: ModelConfig, plan: Any) -> float:
    """Bytes of a device on paper: the program's, and the models held beside it."""
    return sum(paper.MEMORY[plan.step](model, plan, plan.shape).values()) + paper.masters(model, plan.shape, plan.held)


def cost(model: ModelConfig, plan: Any, topology: Topology) -> tuple[float, ...]:
    """What a layout is chosen by, among those that fit: the least.

    sft, merge: the least `tensor`, which sums activations in every layer, then the most fsdp, which leaves most memory
    free, but not over all chips of a slice of more than RING: the compiler (libtpu 0.0.52) then sums the gradients
    whole, an all-reduce in place of a reduce-scatter, twice the bytes (docs/scale.md). decode: the seconds of a token
    on paper: the weights a chip reads from its memory and, over fsdp, receives.
    """
    shape, chip = plan.shape, topology.chip
    if plan.step != "decode":
        return shape["tensor"], shape["fsdp"] > RING and shape["fsdp"] == topology.chips, shape["data"]
    f, t = shape["fsdp"], shape["tensor"]
    weights = paper.WIDTH[plan.dtype] * paper.parameters(model) / t
    own = plan.slots / (shape["data"] * f)
    sums = 2 * (t - 1) / t * 2 * model.num_hidden_layers * 4 * model.hidden_size * own
    at_once = weights + paper.decode_memory(model, plan, shape)["caches"]
    gathered = 0.0 if plan.gather else (f - 1) / f * weights
    seconds = at_once / chip.hbm_rate + (gathered + sums) / chip.ici_rate
    return seconds / plan.slots, t


def settle(plan: Plan, model: ModelConfig, topology: Topology) -> tuple[Plan, str]:
    """The plan with its mesh, batch and slots, and why this mesh.

    Of the meshes that cover the slice, that divide the model and the batch, and that fit on paper: the one of the least
    `cost`; if none fits, the one that needs the least memory.

    Raises:
      UserError: no mesh has as many devices as the slice has chips, or none divides the model and the batch.
    """
    possible = [p for shape in shapes_of(plan.mesh, topology.chips) if (p := filled(plan, model, shape)) is not None]
    # jax cannot lay every mesh along a torus; one that is given whole is refused where it is made.
    possible = [p for p in possible if is_along(topology, tuple(p.shape.values()))] or possible
    if not possible:
        given = ", ".join(f"mesh.{name}={n}" for name, n in vars(plan.mesh).items() if n is not None) or "any mesh"
        rows = plan.micro_batch or plan.batch
        raise UserError(
            f"{topology.name} has {topology.chips} chips, and {given} cannot cover them: data × fsdp × tensor must be "
            f"{topology.chips}, fsdp must divide {model.hidden_size} (hidden_size), tensor {model.num_key_value_heads} "
            f"key/value heads" + (f", and data × fsdp the {rows} rows at a time" if rows and plan.step == "sft" else "")
        )
    if all(n is not None for n in vars(plan.mesh).values()):
        return possible[0], "given"
    fitting = [p for p in possible if needed(model, p) <= FULL * topology.chip.hbm]
    if not fitting:
        least = min(possible, key=lambda p: (needed(model, p), p.shape["tensor"]))
        return least, f"none of {len(possible)} fits on paper; this needs least, {needed(model, least) / GIB:.1f} GiB"
    best = min(fitting, key=lambda p: cost(model, p, topology))
    what = "fastest on paper" if plan.step == "decode" else "least tensor, then most fsdp,"
    return best, f"{what} of {len(fitting)} that fit on paper; {len(possible)} possible"


def shapes_of(wish: Axes, chips: int) -> Iterator[dict[str, int]]:
    """Every (data, fsdp, tensor) with as many devices as there are chips that agrees with what is given."""
    divisors = [n for n in range(1, chips + 1) if chips % n == 0]
    for tensor in divisors:
        for fsdp in divisors:
            if chips % (tensor * fsdp) == 0:
                shape = {"data": chips // (tensor * fsdp), "fsdp": fsdp, "tensor": tensor}
                if all(n is None or shape[name] == n for name, n in vars(wish).items()):
                    yield shape


def filled(plan: Plan, model: ModelConfig, shape: dict[str, int]) -> Plan | None:
    """The plan on this mesh; None where the mesh divides not the model or not the rows."""
    t, ways = shape["tensor"], shape["data"] * shape["fsdp"]
    if model.hidden_size % shape["fsdp"] or any(
        n % t for n in (model.num_key_value_heads, model.intermediate_size, model.vocab_size)
    ):
        return None
    batch, slots = plan.batch or plan.micro_batch or ways, plan.slots or SLOTS * ways
    rows = plan.micro_batch or batch
    if plan.step == "sft" and (batch % rows or rows % ways):
        return None
    if plan.step == "decode" and slots % ways:
        return None
    return dataclasses.replace(plan, mesh=Axes(**shape), batch=batch, slots=slots)


def advice(plan: Plan, model: ModelConfig, topology: Topology, over: float) -> str:
    """What to change so that `over` bytes a device less are needed, with what each saves on paper."""
    now = needed(model, plan)
    enough, helps = [], []
    for words, other in changes(plan, model, topology):
        if (saved := now - needed(model, other)) > 0.01 * GIB:
            (enough if saved >= over else helps).append(f"{words} (−{saved / GIB:.1f} GiB)")
    parts = [f"enough on paper: {', '.join(enough)}"] if enough else ["no single change is enough on paper"]
    return "; ".join(parts + ([f"helps: {', '.join(helps)}"] if helps else []))


def changes(plan: Plan, model: ModelConfig, topology: Topology) -> Iterator[tuple[str, Plan]]:
    """Plans that need less, and the keys that make them."""
    shape, ways = plan.shape, plan.shape["data"] * plan.shape["fsdp"]

    def on(**sizes: int) -> Plan | None:
        return filled(plan, model, {**shape, **sizes})

    if plan.step == "sft":
        if plan.remat != "full":
            yield "remat=full", dataclasses.replace(plan, remat="full")
        if plan.batch and (plan.micro_batch or plan.batch) > ways:
            yield f"micro_batch={ways}", dataclasses.replace(plan, micro_batch=ways)
        if plan.masters == "float32":
            yield "masters=bfloat16", dataclasses.replace(plan, masters="bfloat16")
    if shape["data"] > 1 and (other := on(data=1, fsdp=ways)):
        yield f"mesh.data=1 mesh.fsdp={ways}", other
    if shape["fsdp"] % 2 == 0 and (other := on(fsdp=shape["fsdp"] // 2, tensor=2 * shape["tensor"])):
        yield f"mesh.fsdp={shape['fsdp'] // 2} mesh.tensor={2 * shape['tensor']}", other
    if plan.step != "merge" and plan.length > 256:
        yield f"length={plan.length // 2}", dataclasses.replace(plan, length=plan.length // 2)
    if plan.gather:
        yield "gather=false", dataclasses.replace(plan, gather=False)
    if plan.step == "decode" and plan.slots and plan.slots > ways:
        yield f"slots={ways}", dataclasses.replace(plan, slots=ways)
    if topology.larger is not None:
        larger = read(topology.larger)
        free = dataclasses.replace(plan, topology=larger.name, mesh=Axes(), micro_batch=None, batch=None, slots=None)
        yield f"topology={larger.name}", settle(free, model, larger)[0]
