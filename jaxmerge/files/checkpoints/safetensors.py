r"""The safetensors format: headers read and checked, tensors read lazily, shards written at known offsets.

The format: 8 bytes little-endian header length, a JSON header name → dtype, shape, offsets, then the bytes.
Parsed here rather than by the package of that name, because a merge reads single tensors into plain buffers
and writes each straight to its place, bfloat16 and float8 included. A header is held to all that the format demands:
unique names, whole non-negative shapes, offsets that tile the data, and nothing behind them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxmerge.files.checkpoints.handles import OpenFile

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000


class NotHere(ValueError):
    """The file of a tensor is on the hub, and its header alone was read."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `size` bytes from `offset` in `file`, which stays open as `opened`; None: it is not here."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: pathlib.Path
    offset: int
    size: int
    opened: OpenFile | None = dataclasses.field(repr=False, compare=False)

    @property
    def where(self) -> str:
        return str(self.file)

    @property
    def chunked(self) -> bool:
        return True

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        """Fill `buffer` (uint8) with the bytes from byte `start` of the tensor on."""
        if self.opened is None:
            raise NotHere(f"{self.file} is not downloaded, for a dry run reads headers alone; run it without")
        view = memoryview(buffer)
        at = self.offset + start
        while view:
            count = os.preadv(self.opened.handle, [view], at)
            if not count:
                raise ValueError(f"{self.file} ends inside tensor {self.name!r}; the file is truncated, copy it again")
            view, at = view[count:], at + count


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """Return the tensors of one safetensors file by name, in the order of their bytes.

    Raises:
      ValueError: the header, or the length of the file, is not what the format demands.
    """
    opened = OpenFile(path)
    length = opened.size
    size = int.from_bytes(os.pread(opened.handle, 8, 0), "little")
    if length < 8 or size > min(length - 8, MAX_HEADER):
        raise ValueError(f"{path} is no whole safetensors file ({length} bytes); copy it again")
    text = os.pread(opened.handle, size, 8)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has an unreadable safetensors header ({error}); copy it again") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the safetensors header is a {type(header).__name__}, wanted a JSON object")
    header.pop("__metadata__", None)
    tensors, at = entries_of(path, header, opened, 8 + size)
    if at > length:
        last = next(tensor for tensor in tensors if tensor.offset + tensor.size > length)
        raise ValueError(
            f"{path} is truncated: tensor {last.name!r} ends at byte {last.offset + last.size}, the file at {length}; "
            "copy it again"
        )
    if at < length:
        raise ValueError(f"{path} has {length - at} bytes behind its last tensor; the file is damaged, copy it again")
    return {tensor.name: tensor for tensor in tensors}


def entries_of(
    path: pathlib.Path, header: Mapping[str, Any], opened: OpenFile | None, at: int
) -> tuple[list[Stored], int]:
    """Return the tensors that a header describes, in the order of their bytes, and where the last one ends.

    Args:
      path: of the file, for messages.
      header: name → dtype, shape and offsets.
      opened: the file; None if it is not here.
      at: where the data begin.
    """
    tensors = [_stored(name, entry, path, opened, at) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
    for tensor in tensors:
        if tensor.offset != at:
            raise ValueError(
                f"{path}: tensor {tensor.name!r} begins at byte {tensor.offset}, wanted {at}, where the one before it "
                "ends; the file is damaged, copy it again"
            )
        at += tensor.size
    return tensors, at


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands there twice")
    return found


def _stored(name: str, entry: Any, path: pathlib.Path, opened: OpenFile | None, begin: int) -> Stored:
    """Check a tensor's entry; the data begin at byte `begin` of the file."""
    if not isinstance(entry, dict) or {"dtype", "shape", "data_offsets"} - set(entry):
        raise ValueError(f"{path}: tensor {name!r} is described by {entry!r:.100}, wanted dtype, shape, data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{path}: tensor {name!r} has dtype {code!r:.40}; known are {', '.join(DTYPES)}")
    if not _are_counts(shape):
        raise ValueError(f"{path}: tensor {name!r} has shape {shape!r:.100}, wanted whole numbers from 0")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{path}: tensor {name!r} has data_offsets {offsets!r:.100}, wanted [begin, end]")
    dtype, (start, end) = DTYPES[code], offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path}: tensor {name!r} of {dtype}{shape} is given {end - start} bytes")
    return Stored(name, dtype, tuple(shape), path, begin + start, end - start, opened)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def check_dtype(dtype: np.dtype, name: str, where: str) -> None:
    """Raise unless the format can hold the dtype of a tensor that comes from the file `where`."""
    if dtype not in CODES:
        raise ValueError(
            f"tensor {name!r} of {where} is {dtype}, which safetensors cannot hold; store it as one of "
            f"{', '.join(map(str, CODES))}"
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The files to write and every tensor's place in them."""

    headers: dict[str, bytes]
    sizes: dict[str, int]
    places: dict[str, tuple[str, int]]

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def plan(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], max_shard_bytes: int) -> Plan:
    """Place tensors of known dtype and shape into shards of at most `max_shard_bytes` (or one tensor)."""
    shards: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, shape)
        filled += size
    headers, sizes, places = {}, {}, {}
    for i, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, (dtype, shape) in shard.items():
            size = math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        body = json.dumps(entries, separators=(",", ":")).encode()
        body += b" " * (-len(body) % 8)  # tensors start on a multiple of eight, as the format asks
        headers[file] = len(body).to_bytes(8, "little") + body
        sizes[file] = len(headers[file]) + at
        for name in shard:
            places[name] = (file, len(headers[file]) + entries[name]["data_offsets"][0])
    return Plan(headers, sizes, places)


