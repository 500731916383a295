"""What a merged folder says of itself: README.md for people, merge.json for programs."""

from __future__ import annotations

import json
import pathlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import xxhash

from jaxmerge.files.checkpoints.source import Source
from jaxmerge.files.recipe import Recipe


def provenance(
    recipe: Recipe,
    sources: Mapping[str, Source],
    seed: int,
    notes: Sequence[str],
    plan: str,
    files: Iterable[tuple[str, Sequence[int]]],
    device: Any,
) -> dict[str, Any]:
    """Return the record of a merge but for what is known only after it.

    plan: digest of all that decides the result but the inputs' bytes. files: name, (size, time) of each input file.
    """
    return {
        "merge_method": recipe.merge_method,
        "rule": recipe.method.rule,
        "recipe": recipe.text,
        "seed": seed,
        "plan": plan,
        "files": {name: list(of) for name, of in files},
        "inputs": {
            name: {"tensors": len(source.tensors), "bytes": sum(t.size for t in source.tensors.values())}
            for name, source in sources.items()
        },
        "versions": versions(),
        "device": device.device_kind,
        "notes": list(notes),
    }


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    return {"jaxmerge": _version(), "jax": jax.__version__, "python": platform.python_version()}


def _version() -> str:
    try:
        return metadata.version("jaxmerge")
    except metadata.PackageNotFoundError:
        return "checkout"


def write(folder: pathlib.Path, record: Mapping[str, Any], tensors: Sequence[Mapping[str, Any]]) -> None:
    """Write merge.json and README.md; `tensors`: the journal's records, in the order of the result.

    merge.json has for each tensor the statistics of `jaxmerge.files.tally`, and for each input a digest, xxh3 with 128
    bits, over the digests of its tensors that were read.
    """
    digests: dict[str, Any] = {}
    for tensor in tensors:
        for model, name, digest in tensor["inputs"]:
            digests.setdefault(model, xxhash.xxh3_128()).update(f"{name} {digest}\n".encode())
    read = {model: digest.hexdigest() for model, digest in digests.items()}
    rows = {tensor["tensor"]: {"models": _models(tensor), **tensor["statistics"]} for tensor in tensors}
    body = json.dumps({**record, "digests": read}, indent=2)
    # A line a tensor: the file stays readable, and half the size.
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    (folder / "merge.json").write_text(f'{body[:-2]},\n  "tensors": {{\n{lines}\n  }}\n}}\n')
    (folder / "README.md").write_text(model_card(record))


def _models(tensor: Mapping[str, Any]) -> list[str]:
    return [model for model, _, _ in tensor["inputs"]]


def model_card(record: Mapping[str, Any]) -> str:
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
