"""Slices by the name the compiler knows them by (`v5e:4x4`): their chips, and their devices without a machine."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxmerge import install
from train.improve.devices import DEVICES
from train.log import UserError
from train.resolve import nearest

from . import machines

GIB = 2**30


class Chip(NamedTuple):
    """What one chip has, by the vendor's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of Cloud TPU's docs.

    Attributes:
      accelerator: prefix of its accelerator types, a key of machines.GENERATIONS.
      hbm, flops, hbm_rate: as in train/improve/devices.py.
      ici_rate: bytes a second that arrive from all its neighbours together; half of the pages' "bidirectional".
      slices: the shapes a slice can have here, ascending, up to 256 chips.
    """

    accelerator: str
    hbm: float
    flops: float
    hbm_rate: float
    ici_rate: float
    slices: tuple[str, ...]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
CHIPS = {
    "v4": Chip("v4", *DEVICES["TPU v4"], 300e9, CUBES),
    "v5e": Chip("v5litepod", *DEVICES["TPU v5e"], 200e9, FLAT),
    "v6e": Chip("v6e", *DEVICES["TPU v6e"], 400e9, FLAT),
    "v5p": Chip("v5p", *DEVICES["TPU v5p"], 600e9, CUBES),
}


class Topology(NamedTuple):
    """A slice, read."""

    generation: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def larger(self) -> str | None:
        """The next slice with more chips; None beyond the table."""
        for shape in self.chip.slices:
            if math.prod(map(int, shape.split("x"))) > self.chips:
                return f"{self.generation}:{shape}"
        return None


def read(name: str) -> Topology:
    """A topology such as `v5e:4x4` or `v5p:2x2x4`, or the accelerator type of a machine, such as `v5litepod-16`.

    Example:
      >>> read("v5e:4x4").chips, read("v5p-128").name, read("v6e:8x8").larger
      (16, 'v5p:4x4x4', 'v6e:8x16')
    """
    if "-" in name and ":" not in name:
        return _of_machine(name)
    generation, _, shape = name.partition(":")
    if generation not in CHIPS:
        raise UserError(f"topology is {name!r}; no such generation{nearest(generation, list(CHIPS))}")
    slices = CHIPS[generation].slices
    if not re.fullmatch(r"\d+(x\d+)*", shape) or shape not in slices:
        raise UserError(f"topology is {name!r}; slices of {generation}: {', '.join(slices)}")
    return Topology(generation, tuple(map(int, shape.split("x"))))


def _of_machine(accelerator: str) -> Topology:
    """The topology that an accelerator type has unless another is asked for: the most compact one."""
    wanted = machines.read(accelerator)
    prefix = wanted.accelerator.partition("-")[0]
    for generation, chip in CHIPS.items():
        for shape in chip.slices:
            found = Topology(generation, tuple(map(int, shape.split("x"))))
            if chip.accelerator == prefix and found.chips == wanted.chips:
                return found
    known = ", ".join(f"{chip.accelerator} ({generation}:…)" for generation, chip in CHIPS.items())
    raise UserError(
        f"topology is {accelerator!r}, {wanted.chips} chips; no slice of that size is known here. Known, up to 256 "
        f"chips: {known}"
    )


def require_libtpu() -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU needs its compiler, the package libtpu (about 600 MB, no TPU needed): "
            f"{install.extra('tpu-aot')}"
        )


def without_a_machine() -> None:
    """Before jax is first used: compile on the CPU, and keep libtpu from asking the network what machine this is."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # its lock is of a TPU, and here is none
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")  # of nothing: the topology is named when compiling


def devices(topology: Topology) -> Sequence[Any]:
    """The slice's devices, which can be compiled for and not run on."""
    require_libtpu()
    without_a_machine()
    from jax.experimental import topologies

    # Two cores are one device, as on machines; the compiler assumes so of v5p by itself.
    more = {"chip_config_name": "megacore"} if topology.generation == "v4" else {}
    # By keyword: the order of the first two changed between versions of jax.
    found = topologies.get_topology_desc(topology_name=topology.name, platform="tpu", **more).devices
    if len(found) != topology.chips:
        raise UserError(f"{topology.name} has {topology.chips} chips, the compiler sees {len(found)} devices")
    return found


def mesh(topology: Topology, shape: tuple[int, int, int]) -> Any:
    """The mesh a run on the slice would have."""
    from train.runtime.mesh import lay

    data, fsdp, tensor = shape
    return lay((data, fsdp, 1, tensor), devices(topology))


def is_along(topology: Topology, sizes: Sequence[int]) -> bool:
    """Whether each axis of a mesh is a product of some of the slice's axes, each used once; of v5e nothing is wanted.

    Example:
      >>> is_along(read("v5p:4x4x4"), (2, 32, 1)), is_along(read("v5p:4x4x4"), (4, 16, 1))
      (False, True)
    """
    wanted = [n for n in sizes if n > 1]
    if topology.generation == "v5e":
        return True

    def place(wanted: list[int], free: tuple[int, ...]) -> bool:
        if not wanted:
            return True
        for chosen in range(1, 2 ** len(free)):
            taken = [n for i, n in enumerate(free) if chosen >> i & 1]
            if math.prod(taken) == wanted[0]:
                rest = tuple(n for i, n in enumerate(free) if not chosen >> i & 1)
                if place(wanted[1:], rest):
                    return True
        return False

    return place(wanted, topology.shape)
