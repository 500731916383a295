"""What a merged folder says of itself: README.md for people, merge.json and mergekit_config.yml for programs."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import xxhash

from jaxmerge.draw import MASKS
from jaxmerge.files import model_card
from jaxmerge.files.checkpoints.source import Source
from jaxmerge.files.experts.recipe import Experts
from jaxmerge.files.kinds import AnyRecipe
from jaxmerge.files.model_card import Card, Ingredient, describe_rule
from jaxmerge.rules import RULES

RECIPE = "mergekit_config.yml"
HERE = "path/of/this/folder"


def provenance(
    recipe: AnyRecipe,
    sources: Mapping[str, Source],
    seed: int,
    notes: Sequence[str],
    plan: str,
    files: Iterable[tuple[str, Sequence[int]]],
    device: Any,
    format: str,
) -> dict[str, Any]:
    """Return the record of a merge but for what is known only after it.

    plan: digest of all that decides the result but the inputs' bytes. files: name, (size, time) of each input file.
    """
    return {
        "merge_method": recipe.merge_method,
        "rule": recipe.method.rule,
        **({"about": recipe.about} if isinstance(recipe, Experts) else {}),
        "recipe": recipe.text,
        "seed": seed,
        "plan": plan,
        "files": {name: list(of) for name, of in files},
        "inputs": {
            name: {
                "tensors": len(source.tensors),
                "bytes": sum(t.size for t in source.tensors.values()),
                **dataclasses.asdict(model_card.ingredient_of(source)),
            }
            for name, source in sources.items()
        },
        "versions": versions(),
        "device": device.device_kind,
        "format": format,
        "notes": list(notes),
    }


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    return {"jaxmerge": _version(), "masks": MASKS, "jax": jax.__version__, "python": platform.python_version()}


def has_our_masks(record: Mapping[str, Any]) -> bool:
    """Return whether random masks of the merge that a record is of are drawn as here; without a record, they are."""
    return not record or record.get("versions", {}).get("masks") == MASKS


def _version() -> str:
    try:
        return metadata.version("jaxmerge")
    except metadata.PackageNotFoundError:
        return "checkout"


def write(
    folder: pathlib.Path,
    record: Mapping[str, Any],
    tensors: Sequence[Mapping[str, Any]],
    usage: str | None = None,
) -> None:
    """Write merge.json, README.md and mergekit_config.yml.

    merge.json has for each tensor the statistics of `jaxmerge.files.tally`, and for each input a digest, xxh3 with 128
    bits, over the digests of its tensors that were read. mergekit_config.yml is the recipe as it was read, under the
    name that the hub's readers of merges look for. Nothing depends on what the folder is called: a merge that is done
    again elsewhere has the same bytes.

    Args:
      folder: of the result, with its config.json and tokenizer already.
      record: what `provenance` returned.
      tensors: the journal's records, in the order of the result.
      usage: how the result is loaded; None: by transformers.
    """
    digests: dict[str, Any] = {}
    for tensor in tensors:
        for model, part, digest in tensor["inputs"]:
            digests.setdefault(model, xxhash.xxh3_128()).update(f"{part} {digest}\n".encode())
    read = {model: digest.hexdigest() for model, digest in digests.items()}
    rows = {tensor["tensor"]: {"models": _models(tensor), **tensor["statistics"]} for tensor in tensors}
    body = json.dumps({**record, "digests": read}, indent=2)
    # A line a tensor: the file stays readable, and half the size.
    lines = ",\n".join(f"    {json.dumps(part)}: {json.dumps(row)}" for part, row in rows.items())
    (folder / "merge.json").write_text(f'{body[:-2]},\n  "tensors": {{\n{lines}\n  }}\n}}\n')
    (folder / RECIPE).write_text(record["recipe"].rstrip() + "\n")
    model_card.write_card(folder, merge_card(record, usage or model_card.usage(folder, HERE)))


def _models(tensor: Mapping[str, Any]) -> list[str]:
    return [model for model, _, _ in tensor["inputs"][: tensor["models"]]]


def merge_card(record: Mapping[str, Any], usage: str) -> Card:
    """Return the model card of a merge."""
    inputs = record["inputs"]
    sizes = [(of["name"], of["tensors"], f"{of['bytes'] / 1e9:.3f} GB") for of in inputs.values()]
    rule = _public(record["about"], inputs) if "about" in record else describe_rule(RULES[record["rule"]])
    recipe = f"```yaml\n{record['recipe'].strip()}\n```"
    return Card(
        title="A merge by jaxmerge",
        summary=f"{len(inputs)} model{'s' * (len(inputs) != 1)} merged with `{record['merge_method']}` (jaxmerge "
        f"{record['versions']['jaxmerge']}, seed {record['seed']}).",
        usage=usage,
        ingredients=[Ingredient(of["name"], tuple(of["hub"]), tuple(of["licences"])) for of in inputs.values()],
        sections={
            "Method": rule,
            "Recipe": f"{recipe}\n\n{model_card.table(('model', 'tensors', 'size'), sizes)}",
            "Notes": "\n".join(f"- {_public(note, inputs)}" for note in record["notes"]),
        },
        tags=("merge",),
        relation="merge",
    )


def merged_adapter_card(
    record: Mapping[str, Any], title: str, base: Ingredient, adapters: Sequence[Ingredient]
) -> Card:
    """Return the card of an adapter that is merged of adapters of one base."""
    options, notes = record["adapter"], record["notes"]
    rule = describe_rule(RULES[record["rule"]])
    return Card(
        title=title,
        summary=f"{len(adapters)} LoRA adapters of {base.name} merged with `{record['merge_method']}` in the space "
        f"`{options['space']}` (jaxmerge {record['versions']['jaxmerge']}, seed {record['seed']}).",
        usage=model_card.adapter_usage(title, base),
        ingredients=[base, *adapters],
        sections={
            "Method": rule,
            "Recipe": f"```yaml\n{record['recipe'].strip()}\n```",
            "Notes": "\n".join(f"- {_public(note, record['inputs'])}" for note in notes),
        },
        tags=("lora", "merge"),
        relation="adapter",
        library="peft",
    )


def _public(note: str, inputs: Mapping[str, Mapping[str, Any]]) -> str:
    """A note with the models called as the card calls them."""
    for name in sorted((name for name in inputs if "/" in name), key=len, reverse=True):
        note = note.replace(name, inputs[name]["name"])
    return note
