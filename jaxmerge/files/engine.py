r"""Run the jobs of a merge out of core: read, merge and write at once, in memory bounded by the largest tensor.

A job goes through in pieces. Where its rule works element by element, a piece is a run of at most `CHUNK` elements,
flat, zero-padded to one of few lengths: a handful of compilations for all tensors of all models. Else it is the whole
tensor. A piece passes three stations, each a thread, each busy with another piece:

  readers   fill buffers from the inputs' files
  merger    calls the rule on the buffers, in place on a CPU, and starts the statistics
  writer    writes the result to its place, digests it, keeps the journal, gives the buffers back

Buffers together never exceed the inputs of the largest piece (or a small floor), which also limits how many pieces are
on their way. With the result and what the rule needs beside it that makes the peak.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from jaxmerge.files.buffers import Buffers
from jaxmerge.files.checkpoints.safetensors import Writer
from jaxmerge.files.journal import Changed, Journal
from jaxmerge.files.plan import Input, Job
from jaxmerge.files.tally import Tally, sums
from jaxmerge.leaves import dtypes
from jaxmerge.rules import RULES

CHUNK = 2**21  # elements
LENGTHS = (2**12, 2**16, CHUNK)
FLOOR = 96 * 2**20  # bytes of buffers: enough for several chunks of several models on their way
READERS = 4
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Elements start … start + count of a job's tensors, in buffers of `length` elements."""

    job: Job
    start: int
    count: int
    length: int
    whole: bool

    @property
    def sizes(self) -> list[int]:
        """Bytes of a buffer for each tensor that is read."""
        lengths = [math.prod(i.tensor.shape) if self.whole else self.length for i in self.job.reads]
        return [n * i.tensor.dtype.itemsize for n, i in zip(lengths, self.job.reads, strict=True)]

    def bytes_of(self, read: Input) -> int:
        """How many bytes of a tensor belong to the piece: all of one that is read whole, whatever its shape."""
        return read.tensor.size if self.whole else self.count * read.tensor.dtype.itemsize

    @property
    def last(self) -> bool:
        return self.start + self.count == math.prod(self.job.shape)


def pieces(job: Job) -> Iterator[Piece]:
    """Cut a job into pieces."""
    n = math.prod(job.shape)
    if not _is_elementwise(job) or n == 0:
        yield Piece(job, 0, n, n, whole=True)
        return
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        yield Piece(job, start, count, next(length for length in LENGTHS if length >= count), whole=False)


def _is_elementwise(job: Job) -> bool:
    needs = RULES[job.method.rule].needs
    return needs.elementwise and is_float(job.out_dtype) and all(i.tensor.chunked for i in job.reads)


def is_float(dtype: np.dtype) -> bool:
    """Say whether a rule merges this dtype; others are copied."""
    return jnp.issubdtype(dtype, jnp.floating)


def is_copy(job: Job) -> bool:
    """Say whether the result is the one input as it is, but for a cast.

    Such a job does no arithmetic: XLA takes numbers below the normal range for zero on some devices, CPUs among them.
    """
    only = len(job.inputs) == 1 and job.base is None
    rule, given = job.method.rule, job.coefficients
    if rule == "average":
        # A single model's weight is divided by itself, unless it is told not to be.
        return only and (bool(given.get("normalize", True)) or given["weights"] == [1.0])
    return only and rule == "passthrough" and given["scale"] == 1.0


def buffer_bytes(jobs: tuple[Job, ...]) -> int:
    """Return the limit of the buffers for these jobs."""
    return max([FLOOR, *(sum(next(pieces(job)).sizes) for job in jobs)])


