r"""Orbax checkpoints: any pytree of arrays in, its keys joined with dots as names; a finished folder out.

Names, shapes and dtypes come from Orbax, arrays straight from the TensorStore it keeps them in, one at a time: its
own restore takes a fifth of a second a call. Written as `out/weights` with config.json and tokenizer in
`out/model`: the layout of the runs of `jaxmerge.train`, which reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxmerge import install
from jaxmerge.files import disk
from jaxmerge.files.checkpoints import safetensors, shards
from jaxmerge.files.checkpoints.beside import companions_of, write_companions
from jaxmerge.files.checkpoints.heads import drop_tied_head
from jaxmerge.files.checkpoints.source import Source, Tensor
from jaxmerge.files.documents import read_json

METADATA = "_METADATA"
SAID = ("README.md", "merge.json", "mergekit_config.yml")  # what a merged folder says of itself
CHUNK_BYTES = 1 << 25  # of one compressed piece of an array: what reading and writing it holds beside the array


@dataclasses.dataclass(frozen=True)
class Saved:
    """An array of a checkpoint; `key` is its name there."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    checkpoint: pathlib.Path
    key: str

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def where(self) -> str:
        return str(self.checkpoint)

    @property
    def chunked(self) -> bool:
        return False  # stored in compressed pieces, often one an array

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        """Fill `buffer` (uint8, C order) with the bytes from byte `start` of the array on."""
        if start == 0 and buffer.size == self.size and buffer.ctypes.data % self.dtype.itemsize == 0:
            self._read(buffer.view(self.dtype).reshape(self.shape))
        else:
            whole = np.empty(self.shape, self.dtype)
            self._read(whole)
            buffer[:] = whole.reshape(-1).view(np.uint8)[start : start + buffer.size]

    def _read(self, array: np.ndarray) -> None:
        import tensorstore

        try:
            stored = tensorstore.open(_spec(self.checkpoint, self.key), open=True, read=True).result()
            target = tensorstore.array(array, dtype=stored.dtype, write=True)
            for run in _runs(self.shape, stored.chunk_layout.read_chunk.shape):
                target[run].write(stored[run]).result()
        except ValueError as error:
            raise ValueError(f"{self.checkpoint}: array {self.key!r} is damaged: {_first_line(error)}") from None


def _runs(shape: tuple[int, ...], piece: tuple[int | None, ...] | None) -> Iterator[tuple[slice, ...]]:
    """Slices of two pieces along the axis cut most: they are decoded beside the array, and all would be as large."""
    if not shape or piece is None:
        yield ()
        return
    pieces = [min(part or length, length) for part, length in zip(piece, shape, strict=True)]
    axis = max(range(len(shape)), key=lambda i: shape[i] / max(pieces[i], 1))
    step = 2 * max(pieces[axis], 1)
    for first in range(0, shape[axis], step):
        yield (*[slice(None)] * axis, slice(first, min(first + step, shape[axis])))


@functools.lru_cache(maxsize=16)
def _drivers(checkpoint: pathlib.Path) -> tuple[str, bool]:
    """The TensorStore driver of a checkpoint's arrays, and whether they share one database (OCDBT)."""
    settings = read_json(checkpoint / METADATA)
    return "zarr3" if settings.get("use_zarr3") else "zarr", (checkpoint / "manifest.ocdbt").exists()


def _spec(checkpoint: pathlib.Path, key: str) -> dict[str, Any]:
    driver, shared = _drivers(checkpoint)
    file = {"driver": "file", "path": f"{checkpoint.absolute()}/"}
    store = {"driver": "ocdbt", "base": file} if shared else file
    path = f"{key}/" if shared else f"{checkpoint.absolute()}/{key}/"
    return {"driver": driver, "kvstore": {**store, "path": path}}


