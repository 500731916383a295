"""Accepted examples on disk: written as a TFDS version (array_record), read back from it, whole or not at all.

    DATA_DIR/NAME/VERSION/
      NAME-train.array_record-00000            the examples, in the order given
      features.json, dataset_info.json         what TFDS needs: `tfds.builder_from_directory(…)` opens it
      metadata.json                            the provenance
      checksums.json                           bytes and SHA-256 of every other file

Also JSON lines with errors that name file and line. TensorFlow is neither needed nor imported.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmerge import install
from jaxmerge.files import documents
from jaxmerge.files.disk import sync

from ..log import UserError
from ..runtime.disk import PathLike, read_bytes, write_durably

Example = dict[str, Any]

# The fields of an example, with the type that comes back. Floats are stored in 32 bits.
FIELDS: dict[str, type] = {
    "question_id": str,
    "family": str,
    "prompt": str,
    "completion": str,
    "tokens": list,  # of int: prompt and completion
    "prompt_length": int,  # how many of `tokens` are the prompt
    "score": float,
    "weight": float,
    "sample": int,
}
OPTIONAL: dict[str, type] = {"rejected": list}
"""Fields that all examples of a version have or none: of pairs, the tokens of the prompt and the worse answer."""
CHECKSUMS = "checksums.json"


def write_version(
    data_dir: PathLike,
    name: str,
    version: str,
    examples: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
) -> None:
    """Write `examples` as TFDS version `version` of dataset `name`, in their order, whole or not at all.

    Everything is written under a temporary name, synced to disk and renamed. Writing again what is already there
    changes nothing, so a resumed run may repeat the call; other contents under the same version are an error.

    Args:
      data_dir: folder that holds datasets.
      name: of the dataset, in snake_case.
      version: `major.minor.patch`.
      examples: dicts with exactly the keys of `FIELDS`, and perhaps those of `OPTIONAL`.
      provenance: JSON values: round, method, model digest, seed, sampling settings, package version, counts.
    """
    _check_names(name, version)
    rows = [_check_example(i, example) for i, example in enumerate(examples)]
    if len({tuple(row) for row in rows}) > 1:
        raise UserError(f"{name} {version}: some examples have {', '.join(OPTIONAL)} and some have not; all or none")
    origin = _check_provenance(provenance)
    folder = pathlib.Path(data_dir) / name / version
    if folder.exists():
        if read_version(data_dir, name, version) == (rows, origin):
            return
        raise UserError(
            f"{folder}: this version exists and holds other examples; a version never changes."
            " Write another version, or remove the folder if nothing refers to it"
        )
    scratch = folder.parent / f".{version}.partial"
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed process left
    try:
        scratch.mkdir(parents=True)
        written = _write_tfds(scratch, name, version, rows, origin)
        write_checksums(written)
        os.rename(written, folder)
        sync(folder.parent)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder}: could not write the dataset: {reason(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def reason(error: OSError | RuntimeError) -> str:
    """Why a dataset could not be written; array_record's own writer raises RuntimeError for a full disk."""
    full = os.strerror(errno.ENOSPC)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return full if full in str(error) else str(error)[:300]


def read_version(data_dir: PathLike, name: str, version: str) -> tuple[list[Example], dict[str, Any]]:
    """Read the examples of a version, in the order they were written, and their provenance.

    Raises:
      UserError: no such version, or a file of it is missing, truncated or altered (named).
    """
    folder = pathlib.Path(data_dir) / name / version
    if not folder.is_dir():
        there = sorted(p.name for p in folder.parent.glob("[0-9]*")) if folder.parent.is_dir() else []
        raise UserError(f"{folder}: no such dataset version; there are: {', '.join(there) or 'none'}")
    check_files(folder)
    tfds = _import_tfds()
    builder = tfds.builder_from_directory(str(folder))
    source = builder.as_data_source(split="train") if builder.info.splits["train"].num_examples else ()
    rows = [_from_tfds(row) for row in source]
    return rows, json.loads((folder / "metadata.json").read_text(encoding="utf-8"))


def _write_tfds(scratch: pathlib.Path, name: str, version: str, rows: Sequence[Example], origin: dict) -> pathlib.Path:
    """Write one shard, its rows in the given order; return the folder of the version."""
    import numpy as np

    tfds = _import_tfds()
    kinds = {
        str: tfds.features.Text(),
        int: tfds.features.Scalar(np.int64),
        float: tfds.features.Scalar(np.float32),
        list: tfds.features.Tensor(shape=(None,), dtype=np.int64),
    }
    fields = fields_of(rows[0]) if rows else FIELDS
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version(version), data_dir=str(scratch), module_name="jaxmerge"
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="Accepted examples of a self-improvement round.",
        features=tfds.features.FeaturesDict({key: kinds[kind] for key, kind in fields.items()}),
        disable_shuffling=True,  # the order is part of what a run reproduces
        metadata=tfds.core.MetadataDict(origin),
    )
    written = pathlib.Path(info.data_dir)
    written.mkdir(parents=True, exist_ok=True)
    writer = tfds.core.SequentialWriter(info, max(len(rows), 1), file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": [_to_tfds(row) for row in rows]})
    writer.close_all()
    return written


def _import_tfds() -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"writing and reading datasets needs tensorflow-datasets ({error}); {install.extra('train')}"
        ) from error
    return tfds


