"""Where a program runs, as configured: the device mesh and the processes that run as one."""

from __future__ import annotations

import dataclasses

from ..log import UserError
from ..resolve import at_least


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Device mesh: batch over data and fsdp, parameters over fsdp and tensor."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    cpu_devices: int | None = None
    """Split the CPU into this many virtual devices (tests, laptops)."""
    gather_to_decode: bool = False
    """Decode with weights whole over fsdp, gathered once and not for every token: 2 P/tensor bytes a device."""

    def __post_init__(self):
        at_least(self, "mesh", data=1, fsdp=1, tensor=1)


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Processes that run as one, each started with the same command; where this one finds the others."""

    auto: bool = False
    """Cloud TPU, Slurm, Open MPI, Kubernetes: jax finds them by itself."""
    coordinator: str | None = None
    """host:port of process 0; with it `processes` and `process_id`."""
    processes: int | None = None
    process_id: int | None = None
    start_timeout: int = 300
    """Seconds to wait for all of them."""
    silence: int = 60
    """Seconds after which a process that answers nothing counts as lost."""

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
