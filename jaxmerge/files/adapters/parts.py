"""The merged modules of an adapter, on disk until the adapter is whole: an interrupted merge goes on from them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xxhash

from jaxmerge.files.adapters.folder import Adapter, Module
from jaxmerge.files.checkpoints.source import read
from jaxmerge.files.journal import Changed, Journal

FOLDER = "modules"
"""In the journal's folder, which goes away once the result has its name."""


@dataclasses.dataclass(frozen=True)
class Merged:
    """The factors of a module of the result as they are stored, and how much of the merged change they hold."""

    a: np.ndarray
    b: np.ndarray
    explained: float
    square: float  # ‖B·A‖²


class Parts:
    """Modules that an earlier try merged and this one adds to: of each a file with the bytes of A and B, and a line."""

    def __init__(self, journal: Journal, modules: Mapping[str, Module], adapters: Sequence[Adapter], dtype: np.dtype):
        self._journal, self._modules, self._adapters, self._dtype = journal, modules, adapters, dtype
        self._there = 0
        folder = journal.folder / FOLDER
        if not journal.done:  # of another recipe
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        self._files = {key: folder / str(number) for number, key in enumerate(modules)}

    def take(self, key: str, merge: Callable[[str], Merged]) -> Merged:
        """Return a module: the one that is there, or what `merge` makes of it, which is kept."""
        found = self._find(key)
        if found is None:
            found = merge(key)
            self._keep(key, found)
        else:
            self._there += 1
        return found

    def _find(self, key: str) -> Merged | None:
        """Return a module that is there as it was written, or None.

        Raises:
          Changed: an adapter has other factors than those that the module was merged from.
        """
        record = self._journal.done.get(key)
        if record is None:
            return None
        module = self._modules[key]
        # Only where a file has another time than it had are the factors in it digested.
        if self._journal.touched and self._inputs(key) != record["inputs"]:
            raise Changed(
                f"module {module.name!r} of an adapter has changed since this merge was begun; put it back to go on, "
                f"or remove {self._journal.folder} to begin again"
            )
        stored = self._files[key].read_bytes() if self._files[key].is_file() else b""
        if xxhash.xxh3_128_hexdigest(stored) != record["digest"]:
            self._journal.notes.append(f"{module.name} had not reached the disk; merged again")
            return None
        (out, into), rank = module.shape, record["rank"]
        a, b = np.split(np.frombuffer(stored, self._dtype), [rank * into])
        return Merged(a.reshape(rank, into), b.reshape(out, rank), record["explained"], record["square"])

    def _keep(self, key: str, merged: Merged) -> None:
        """Write a module, and then its line."""
        stored = merged.a.tobytes() + merged.b.tobytes()
        self._files[key].write_bytes(stored)
        self._journal.add({
            "tensor": key, "rank": len(merged.a), "explained": merged.explained, "square": merged.square,
            "inputs": self._inputs(key), "digest": xxhash.xxh3_128_hexdigest(stored),
        })  # fmt: skip

    def tell(self) -> None:
        """Note how many modules an earlier try had left."""
        if self._there:
            self._journal.notes.append(f"{self._there} of {len(self._modules)} modules were there already")

    def _inputs(self, key: str) -> list[str]:
        """A digest of the module in each adapter that has it."""
        return [_digest(adapter.modules[key]) for adapter in self._adapters if key in adapter.modules]


def _digest(module: Module) -> str:
    found = xxhash.xxh3_128(repr(module.scale).encode())
    for tensor in (module.a, module.b):
        found.update(read(tensor).tobytes())
    return found.hexdigest()
