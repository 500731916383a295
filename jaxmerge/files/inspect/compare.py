r"""How far checkpoints are from each other: per tensor, per layer, in all; both read once and never held whole.

    compare(base, tuned)      what training changed
    compare(base, one, two)   and how two trainings agree: cosines of their deltas, conflicts of sign

The measures are those of `moments.summarise`.
"""

from __future__ import annotations

import functools
import operator
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxmerge import where
from jaxmerge.files.checkpoints.source import Source, Tensor
from jaxmerge.files.experts.layout import unstacked
from jaxmerge.files.inspect.moments import Moments, Workspace, summarise, working_dtype

Progress = Callable[[int, int, str], None]
SPAN = 1 << 22  # elements read at a time


def statistics(base: np.ndarray, *others: np.ndarray) -> dict[str, Any]:
    """Measure how arrays differ from `base`, elementwise and in all; see `moments.summarise`.

    Example:
      >>> found = statistics(np.array([3.0, 4.0]), np.array([3.0, -1.0]))
      >>> found["norm"], found["models"][0]["relative"], found["models"][0]["flipped"]
      (5.0, 1.0, 0.5)
    """
    flat = [np.ascontiguousarray(array).reshape(-1) for array in (base, *others)]
    return summarise(Workspace(len(others), working_dtype([a.dtype for a in flat])).measure(flat))


def compare(
    base: Source, *others: Source, threads: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Compare open checkpoints with `base`.

    Args:
      base: the model before training.
      others: models after it, one or more.
      threads: that read and measure; as many as there are cores without it.
      progress: called with bytes read so far, bytes to read, and a tensor's name.

    Returns:
      Plain data, ready for json.dumps:
      base, models: names, as the sources give them.
      tensors: by name, in the base's order, `moments.summarise` and shape, dtypes.
      layers: the same, pooled by layer (`model/layers/3`, `model/embed_tokens`), and overall: pooled over all.
      missing: model → tensors of the base that it lacks; extra: model → tensors that the base lacks.
      unlike: tensors not compared, for their shapes differ: {tensor, base, model, found, wanted}.
      nonfinite: {model, tensor, nan, infinite}, counts of elements; in measures these elements count as 0.
      bytes, seconds.

    Raises:
      ValueError: no model to compare, or no tensor in common.
    """
    begin = time.perf_counter()
    if not others:
        raise ValueError(f"compare: only {base.name!r} is given; name at least one model to compare with it")
    sources = tuple(unstacked(source, []) for source in (base, *others))
    base, others = sources[0], sources[1:]
    unlike = _unlike(sources)
    left = {entry["tensor"] for entry in unlike}
    shared = {
        name: tuple(source.tensors[name] for source in sources)
        for name in base.tensors
        if name not in left and all(name in source.tensors for source in others)
    }
    if not shared:
        names = ", ".join(repr(source.name) for source in others)
        raise ValueError(f"{base.name!r} has no tensor in common with {names}; compare models of one architecture")
    found = _measure_all(shared, threads or _cores(), progress)
    layers: dict[str, Moments] = {}
    for name, total in found.items():
        group = where.layer_group(name.replace(".", "/"))
        layers[group] = layers[group] + total if group in layers else total
    return {
        "base": base.name,
        "models": [source.name for source in others],
        "tensors": {
            name: summarise(total)
            | {"shape": list(shared[name][0].shape), "dtypes": [str(t.dtype) for t in shared[name]]}
            for name, total in found.items()
        },
        "layers": {group: summarise(total) for group, total in layers.items()},
        "overall": summarise(functools.reduce(operator.add, found.values())),
        "missing": {s.name: [name for name in base.tensors if name not in s.tensors] for s in others},
        "extra": {s.name: [name for name in s.tensors if name not in base.tensors] for s in others},
        "unlike": unlike,
        "nonfinite": [
            {"model": source.name, "tensor": name, "nan": int(total.nan[i]), "infinite": int(total.infinite[i])}
            for name, total in found.items()
            for i, source in enumerate(sources)
            if total.nan[i] or total.infinite[i]
        ],
        "bytes": sum(tensor.size for tensors in shared.values() for tensor in tensors),
        "seconds": time.perf_counter() - begin,
    }


def _unlike(sources: Sequence[Source]) -> list[dict[str, Any]]:
    base = sources[0]
    return [
        {
            "tensor": name,
            "base": base.name,
            "model": source.name,
            "found": list(source.tensors[name].shape),
            "wanted": list(tensor.shape),
        }
        for name, tensor in base.tensors.items()
        for source in sources[1:]
        if name in source.tensors and source.tensors[name].shape != tensor.shape
    ]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Reader(threading.local):
    """Buffers of one thread."""

    def __init__(self) -> None:
        self.buffers: list[np.ndarray] = []
        self.works: dict[tuple[int, np.dtype], Workspace] = {}

    def measure(self, tensors: Sequence[Tensor], start: int, stop: int) -> Moments:
        while len(self.buffers) < len(tensors):
            self.buffers.append(np.empty(0, np.uint8))
        arrays = []
        for i, tensor in enumerate(tensors):
            size = (stop - start) * tensor.dtype.itemsize
            if self.buffers[i].size < size:
                self.buffers[i] = np.empty(size, np.uint8)
            tensor.read_into(self.buffers[i][:size], start * tensor.dtype.itemsize)
            arrays.append(self.buffers[i][:size].view(tensor.dtype))
        key = (len(tensors) - 1, working_dtype([tensor.dtype for tensor in tensors]))
        if key not in self.works:
            self.works[key] = Workspace(*key)
        return self.works[key].measure(arrays)


def _spans(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    elements = tensors[0].size // tensors[0].dtype.itemsize
    step = SPAN if all(tensor.chunked for tensor in tensors) else max(elements, 1)
    for start in range(0, elements, step):
        yield start, min(start + step, elements)


def _measure_all(shared: dict[str, tuple[Tensor, ...]], threads: int, progress: Progress | None) -> dict[str, Moments]:
    """Measure spans of all tensors in parallel; their sums are added in order, so threads change no digit."""
    tasks = [(name, *span) for name, tensors in shared.items() for span in _spans(tensors)]
    total = sum(tensor.size for tensors in shared.values() for tensor in tensors)
    found = {name: Moments.zero(len(tensors) - 1) for name, tensors in shared.items()}
    reader, done = _Reader(), 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            parts = pool.map(lambda task: reader.measure(shared[task[0]], task[1], task[2]), tasks)
            for (name, start, stop), part in zip(tasks, parts, strict=True):
                found[name] += part
                done += sum((stop - start) * tensor.dtype.itemsize for tensor in shared[name])
                if progress is not None:
                    progress(done, total, name)
        finally:
            # After an error, what has not begun is not begun.
            pool.shutdown(wait=True, cancel_futures=True)
    return found
