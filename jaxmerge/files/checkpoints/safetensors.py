r"""Safetensors folders, tensor by tensor: read lazily from one file or many, write shards at known offsets.

The format: 8 bytes little-endian header length, a JSON header name → dtype, shape, offsets, then the bytes.
Parsed here rather than by the package of that name, because a merge reads single tensors into plain buffers
and writes each straight to its place, bfloat16 and float8 included.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
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


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `size` bytes from `offset` in `file`."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: pathlib.Path
    offset: int
    size: int

    @property
    def where(self) -> str:
        return str(self.file)

    @property
    def chunked(self) -> bool:
        return True

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        """Fill `buffer` (uint8) with the bytes from byte `start` of the tensor on."""
        view = memoryview(buffer)
        at = self.offset + start
        handle = os.open(self.file, os.O_RDONLY)
        try:
            while view:
                count = os.preadv(handle, [view], at)
                if not count:
                    raise ValueError(
                        f"{self.file} ends inside tensor {self.name!r}; the file is truncated, copy it again"
                    )
                view, at = view[count:], at + count
        finally:
            os.close(handle)


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """Return the tensors of one safetensors file by name; check that the file holds all their bytes."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if length < 8 or size > min(length - 8, MAX_HEADER):
            raise ValueError(f"{path} is no whole safetensors file ({length} bytes); copy it again")
        try:
            header = json.loads(file.read(size))
        except ValueError as error:
            raise ValueError(f"{path} has an unreadable safetensors header ({error}); copy it again") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: tensor {name!r} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: tensor {name!r} of {dtype}{list(shape)} is given {end - start} bytes")
        if 8 + size + end > length:
            raise ValueError(
                f"{path} is truncated: tensor {name!r} ends at byte {8 + size + end}, the file at {length}; "
                "copy it again"
            )
        tensors[name] = Stored(name, dtype, shape, path, 8 + size + start, end - start)
    return tensors


def open_folder(folder: pathlib.Path) -> dict[str, Stored]:
    """Return every tensor of a Hugging Face folder by name: one file, or shards with an index."""
    if not folder.is_dir():
        raise ValueError(f"model {str(folder)!r} is no folder here; give the path of a Hugging Face folder")
    index = folder / INDEX
    if index.exists():
        try:
            placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{index} is no readable index ({error!r})") from None
        tensors: dict[str, Stored] = {}
        for shard in sorted(set(placed.values())):
            if not (folder / shard).exists():
                raise ValueError(f"{folder / shard} is missing, though {INDEX} names it; copy the whole folder")
            tensors |= read_header(folder / shard)
        lost = sorted(set(placed) - set(tensors))
        if lost:
            raise ValueError(f"{folder}: the index names {len(lost)} tensors no shard holds, first {lost[0]!r}")
        return tensors
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"model {str(folder)!r} holds no *.safetensors; convert it to safetensors first")
    raise ValueError(f"{folder} holds {[f.name for f in files][:3]} but neither {SINGLE} nor {INDEX}")


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