def _to_tfds(row: Example) -> dict[str, Any]:
    import numpy as np

    return {key: np.asarray(value, np.int64) if isinstance(value, list) else value for key, value in row.items()}


def _from_tfds(row: Mapping[str, Any]) -> Example:
    """Give the types of `FIELDS` back: TFDS returns text as bytes and numbers as NumPy's."""
    back = {str: lambda x: bytes(x).decode(), int: int, float: float, list: lambda x: [int(t) for t in x]}
    return {key: back[kind](row[key]) for key, kind in fields_of(row).items()}


def _check_names(name: str, version: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"dataset name {name!r}: use small letters, digits and _, a letter first, such as round_1")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise UserError(f"dataset version {version!r} of {name}: write major.minor.patch, such as 1.0.0")


def _check_example(i: int, example: Mapping[str, Any]) -> Example:
    """Return the example as it will come back: its floats in 32 bits."""
    import numpy as np

    missing, extra = sorted(set(FIELDS) - set(example)), sorted(set(example) - set(FIELDS) - set(OPTIONAL))
    if missing or extra:
        raise UserError(
            f"example {i}: missing {missing or 'nothing'}, not understood {extra or 'nothing'};"
            f" an example has {', '.join(FIELDS)}"
        )
    row: Example = {}
    for key, kind in fields_of(example).items():
        value = example[key]
        allowed = {int: (int, np.integer), float: (int, float, np.floating), list: (list, tuple, np.ndarray)}
        if not isinstance(value, allowed.get(kind, kind)) or isinstance(value, bool):
            raise UserError(
                f"example {i} ({example['question_id']!r}): {key} is {value!r:.60}, expected {kind.__name__}"
            )
        row[key] = (
            float(np.float32(value)) if kind is float else [int(t) for t in value] if kind is list else kind(value)
        )
    if not 0 <= row["prompt_length"] <= len(row["tokens"]):
        raise UserError(
            f"example {i} ({row['question_id']!r}): prompt_length is {row['prompt_length']} and it has"
            f" {len(row['tokens'])} tokens; the prompt is a part of the tokens"
        )
    return row


def fields_of(example: Mapping[str, Any]) -> dict[str, type]:
    """The fields that an example, or the features of a version, has."""
    return FIELDS | {key: kind for key, kind in OPTIONAL.items() if key in example}


def _check_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(provenance), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"provenance: {error}; it holds JSON values only (no arrays, no NaN)") from error


def write_checksums(folder: pathlib.Path) -> None:
    """Sync the files of a version, then write their sizes and digests beside them: its last file."""
    sums = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    for path in folder.iterdir():
        sync(path)
    write_durably(folder / CHECKSUMS, json.dumps(sums, indent=2) + "\n")


def check_files(folder: pathlib.Path) -> None:
    """Compare every file with the checksums written beside it, so that damage is an error that names the file."""
    listing = folder / CHECKSUMS
    again = f"Remove {folder} and let the run write it again"
    try:
        sums = documents.read_json(listing)
    except ValueError as error:
        raise UserError(f"{listing}: damaged ({error}). {again}") from error
    if not sums:
        raise UserError(f"{listing}: missing or empty: this version was not written whole. {again}")
    for name, entry in sums.items():
        if pathlib.PurePath(name).name != name or [type(part) for part in _list(entry)] != [int, str]:
            raise UserError(
                f"{listing}: damaged: {name!r:.60} is {documents.shown(entry)}, no size and digest. {again}"
            )
        path, (size, digest) = folder / name, entry
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            problem = "is missing"
        elif found != size:
            problem = f"has {found} bytes, expected {size!r:.40}: it is truncated or was changed"
        elif _checksum(path)[1] != digest:
            problem = f"has other contents than were written (SHA-256 differs from {digest[:12]!r}…)"
        else:
            continue
        raise UserError(f"{path}: {problem}. {again}")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _checksum(path: pathlib.Path) -> tuple[int, str]:
    data = read_bytes(path)
    return len(data), hashlib.sha256(data).hexdigest()


# --- JSON lines --------------------------------------------------------------------------------------------
