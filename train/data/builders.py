"""TFDS builders over local files: `data_dir/NAME/CONFIG/VERSION/` in array_record, without TensorFlow.

    builder = JsonLines(path="train.jsonl", data_dir="data")      # or ReasoningGym(families=…, data_dir="data")
    prepare(builder)
    builder.as_data_source(split="train")[0]

The folder of a version is an ordinary TFDS dataset: `tfds.builder_from_directory` opens it. Examples stand in the
order of the file. Its name holds a digest of what it was made from, so that a changed file is another dataset.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from ..log import UserError
from ..runtime.disk import read_bytes
from ..runtime.jsonl import Row
from . import hub, versions
from .formats import read_row
from .records import Record, columns, from_columns
from .rows import read_rows
from .tfds_sets import SETS, read_set

Text = tfds.features.Text
FEATURES = {
    "id": Text(),
    "roles": tfds.features.Sequence(Text()),
    "contents": tfds.features.Sequence(Text()),
    "plain": tfds.features.Scalar(np.int64),
    "answer": Text(),
    "choices": tfds.features.Sequence(Text()),
    "tests": tfds.features.Sequence(Text()),
    "reward": tfds.features.Scalar(np.float64),
    "rejected": Text(),
    "scores": Text(),
}
LATER = {"reward", "scores"}
"""Features that sets written before there were such lack."""


class Local(tfds.core.DatasetInfo):
    """What is known of a set that is made here."""

    def initialize_from_bucket(self) -> None:
        """Ask nobody: no bucket has it, and TFDS leaves an empty folder in /tmp for each time it asks."""


class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the builders share: the features of a record and its order; a subclass says where records come from."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # where TFDS looks for checksums of downloads, by way of a package Python ≥ 3.9 does not install
    origin: Mapping[str, Any] = {}
    """What the examples were made from; kept in metadata.json."""

    def __init__(self, name: str, data_dir: str | os.PathLike[str]):
        folder = pathlib.Path(data_dir) / self.name / name / str(self.VERSION)
        if not (folder / versions.CHECKSUMS).exists():
            # A killed process left it: gone before TFDS reads it and takes it for whole.
            shutil.rmtree(folder, ignore_errors=True)
        log = logging.getLogger("absl")
        level = log.level
        log.setLevel(logging.ERROR)  # a configuration it does not know is no reason for a warning: they are all ours
        super().__init__(data_dir=data_dir, config=tfds.core.BuilderConfig(name=name, version=self.VERSION))
        log.setLevel(level)

    def records(self) -> dict[str, Sequence[Record]]:
        """The records of each split."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        return Local(
            builder=self,
            description=(type(self).__doc__ or "").strip(),
            features=tfds.features.FeaturesDict(FEATURES),
            disable_shuffling=True,  # the order of the file is the order of the examples
            metadata=tfds.core.MetadataDict(self.origin),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {split: enumerate(columns(rows)) for split, rows in self.records().items()}

    def _generate_examples(self):
        raise NotImplementedError("the splits are generators already")


class JsonLines(Records, skip_registration=True):
    """Examples of a local file with one JSON object a line."""

    def __init__(
        self,
        *,
        path: str | os.PathLike[str],
        data_dir: str | os.PathLike[str],
        format: str | None = None,
        ignore: Collection[str] = (),
    ):
        self._path, self._format, self._ignore = pathlib.Path(path), format, tuple(ignore)
        data = read_bytes(self._path)
        self.origin = {"file": self._path.name, "sha256": hashlib.sha256(data).hexdigest(), "format": format or "auto"}
        name = f"{snake(self._path.stem)}_{fingerprint([self.origin, sorted(self._ignore)])}"
        super().__init__(name, data_dir)

    def records(self) -> dict[str, Sequence[Record]]:
        return {"train": read_records(self._path, self._format, ignore=self._ignore)}


class HubRows(Records, skip_registration=True):
    """Examples of a dataset on the hub: a split of a subset at a commit."""

    def __init__(
        self,
        *,
        path: str,
        data_dir: str | os.PathLike[str],
        split: str = "train",
        format: str | None = None,
        ignore: Collection[str] = (),
    ):
        found = dataclasses.replace(hub.parse(path), split=hub.one_split(path, split))
        commit = hub.dataset_of(found.repo, found.revision).commit
        self._path, self._format, self._ignore = str(dataclasses.replace(found, revision=commit)), format, tuple(ignore)
        self.origin = {"dataset": self._path, "format": format or "auto"}
        super().__init__(f"{snake(found.stem)}_{fingerprint([self.origin, sorted(self._ignore)])}", data_dir)

    def records(self) -> dict[str, Sequence[Record]]:
        return {"train": read_records(self._path, self._format, ignore=self._ignore)}


# --- preparing and reading ---------------------------------------------------------------------------------


def prepare(builder: Records) -> pathlib.Path:
    """Write a builder's dataset, whole or not at all, unless it is there; the folder of its version."""
    folder = pathlib.Path(builder.data_dir)
    if (folder / versions.CHECKSUMS).exists():
        versions.check_files(folder)
        return folder
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has downloaded, which it has not
            builder.download_and_prepare(file_format="array_record")
        versions.write_checksums(folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | RuntimeError):
            raise UserError(f"{folder}: could not write the dataset: {versions.reason(error)}") from error
        raise
    return folder


def read_records(
    path: str | os.PathLike[str], format: str | None = None, *, ignore: Collection[str] = (), split: str = "train"
) -> list[Record]:
    """Records of a JSONL file or of a dataset on the hub, in order; an error names the line or row."""
    return records_of(read_rows(path, split), format, ignore=ignore, source=path)


def records_of(
    rows: Sequence[tuple[str, Row]],
    format: str | None,
    *,
    ignore: Collection[str] = (),
    source: str | os.PathLike[str],
) -> list[Record]:
    """Records of rows that are read already, each with its place; `source` is where they are from."""
    records = []
    for place, row in rows:
        try:
            records.append(read_row(row, format, ignore=ignore))
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
    if not records:
        raise UserError(f"{source}: no examples")
    return records


def read_folder(folder: str | os.PathLike[str], split: str = "train") -> list[Record]:
    """Records of a TFDS version on disk: one of ours, or one of the sets in `tfds_sets.SETS`."""
    folder = pathlib.Path(folder)
    if not (folder / "dataset_info.json").is_file():
        raise UserError(f"{folder}: not the folder of a TFDS version (no dataset_info.json)")
    if (folder / versions.CHECKSUMS).exists():
        versions.check_files(folder)
    builder: Any = tfds.builder_from_directory(str(folder))
    if split not in builder.info.splits:
        raise UserError(f"{folder}: no split {split!r}; there are: {', '.join(builder.info.splits)}")
    rows = builder.as_data_source(split=split)
    if set(FEATURES) - LATER <= set(builder.info.features or ()) <= set(FEATURES):
        return [from_columns(rows[i]) for i in range(len(rows))]
    if builder.name in SETS:
        return list(read_set(builder.name, rows))
    raise UserError(
        f"{folder}: the set {builder.name!r} has the features {', '.join(builder.info.features)}; wanted a set written"
        f" here, or one of {', '.join(SETS)}"
    )


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def snake(text: str) -> str:
    """A name TFDS takes: small letters, digits and _.

    Example:
      >>> snake("GSM8K train-v2")
      'gsm8k_train_v2'
    """
    letters = "".join(c.lower() if c.isascii() and c.isalnum() else "_" for c in text).strip("_")
    return letters or "data"
