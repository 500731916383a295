"""What a merged folder says of itself: README.md for people, merge.json for programs."""

from __future__ import annotations

import hashlib
import json
import pathlib
import platform
from importlib import metadata
from typing import Any

import jax

from jaxmerge.files.recipe import Recipe
from jaxmerge.files.safetensors import Stored


def provenance(recipe: Recipe, inputs: dict[str, dict[str, Stored]], seed: int, notes: list[str]) -> dict[str, Any]:
    """Return the record of a merge: recipe, inputs by size and header digest, seed, versions, notes."""
    return {
        "merge_method": recipe.merge_method,
        "rule": recipe.method.rule,
        "recipe": recipe.text,
        "seed": seed,
        "inputs": {name: _describe(tensors) for name, tensors in inputs.items()},
        "versions": {"jaxmerge": _version(), "jax": jax.__version__, "python": platform.python_version()},
        "device": f"{jax.devices()[0].platform} x{jax.device_count()}",
        "notes": notes,
    }


def _version() -> str:
    try:
        return metadata.version("jaxmerge")
    except metadata.PackageNotFoundError:
        return "checkout"


def _describe(tensors: dict[str, Stored]) -> dict[str, Any]:
    # Names, dtypes and shapes: that says whether it is the same architecture, not the same weights.
    layout = sorted((t.name, str(t.dtype), list(t.shape)) for t in tensors.values())
    return {
        "tensors": len(tensors),
        "bytes": sum(t.size for t in tensors.values()),
        "layout_sha256": hashlib.sha256(json.dumps(layout).encode()).hexdigest(),
    }


def write(folder: pathlib.Path, record: dict[str, Any]) -> None:
    """Write merge.json and README.md into `folder`."""
    (folder / "merge.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(record))


def model_card(record: dict[str, Any]) -> str:
    """Return a Hugging Face model card with the recipe."""
    inputs = "\n".join(
        f"| {name} | {entry['tensors']} | {entry['bytes'] / 1e9:.3f} GB |" for name, entry in record["inputs"].items()
    )
    notes = "".join(f"- {note}\n" for note in record["notes"])
    return f"""---
library_name: transformers
tags:
- merge
- jaxmerge
base_model:
{chr(10).join(f"- {json.dumps(name)}" for name in record["inputs"])}
---
# A merge by jaxmerge

Merged with `{record["merge_method"]}` (jaxmerge {record["versions"]["jaxmerge"]}, seed {record["seed"]}).

| model | tensors | size |
|---|---|---|
{inputs}

```yaml
{record["recipe"].strip()}
```
{notes}"""
