"""Which tensors a Hugging Face folder holds, and in which of its files: the one place that decides it.

As transformers reads a folder: `model.safetensors` if it is there, else the shards that the index names. The index is
the word on shards: a tensor is the named shard's even if another shard has one of that name, and what the index does
not name is left out. Where a folder holds more than what is read, a note says so.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

from jaxmerge.files.checkpoints.safetensors import INDEX, SINGLE, Stored, read_header
from jaxmerge.files.documents import read_json, some

LISTED = 3  # names in a message


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's files of weights by their names. has: whether there is such a file. header: reads its tensors."""

    has: Callable[[str], bool]
    header: Callable[[str], dict[str, Stored]]


def weights_in(folder: pathlib.Path) -> Weights:
    """The files of weights that lie in a folder."""
    return Weights(lambda name: (folder / name).exists(), lambda name: read_header(folder / name))


def open_folder(folder: pathlib.Path, weights: Weights | None = None) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """Return every tensor of a Hugging Face folder by name, and notes on what was left out.

    Args:
      folder: holds config.json and, where there is one, the index.
      weights: the files of weights; by default those in the folder.

    Raises:
      ValueError: there are no tensors, a file that the index names is missing or damaged, or lies outside the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"model {str(folder)!r} is no folder here; give the path of a Hugging Face folder")
    weights = weights or weights_in(folder)
    index = folder / INDEX
    if weights.has(SINGLE):
        return check_elements(folder, weights.header(SINGLE)), _beside(folder)
    if index.exists():
        tensors, notes = _open_shards(folder, read_index(index), weights)
        return check_elements(folder, tensors), notes
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = some(sorted(file.name for file in folder.glob("*.bin")), LISTED) or "neither these nor a *.bin file"
        raise ValueError(f"model {str(folder)!r} holds no *.safetensors, found {others}; save it as safetensors")
    raise ValueError(f"{folder} holds {[f.name for f in files][:LISTED]} but neither {SINGLE} nor {INDEX}")


def _beside(folder: pathlib.Path) -> tuple[str, ...]:
    """Say what lies beside a single file without being read."""
    others = sorted(file.name for file in folder.glob("model-*-of-*.safetensors"))
    others += [INDEX] if (folder / INDEX).exists() else []
    if not others:
        return ()
    return (
        f"{folder} holds {SINGLE}, which is read, and {some(others, LISTED)}, left over from an earlier save: not read",
    )


def read_index(index: pathlib.Path) -> dict[str, str]:
    """Read tensor name → file name."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{index} has no weight_map, wanted a map from tensor names to files; copy it again")
    for name, file in placed.items():
        parts = pathlib.PurePosixPath(file).parts if isinstance(file, str) else ()
        if not parts or not file.isprintable() or len(file) > 255 or parts[0] == "/" or ".." in parts:
            raise ValueError(
                f"{index}: tensor {name!r} is said to lie in {file!r:.100}, wanted the name of a file in this folder"
            )
    return placed


def _open_shards(
    folder: pathlib.Path, placed: dict[str, str], weights: Weights
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    tensors: dict[str, Stored] = {}
    unnamed: list[str] = []
    for shard in sorted(set(placed.values())):
        if not weights.has(shard):
            raise ValueError(f"{folder / shard} is missing, though {INDEX} names it; copy the whole folder")
        found = weights.header(shard)
        tensors |= {name: tensor for name, tensor in found.items() if placed.get(name) == shard}
        unnamed += [f"{name} of {shard}" for name in found if placed.get(name) != shard]
    lost = sorted(set(placed) - set(tensors))
    if lost:
        raise ValueError(
            f"{folder}: {INDEX} names {len(lost)} tensors that their shards do not hold, first {lost[0]!r} of "
            f"{placed[lost[0]]}; copy the whole folder"
        )
    if not unnamed:
        return tensors, ()
    return tensors, (f"{folder}: {some(unnamed, LISTED)} are not where {INDEX} says, or not in it: left out",)


def check_elements(folder: pathlib.Path, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Raise if weights have no elements: that is what a sharded training leaves that did not gather them."""
    empty = [name for name, tensor in tensors.items() if tensor.shape == (0,)]
    if empty:
        raise ValueError(
            f"{folder}: {len(empty)} of {len(tensors)} tensors have no elements, {some(empty, LISTED)}: saved from a "
            "training that kept them in parts (DeepSpeed ZeRO-3); gather them first, with its zero_to_fp32.py"
        )
    return tensors
