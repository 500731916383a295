r"""Statistics of a model on data, beside it in a recipe: a folder that `jaxmerge statistics` writes.

  statistics.safetensors   tensors by the names of the model's, float32
  statistics.json          the kind, the model, the data, counts of examples and tokens, and the settings

KINDS says of which tensors of a model there are statistics of a kind, and of what shape. Whoever has gradients or
activations hands arrays to `write`; a recipe's method says which kind it reads (`jaxmerge.files.methods.Reads`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmerge.files.checkpoints.safetensors import Stored, read_header, write_file
from jaxmerge.files.checkpoints.source import Source, Tensor
from jaxmerge.files.disk import new_folder
from jaxmerge.files.documents import read_json, some
from jaxmerge.files.operands import LISTED, Operand, listed
from jaxmerge.files.recipe import Recipe

ARRAYS, ABOUT = "statistics.safetensors", "statistics.json"
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of statistics. of: what it is called in messages. shape: of a tensor's, None where it can have none."""

    of: str
    shape: Callable[[Shape], Shape | None]


KINDS = {
    "fisher": Kind("Fisher information", lambda shape: shape),
    "gram": Kind("Gram matrix", lambda shape: (shape[1], shape[1]) if len(shape) == 2 else None),
}


@dataclasses.dataclass(frozen=True)
class Statistics:
    """An open folder of statistics: the tensors, and what statistics.json says of them."""

    folder: str
    tensors: Mapping[str, Stored]
    about: Mapping[str, Any]


def files_of(folder: str) -> list[pathlib.Path]:
    """Return the files of a folder of statistics.

    Raises:
      ValueError: it is none.
    """
    place = pathlib.Path(folder)
    files = [place / ABOUT, place / ARRAYS]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"{folder} is no folder of statistics, for it has no {missing[0]}; jaxmerge statistics MODEL DATA {folder} "
            "kind=… makes one"
        )
    return files


def open_statistics(folder: str, kind: str) -> Statistics:
    """Open a folder of statistics of a kind."""
    about, arrays = files_of(folder)
    said = read_json(about)
    if said.get("kind") != kind:
        raise ValueError(
            f"{folder} holds statistics of kind {said.get('kind')!r}, wanted {kind!r}; jaxmerge statistics "
            f"{said.get('model', 'MODEL')} DATA FOLDER kind={kind} makes them"
        )
    return Statistics(folder, read_header(arrays), said)


def told(folders: Sequence[str]) -> dict[str, Any]:
    """Return what folders of statistics say of themselves, by folder: for the record of a merge."""
    return {folder: read_json(pathlib.Path(folder) / ABOUT) for folder in folders}


def write(folder: str | os.PathLike[str], kind: str, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write a folder of statistics, whole or not at all.

    Args:
      folder: to make.
      kind: of KINDS.
      arrays: by the names of the model's tensors; NumPy or JAX arrays, brought to the host one at a time.
      about: what they come from; `model` is its name.
    """
    with new_folder(pathlib.Path(folder), sum(array.nbytes for array in arrays.values())) as partial:
        write_file(partial / ARRAYS, arrays)
        (partial / ABOUT).write_text(json.dumps({"kind": kind, **about}, indent=2) + "\n")


class Readings:
    """The statistics that a recipe's method reads, open, and which tensors there were none for.

    Args:
      recipe: a checked recipe; of a method that reads none, nothing is opened.
      sources: its models, open.
      allow: words of `plan.make`: with "missing" a tensor that some models have no statistics of is merged without any.

    Raises:
      ValueError: a folder is none of statistics of this kind, or they are of another model.
    """

    def __init__(self, recipe: Recipe, sources: Mapping[str, Source], allow: frozenset[str]):
        self.reads, self.method, self.allow = recipe.method.reads, recipe.merge_method, allow
        self.open: dict[str, Statistics] = {}
        self.without: list[str] = []
        self.said: list[str] = []
        if self.reads is None:
            return
        entries = [entry for module in recipe.modules for part in module.slices for entry in part.sources]
        for entry in entries:
            assert entry.statistics is not None, "the recipe is checked"
            if entry.statistics not in self.open:
                self.open[entry.statistics] = open_statistics(entry.statistics, self.reads.kind)
            self._check(self.open[entry.statistics], sources[entry.model])

    def _check(self, found: Statistics, source: Source) -> None:
        strange = [name for name in found.tensors if name not in source.tensors]
        if strange:
            raise ValueError(
                f"the statistics in {found.folder} name {some(strange, LISTED)}, which {source.name!r} lacks: they are "
                f"of another model, {found.about.get('model')!r}"
            )
        made_of = found.about.get("model")
        if made_of is not None and not _is_same(str(made_of), source.name):
            self.said.append(f"the statistics in {found.folder} were made of {made_of}, and stand at {source.name}")

    def of(self, name: str, inputs: Sequence[Operand]) -> list[tuple[str, Tensor]]:
        """Return the statistics of each input of a tensor of the result, with their folders; [] for none.

        Raises:
          ValueError: only some of the inputs have them, or a shape is not what the kind's is.
        """
        if self.reads is None:
            return []
        kind = KINDS[self.reads.kind]
        found = []
        for o in inputs:
            folder = str(o.entry.statistics)
            tensor = self.open[folder].tensors.get(o.name)
            if tensor is not None:
                wanted = kind.shape(tuple(o.stored.shape))
                if tensor.shape != wanted:
                    raise ValueError(
                        f"the {kind.of} of tensor {o.name!r} in {folder} has shape {list(tensor.shape)}, wanted "
                        f"{'none' if wanted is None else list(wanted)} for {list(o.stored.shape)} in {o.entry.model!r}"
                    )
                found.append((folder, tensor))
        if len(found) == len(inputs):
            return found
        if self.reads.everywhere or (found and "missing" not in self.allow):
            lacking = next(o for o in inputs if o.name not in self.open[str(o.entry.statistics)].tensors)
            way = "" if self.reads.everywhere else ", or allow it: allow=missing averages the tensor"
            raise ValueError(
                f"tensor {name!r}: {lacking.entry.statistics} has no {kind.of} of {lacking.name!r} of "
                f"{lacking.entry.model!r}; make the statistics of this very model{way}"
            )
        self.without.append(name)
        return []

    def notes(self) -> list[str]:
        """Say which tensors were merged without statistics, and what else the user should know."""
        if not self.without or self.reads is None:
            return self.said
        kind = KINDS[self.reads.kind]
        return [*self.said, f"{self.method} averages what has no {kind.of}: {listed(self.without)}"]


def _is_same(one: str, other: str) -> bool:
    """Whether two names of a model, as they were written in two places, may be of the same one."""
    if one == other:
        return True
    places = [pathlib.Path(name) for name in (one, other)]
    return all(place.exists() for place in places) and os.path.samefile(*places)
