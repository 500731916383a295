"""Where a program runs, as configured: the device mesh and the processes that run as one."""

from __future__ import annotations

import dataclasses

from ..log import UserError
from ..resolve import at_least


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Device mesh: batch over data, fsdp and expert, parameters over fsdp, expert and tensor."""

    data: int = 1
    """The batch is divided among this many groups of devices, each with a copy of the parameters."""
    fsdp: int = 1
    """Batch and parameters are both divided among this many devices."""
    tensor: int = 1
    """Each matrix product is divided among this many devices."""
    expert: int = 1
    """The experts of a mixture of experts, and the batch, are divided among this many devices."""
    cpu_devices: int | None = None
    """The CPU is split into this many virtual devices (tests, laptops); null leaves it whole."""
    gather_to_decode: bool = False
    """Weights are gathered over fsdp once before decoding, and not for every token; this takes 2 P/tensor bytes a
    device for P parameters."""

    def __post_init__(self):
        at_least(self, "mesh", data=1, fsdp=1, tensor=1, expert=1)

    @property
    def devices(self) -> int:
        """How many devices it has."""
        return self.data * self.fsdp * self.tensor * self.expert


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Processes that run as one, each started with the same command; where this one finds the others."""

    auto: bool = False
    """jax finds the processes by itself: on Cloud TPU, Slurm, Open MPI or Kubernetes."""
    coordinator: str | None = None
    """Process 0 listens at this host:port; `processes` and `process_id` must be given with it."""
    processes: int | None = None
    """The run consists of this many processes."""
    process_id: int | None = None
    """This process has this number, counted from 0."""
    start_timeout: int = 300
    """A process waits this many seconds for all others to start."""
    silence: int = 60
    """A process that answers nothing for this many seconds counts as lost."""

    def __post_init__(self):
        at_least(self, "distributed", start_timeout=1, silence=3)
        given = [name for name in ("coordinator", "processes", "process_id") if getattr(self, name) is not None]
        if self.auto and given:
            raise UserError(f"distributed: auto=true finds what {', '.join(given)} say; give one or the other")
        if given and len(given) < 3:
            missing = {"coordinator", "processes", "process_id"} - set(given)
            raise UserError(f"distributed: {', '.join(given)} without {', '.join(sorted(missing))}")
        if self.processes is not None and self.process_id is not None and not 0 <= self.process_id < self.processes:
            raise UserError(f"distributed.process_id is {self.process_id}; with {self.processes} processes: from 0 on")

    @property
    def wanted(self) -> bool:
        return self.auto or self.coordinator is not None

    @property
    def by_hand(self) -> tuple[str, int, int]:
        """(address of process 0, number of this one, how many)."""
        return self.coordinator or "", self.process_id or 0, self.processes or 1
