"""Cloud TPU generations that run as TPU VMs: which software a machine gets, and how many hosts a slice has.

TPU7x is not here: it runs on Google Kubernetes Engine alone (docs/tpu.md, "Google Kubernetes Engine").
"""

from __future__ import annotations

import re
from typing import NamedTuple

from train.log import UserError
from train.resolve import nearest


class Generation(NamedTuple):
    """What is the same for every slice of a generation.

    Attributes:
      runtime: TPU software version that Google recommends for JAX.
      cores_per_chip: what the number in an accelerator type counts is cores; v5e and v6e have one a chip.
      one_host: sizes, in chips, that are a single host; larger slices have four chips a host.
    """

    runtime: str
    cores_per_chip: int
    one_host: tuple[int, ...]


# https://cloud.google.com/tpu/docs/runtimes and the page of each generation.
GENERATIONS = {
    "v4": Generation("tpu-ubuntu2204-base", 2, (4,)),
    "v5litepod": Generation("v2-alpha-tpuv5-lite", 1, (1, 4, 8)),
    "v5p": Generation("v2-alpha-tpuv5", 2, (4,)),
    "v6e": Generation("v2-alpha-tpuv6e", 1, (1, 4, 8)),
}
CHIPS_PER_HOST = 4

SYNONYMS = {"v5e": "v5litepod"}


class Slice(NamedTuple):
    """An accelerator type, read."""

    accelerator: str
    generation: Generation
    chips: int
    hosts: int


def read(accelerator: str) -> Slice:
    """The chips and hosts of an accelerator type such as `v5litepod-16`, `v6e-64`, `v4-32` or `v5p-128`.

    Example:
      >>> read("v6e-64").hosts, read("v6e-8").hosts, read("v5p-128").chips
      (16, 1, 64)
    """
    name, _, size = accelerator.partition("-")
    if re.fullmatch("(tpu)?7x|tpu7x|v7x?", name):
        raise UserError(f"accelerator is {accelerator!r}; TPU7x runs on GKE alone: see docs/tpu.md")
    name = SYNONYMS.get(name, name)
    if name not in GENERATIONS:
        raise UserError(f"accelerator is {accelerator!r}; no such generation{nearest(name, list(GENERATIONS))}")
    generation = GENERATIONS[name]
    if not size.isdecimal() or int(size) % generation.cores_per_chip or not int(size):
        raise UserError(f"accelerator is {accelerator!r}; a size is wanted, such as {name}-16")
    chips = int(size) // generation.cores_per_chip
    if chips not in generation.one_host and chips % CHIPS_PER_HOST:
        raise UserError(
            f"accelerator is {accelerator!r}: {chips} chips; wanted {', '.join(map(str, generation.one_host))} or a "
            f"multiple of {CHIPS_PER_HOST}"
        )
    hosts = 1 if chips in generation.one_host else chips // CHIPS_PER_HOST
    return Slice(f"{name}-{size}", generation, chips, hosts)