class Engine:
    """The three stations. seed: of the random rules. limit: bytes of buffers. device: where the arithmetic runs."""

    def __init__(self, writer: Writer, journal: Journal, *, seed: int, limit: int, device: Any):
        self.writer, self.journal, self.seed, self.device = writer, journal, seed, device
        self.in_place = device.platform == "cpu"
        self.buffers = Buffers(limit)
        self._progress: dict[str, _Progress] = {}

    def run(self, jobs: tuple[Job, ...], progress: Progress | None = None) -> None:
        """Run the jobs; the first error of a station is raised, after what is on its way has stopped."""
        total, done = sum(job.read_bytes for job in jobs), 0
        on_way: collections.deque[tuple[Piece, Future[None]]] = collections.deque()

        def finish(piece: Piece, future: Future[None]) -> None:
            nonlocal done
            future.result()
            done += sum(map(piece.bytes_of, piece.job.reads))
            if progress is not None:
                progress(done, total, piece.job.name)

        with contextlib.ExitStack() as stack:
            read, merge, write = (
                stack.enter_context(_executor(workers, name))
                for workers, name in ((READERS, "read"), (1, "merge"), (1, "write"))
            )
            for job in jobs:
                for piece in pieces(job):
                    buffers = self.buffers.take(piece.sizes)
                    reads = [
                        read.submit(_fill, operand, piece, buffer)
                        for operand, buffer in zip(job.reads, buffers, strict=True)
                    ]
                    merged = merge.submit(self._merge, piece, reads, buffers)
                    on_way.append((piece, write.submit(self._write, piece, merged, buffers)))
                    while on_way and on_way[0][1].done():
                        finish(*on_way.popleft())
            while on_way:
                finish(*on_way.popleft())

    def _merge(self, piece: Piece, reads: list[Future[None]], buffers: list[np.ndarray]) -> tuple[np.ndarray, list]:
        futures.wait(reads)  # all: a buffer that is still being filled must not be given back
        for done in reads:
            done.result()
        job = piece.job
        arrays = [
            b.view(i.tensor.dtype).reshape(i.tensor.shape if piece.whole else (piece.length,))
            for i, b in zip(job.reads, buffers, strict=True)
        ]
        if not is_float(job.out_dtype):
            return arrays[-1 if job.base is not None else 0].copy(), []
        copied = arrays[0].astype(job.out_dtype) if is_copy(job) else None
        with precision(job), jax.default_device(self.device):
            if not self.in_place:
                arrays = jax.device_put(arrays, self.device)
            merged = merge_arrays(job, arrays, self.seed) if copied is None else copied
            # On a CPU views of host memory, cut into chunks without a copy.
            flat = [np.asarray(a) if self.in_place else a for a in (*arrays[: len(job.operands)], merged)]
            return np.asarray(merged), list(_sums(job, [a.reshape(-1) for a in flat], piece.count))

    def _write(self, piece: Piece, merged: Future[tuple[np.ndarray, list]], buffers: list[np.ndarray]) -> None:
        job = piece.job
        try:
            array, parts = merged.result()
            state = self._progress.setdefault(job.name, _Progress(job))
            for digest, read, buffer in zip(state.inputs, job.reads, buffers, strict=True):
                digest.update(buffer[: piece.bytes_of(read)].data)
            data = array.reshape(-1)[: piece.count].view(np.uint8)
            self.writer.write(job.name, data, piece.start * job.out_dtype.itemsize)
            state.output.update(data.data)
            finite = [state.tally.add(part) for part in parts]
            if not all(finite):
                arrays = [b[: piece.bytes_of(i)].view(i.tensor.dtype) for i, b in zip(job.reads, buffers, strict=True)]
                check_finite(job, arrays, array.reshape(-1)[: piece.count])
            if piece.last:
                self.journal.add(state.record())
                del self._progress[job.name]
        finally:
            self.buffers.give(buffers)


class _Progress:
    """Digests and statistics of a job that is on its way."""

    def __init__(self, job: Job):
        self.job = job
        self.inputs = [xxhash.xxh3_128() for _ in job.reads]
        self.output = xxhash.xxh3_128()
        self.tally = Tally(len(job.operands) - 1, math.prod(job.shape))

    def record(self) -> dict[str, Any]:
        return {
            "tensor": self.job.name,
            "digest": self.output.hexdigest(),
            "inputs": [
                [read.model, read.tensor.name, digest.hexdigest()]
                for read, digest in zip(self.job.reads, self.inputs, strict=True)
            ],
            "models": len(self.job.operands),  # so many of the inputs are weights; statistics are behind them
            "statistics": self.tally.summary(),
        }


def merge_arrays(job: Job, arrays: list[Any], seed: int) -> Any:
    """Call the job's rule on what is read (inputs, the base, statistics): float32 arithmetic, one cast at the end.

    Raises:
      ValueError: the rule takes no such operands or coefficients; names the tensor.
    """
    rule = RULES[job.method.rule]
    keywords: dict[str, Any] = dict(job.coefficients)
    if job.stacked and not rule.needs.elementwise:  # else it comes in runs of elements, and is the same
        keywords["stacked"] = (job.path,)
    if job.method.reads is not None:
        arrays, statistics = arrays[: len(job.operands)], arrays[len(job.operands) :]
        given = [{job.path: array} for array in statistics] or [{} for _ in job.inputs]
        keywords[job.method.reads.keyword] = given
    if job.base is not None:
        *arrays, base = arrays
        keywords["base"] = {job.path: base}
    if rule.needs.key != "none":
        keywords |= {"key": jax.random.key(seed, impl="threefry2x32"), "names": [i.model for i in job.inputs]}
    try:
        with dtypes(job.dtype, job.out_dtype):
            return rule([{job.path: array} for array in arrays], **keywords)[job.path]
    except ValueError as error:
        raise ValueError(f"tensor {job.name!r}: {error}") from error