def find(path: pathlib.Path) -> pathlib.Path | None:
    """Return the one Orbax checkpoint at or below a folder, or None; raise if there are several."""
    for place in (path, path / "weights"):
        if (place / METADATA).is_file():
            return place
    found = sorted(file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/{METADATA}"))
    if not found and (path / "checkpoints").is_dir():
        found = sorted(file.parent for file in path.glob(f"checkpoints/**/weights/{METADATA}"))
    if len(found) > 1:
        raise ValueError(
            f"{path} holds {len(found)} Orbax checkpoints; name one of {', '.join(str(place) for place in found[:4])}"
        )
    return found[0] if found else None


def open_checkpoint(name: str, checkpoint: pathlib.Path) -> Source:
    """Open an Orbax checkpoint: the folder that holds _METADATA. No array is read.

    config.json and the tokenizer are looked for in it, in the folder above, and in `model/` of the folders above.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise ValueError(f"model {name!r}: {_missing()}") from None
    try:
        with one_error(), ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(checkpoint.absolute()).item_metadata.tree
    except Exception as error:  # Orbax raises errors of many kinds for a damaged checkpoint
        raise ValueError(f"{checkpoint}: no readable Orbax checkpoint ({_first_line(error)}); copy it again") from None
    tensors: dict[str, Tensor] = {}
    for leaf_name, leaf in _leaves(tree):
        if getattr(leaf, "dtype", None) is None or leaf.shape is None:
            kind = type(leaf).__name__.removesuffix("Metadata").lower()
            raise ValueError(f"{checkpoint}: {leaf_name!r} is a {kind}, wanted arrays; save it without")
        tensors[leaf_name] = Saved(leaf_name, np.dtype(leaf.dtype), tuple(leaf.shape), checkpoint, leaf.name)
    folder = _described(checkpoint)
    config = read_json(folder / "config.json")
    notes = drop_tied_head(name, tensors, config)
    if not config:
        notes += (f"{name} has no config.json",)
    files = tuple(sorted(file for file in checkpoint.rglob("*") if file.is_file()))
    return Source(name, folder, tensors, config, files, notes, functools.partial(companions_of, folder))


@contextlib.contextmanager
def one_error() -> Iterator[None]:
    """Pass over what the many threads of a failed reading or writing each tell of it, in logs and on stderr.

    One of their errors is raised, which is enough. After it they are passed over to the end of the process, because
    some threads end later.
    """
    if _STRAYS.installed:
        yield
        return
    _STRAYS.install()
    yield
    _STRAYS.remove()  # not reached where it failed


class _Strays:
    """What is told of failures of Orbax's and TensorStore's threads goes to nobody while this is installed."""

    told = ("exception was never retrieved", "_SignalingThread.run() raised", "Event loop is closed")
    logs = tuple(logging.getLogger(name) for name in ("asyncio", "absl"))

    def __init__(self):
        self.installed = False
        self.hooks: tuple[Any, Any] = (None, None)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.is_stray(record.getMessage())

    def is_stray(self, text: str) -> bool:
        return any(part in text for part in self.told)

    def install(self) -> None:
        print_error, print_lost = self.hooks = (sys.excepthook, sys.unraisablehook)
        sys.excepthook = lambda kind, error, trace: (
            None if self.is_stray(str(error)) else print_error(kind, error, trace)
        )
        sys.unraisablehook = lambda lost: None if self.is_stray(str(lost.exc_value)) else print_lost(lost)
        for log in self.logs:
            log.addFilter(self)
        self.installed = True

    def remove(self) -> None:
        for log in self.logs:
            log.removeFilter(self)
        sys.excepthook, sys.unraisablehook = self.hooks
        self.installed = False


_STRAYS = _Strays()


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(i), value) for i, value in enumerate(tree)]
    else:
        return [] if tree is None else [(prefix, tree)]
    return [leaf for key, value in items for leaf in _leaves(value, f"{prefix}.{key}" if prefix else key)]


def _described(checkpoint: pathlib.Path) -> pathlib.Path:
    """The folder of config.json: here, above, or where a run keeps it; else the checkpoint's own."""
    above = checkpoint.absolute().parents[:6]
    candidates = [checkpoint, *above[:1], *(place / "model" for place in above)]
    return next((place for place in candidates if (place / "config.json").is_file()), checkpoint)


def write(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Write a finished safetensors folder as an Orbax checkpoint: `out/weights`, and what describes it in `out/model`.

    Arrays go from the mapped file to the checkpoint a few at a time: memory is about twice the largest.
    """
    stored, _ = shards.open_folder(folder)
    tree = nest({name: _mapped(tensor) for name, tensor in stored.items()})
    with disk.new_folder(out, sum(tensor.size for tensor in stored.values())) as partial:
        write_tree(tree, partial / "weights")
        (partial / "model").mkdir()
        write_companions(partial / "model", companions_of(folder))
        for name, place in (("config.json", partial / "model"), *((name, partial) for name in SAID)):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, place / name)


def _mapped(tensor: safetensors.Stored) -> np.ndarray:
    """The tensor as a view of its file. Its offset may be odd to its dtype, so it is mapped as bytes."""
    raw = np.memmap(tensor.file, np.uint8, "r", offset=tensor.offset, shape=(tensor.size,))
    return np.asarray(raw).view(tensor.dtype).reshape(tensor.shape)


def nest(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Dotted names to nested dictionaries."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *branches, last = name.split(".")
        place = tree
        for key in branches:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ValueError(f"tensor {name!r} lies below another one, {key!r}; no pytree holds both")
        if last in place:
            raise ValueError(f"tensor {name!r} has others below it; no pytree holds both")
        place[last] = array
    return tree


def write_tree(tree: dict[str, Any], path: pathlib.Path) -> None:
    """Write nested dictionaries of NumPy arrays as a checkpoint."""
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise ValueError(f"{path}: {_missing()}") from None

    class AFewAtATime(ocp.type_handlers.NumpyHandler):
        """Waits for some arrays before the next; the plain handler copies and compresses all at once."""

        async def serialize(self, values, infos, args=None):
            del args
            saving = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
            for first, last in _batches([value.nbytes for value in values]):
                for future in await super().serialize(values[first:last], infos[first:last], [saving] * (last - first)):
                    future.result()
            return []

    handler = AFewAtATime(deepcopy_host_arrays=False)
    # Orbax warns of a registry without jax arrays, though none is among these.
    others = (jax.Array, ocp.type_handlers.ArrayHandler())
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, handler), others)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
            checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree))
    except OSError:
        raise  # `new_folder` says what a full disk is
    except Exception as error:
        raise ValueError(f"{path}: the checkpoint could not be written ({_first_line(error)})") from error


def _batches(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of at most CHUNK_BYTES together, or one alone."""
    first = total = 0
    for i, size in enumerate(sizes):
        if i > first and total + size > CHUNK_BYTES:
            yield first, i
            first, total = i, 0
        total += size
    if sizes:
        yield first, len(sizes)


def _missing() -> str:
    return f"Orbax checkpoints need orbax-checkpoint; install it with {install.extra('train')}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
