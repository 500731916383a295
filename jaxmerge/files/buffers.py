"""Host memory for tensors on their way: taken and given back, so that it is allocated once and bounded."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

ALIGNMENT = 64  # what XLA asks of memory that it uses in place


class Buffers:
    """Byte buffers of at most `limit` bytes together, kept for reuse: fresh pages cost more than a merge of them."""

    def __init__(self, limit: int):
        self.limit = limit
        self.allocated = 0
        self._free: list[np.ndarray] = []
        self._taken = 0
        self._changed = threading.Condition()

    def take(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """Return buffers of these sizes in bytes, all or none; waits until so much is free."""
        if sum(sizes) > self.limit:
            raise ValueError(f"buffers of {sum(sizes)} bytes asked for, the limit is {self.limit}")
        with self._changed:
            while (found := self._try(sizes)) is None:
                if self._taken:
                    self._changed.wait()
                else:
                    # All is free, but in pieces larger than these sizes: start afresh.
                    self._free, self.allocated = [], 0
            self._taken += len(found)
            return [buffer[:size] for buffer, size in zip(found, sizes, strict=True)]

    def give(self, buffers: Sequence[np.ndarray]) -> None:
        """Take back what `take` returned."""
        with self._changed:
            self._taken -= len(buffers)
            self._free += [buffer.base for buffer in buffers]  # type: ignore[misc]
            self._changed.notify_all()

    def _try(self, sizes: Sequence[int]) -> list[np.ndarray] | None:
        taken: list[np.ndarray] = []
        for size in sizes:
            fitting = [i for i, buffer in enumerate(self._free) if size <= buffer.size <= max(2 * size, 2**16)]
            if fitting:
                taken.append(self._free.pop(min(fitting, key=lambda i: self._free[i].size)))
            else:
                while self.allocated + size > self.limit and self._free:
                    self.allocated -= self._free.pop(0).size
                if self.allocated + size > self.limit:
                    self._free += taken
                    return None
                self.allocated += size
                taken.append(_aligned(size))
        return taken


def _aligned(size: int) -> np.ndarray:
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    # An array of its own memory to NumPy, so that slices of it have it, not `memory`, as their base.
    return np.frombuffer(memory.data[start : start + size], np.uint8)
