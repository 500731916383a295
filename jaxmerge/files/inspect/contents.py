"""What is in one checkpoint, from its headers alone: parameters, dtypes, bytes by layer, and whether it is whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxmerge.files import layers
from jaxmerge.files.checkpoints.heads import tied_pair
from jaxmerge.files.checkpoints.source import Source
from jaxmerge.files.inspect.table import aligned, short

OUTSIDE = "outside the layers"


def describe(source: Source) -> dict[str, Any]:
    """Count what an open checkpoint holds; no tensor is read.

    Opening it has shown that it is whole: every file that its index names is there and has all its bytes.

    Returns:
      {"name", "tensors", "parameters", "bytes", "dtypes": {dtype: parameters}, "layers": {layer: {"tensors",
      "parameters", "bytes", "dtypes"}}, "tied", "files", "model_type", "notes"}. bytes: of the tensors as they are
      read; of quantised ones that is more than their files hold. A layer is `model.layers.3`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, tensor in source.tensors.items():
        parts = layers.split(name)
        at = OUTSIDE if parts is None else f"{parts[0]}.{parts[1]}" if parts[0] else str(parts[1])
        row = rows.setdefault(at, {"tensors": 0, "parameters": 0, "bytes": 0, "dtypes": {}})
        count, dtype = math.prod(tensor.shape), str(tensor.dtype)
        row["tensors"] += 1
        row["parameters"] += count
        row["bytes"] += tensor.size
        row["dtypes"][dtype] = row["dtypes"].get(dtype, 0) + count
    dtypes: dict[str, int] = {}
    for row in rows.values():
        for dtype, count in row["dtypes"].items():
            dtypes[dtype] = dtypes.get(dtype, 0) + count
    return {
        "name": source.name,
        "tensors": len(source.tensors),
        "parameters": sum(row["parameters"] for row in rows.values()),
        "bytes": sum(row["bytes"] for row in rows.values()),
        "dtypes": dtypes,
        "layers": rows,
        "tied": tied_pair(source) is not None,
        "files": len(source.files),
        "model_type": source.config.get("model_type"),
        "notes": list(source.notes),
    }


def contents(found: Mapping[str, Any]) -> str:
    """Write a result of `describe` for a terminal: a row a layer, layers that are alike in one row."""
    head = [
        f"{short(found['name'], 100)}: {found['model_type'] or 'no model type'}, {found['tensors']} tensors in "
        f"{found['files']} file{'s' * (found['files'] != 1)}, whole",
        f"{found['parameters']:,} parameters, {found['bytes'] / 1e9:.3f} GB as read"
        + (", the head tied to the embedding" if found["tied"] else ""),
        "",
    ]
    rows = [["all", *_cells(found)]]
    for names, row in _alike(found["layers"]):
        rows.append([names, *_cells(row)])
    body = aligned(["layer", "tensors", "parameters", "GB", "dtypes"], rows, last=40)
    return "\n".join([*head, *body, *(f"note: {note}" for note in found["notes"])])


def _cells(row: Mapping[str, Any]) -> list[str]:
    dtypes = ", ".join(sorted(row["dtypes"], key=lambda dtype: -row["dtypes"][dtype]))
    return [str(row["tensors"]), f"{row['parameters']:,}", f"{row['bytes'] / 1e9:.3f}", dtypes]


def _alike(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Join neighbouring layers of equal contents: `model.layers.0–31`, with the numbers of each of them."""
    found: list[tuple[str, str, Mapping[str, Any]]] = []
    for name, row in rows.items():
        container, _, number = name.rpartition(".")
        if found and number.isdecimal() and found[-1][2] == row and found[-1][0].rpartition(".")[0] == container:
            found[-1] = (found[-1][0], number, row)
        else:
            found.append((name, "", row))
    return [(f"{first}–{last}" if last else first, row) for first, last, row in found]