def _sums(job: Job, flat: list[Any], count: int) -> Iterator[Any]:
    """Start the statistics of each chunk of operands and result; they are ready later."""
    *operands, result = flat
    # The base is what deltas are taken from, else the first model.
    reference, *others = operands if job.base is None else (operands[-1], *operands[:-1])
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        length = next(length for length in LENGTHS if length >= size)
        first, *rest, last = (_padded(array, start, size, length) for array in (reference, *others, result))
        yield sums(first, rest, last, size, dtype=job.dtype)


def _padded(array: Any, start: int, size: int, length: int) -> Any:
    part = array[start : start + length]
    if part.size == length:
        return part
    numpy = np if isinstance(part, np.ndarray) else jnp
    return numpy.concatenate([part[:size], numpy.zeros(length - size, part.dtype)])


def _fill(operand: Input, piece: Piece, buffer: np.ndarray) -> None:
    size = piece.bytes_of(operand)
    operand.tensor.read_into(buffer[:size], piece.start * operand.tensor.dtype.itemsize)
    buffer[size:] = 0


def check_finite(job: Job, arrays: list[np.ndarray], result: np.ndarray) -> None:
    """Raise if an operand or the result holds a NaN or an infinity, naming which and how many."""
    for operand, array in zip(job.reads, arrays, strict=True):
        if bad := _bad(array):
            raise ValueError(
                f"tensor {operand.tensor.name!r} of {operand.tensor.where} has {bad} NaN or infinite elements; "
                "wanted finite numbers"
            )
    if bad := _bad(result):
        raise ValueError(
            f"tensor {job.name!r} of the result has {bad} NaN or infinite elements as {job.out_dtype}, though the "
            "inputs have none; look at its coefficients, or choose a wider out_dtype"
        )


def _bad(array: np.ndarray) -> int:
    return int(np.sum(~np.isfinite(array.astype(np.float64))))


def precision(job: Job) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which jax keeps the precision of a job's operands: 64-bit floats would be halved."""
    given = [job.dtype, job.out_dtype, *(read.tensor.dtype for read in job.reads)]
    # NumPy takes None for float64.
    wide = any(dtype is not None and np.dtype(dtype) == np.float64 for dtype in given)
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


@contextlib.contextmanager
def _executor(workers: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool that drops what has not begun when its block ends by an error."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix=f"merge-{name}")
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        pool.shutdown()


def verified(jobs: tuple[Job, ...], writer: Writer, journal: Journal) -> Mapping[str, Mapping[str, Any]]:
    """Return the journal's records of jobs that are done and whose bytes are what it says.

    Where an input's file has another time than the journal's, the inputs are digested again.

    Raises:
      Changed: an input of a job that is done is another than it was.
    """
    kept = {}
    buffer = np.empty(2**23, np.uint8)
    for job in jobs:
        record = journal.done.get(job.name)
        if record is None:
            continue
        for operand, (_, _, digest) in zip(job.reads, record["inputs"], strict=True):
            if journal.touched and _digest(operand.tensor.read_into, operand.tensor.size, buffer) != digest:
                raise Changed(
                    f"tensor {operand.tensor.name!r} of {operand.tensor.where} has changed since this merge was begun; "
                    f"put it back to go on, or remove {journal.folder} to begin again"
                )
        if _digest(lambda b, s, name=job.name: writer.read_back(name, b, s), job.size, buffer) == record["digest"]:
            kept[job.name] = record
        else:
            journal.notes.append(f"{job.name} had not reached the disk; merged again")
    return kept


def _digest(read_into: Callable[[np.ndarray, int], None], size: int, buffer: np.ndarray) -> str:
    found = xxhash.xxh3_128()
    for start in range(0, size, buffer.size):
        part = buffer[: min(buffer.size, size - start)]
        read_into(part, start)
        found.update(part.data)
    return found.hexdigest()