class Writer:
    """Write tensors to their places in pre-sized files of `folder`; what is there of an earlier try is kept."""

    def __init__(self, folder: pathlib.Path, plan: Plan):
        self.folder, self.plan = folder, plan
        self.files = {}
        for file, size in plan.sizes.items():
            handle = os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o644)
            self.files[file] = handle
            os.ftruncate(handle, size)
            _write_at(handle, plan.headers[file], 0)

    def write(self, name: str, data: np.ndarray, start: int = 0) -> None:
        """Write `data` (uint8) from byte `start` of the tensor on."""
        file, offset = self.plan.places[name]
        _write_at(self.files[file], data.data, offset + start)

    def read_back(self, name: str, buffer: np.ndarray, start: int = 0) -> None:
        """Fill `buffer` (uint8) with what the file holds from byte `start` of the tensor on."""
        file, offset = self.plan.places[name]
        view, at = buffer.data, offset + start
        while view:
            count = os.preadv(self.files[file], [view], at)
            view, at = view[count:], at + count

    def finish(self) -> None:
        """Flush to disk and, for several shards, write the index."""
        for handle in self.files.values():
            os.fsync(handle)
        self.close()
        if len(self.plan.sizes) > 1:
            total = sum(self.plan.sizes[f] - len(self.plan.headers[f]) for f in self.plan.sizes)
            placed = {name: file for name, (file, _) in sorted(self.plan.places.items())}
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2)
            (self.folder / INDEX).write_text(text + "\n")

    def close(self) -> None:
        """Close the files, whatever was written."""
        while self.files:
            os.close(self.files.popitem()[1])


def _write_at(handle: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done


def write_file(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as one safetensors file, each in C order whatever its layout in memory.

    Every file of weights that this project writes from arrays goes through here. A transposed, strided or
    Fortran-ordered array, and a JAX array with a layout of its own, is made contiguous first: safetensors 0.8.0 stores
    such NumPy arrays scrambled without an error.

    Args:
      path: of the file to make; it must not exist.
      arrays: name → NumPy or JAX array, written in this order.
    """
    for name, array in arrays.items():
        check_dtype(np.dtype(array.dtype), name, "the arrays to write")
    places = plan({name: (np.dtype(array.dtype), tuple(array.shape)) for name, array in arrays.items()}, 1 << 62)
    (header,), (size,) = places.headers.values(), places.sizes.values()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.ftruncate(handle, size)
        _write_at(handle, header, 0)
        for name, array in arrays.items():
            flat = np.ascontiguousarray(jax.device_get(array)).reshape(-1).view(np.uint8)
            _write_at(handle, flat.data, places.places[name][1])
        os.fsync(handle)
    finally:
        os.close(handle)
