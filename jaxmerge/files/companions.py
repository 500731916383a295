"""What stands beside the weights of a merge: config.json, tokenizer, chat template, generation config."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxmerge.files import numbered, vocabulary
from jaxmerge.files.chat import TEMPLATES
from jaxmerge.files.checkpoints.source import Source
from jaxmerge.files.documents import parse_json
from jaxmerge.files.recipe import Recipe

# The keys under which configs count layers: of a decoder alone, and of parts of a model.
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
PART_COUNTS = (*COUNTS, "num_decoder_layers", "decoder_layers", "encoder_layers", "depth")
TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of a container after slicing: it had `had`; layer j is now (model, its layer) `layers[j]`."""

    module: str
    had: int
    layers: tuple[tuple[str, int], ...]
    sources: Mapping[str, Source]


def config(
    donor: Mapping[str, Any], stacks: Mapping[str, Stack], recipe: Recipe, *, dtype: np.dtype | None, rows: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the config.json of the result, and notes.

    Args:
      donor: the config of base or first model.
      stacks: what was sliced, by container.
      recipe: says dtype and out_dtype.
      dtype: of the result's weights (of most of their bytes), None if there are none.
      rows: of the embedding, where it was cut.
    """
    if not donor:
        return {}, []
    result, notes = dict(donor), []
    key = "dtype" if "dtype" in result else "torch_dtype"
    if dtype is not None and (key in result or recipe.dtype is not None or recipe.out_dtype is not None):
        result[key] = str(dtype)
    if rows is not None:
        result = vocabulary.with_size(result, rows)
    for container, stack in stacks.items():
        result = _stacked(result, container, stack, notes)
    return result, notes


def _stacked(config: dict[str, Any], container: str, stack: Stack, notes: list[str]) -> dict[str, Any]:
    """Set the count of layers where the config has it, and all that it says of layers by number."""
    places = _places(config, stack, container)
    if len(places) != 1:
        found = ", ".join(".".join(place) for place in places) or "no such key"
        notes.append(
            f"{container} has {len(stack.layers)} layers now: which key of config.json counts them is not clear "
            f"({found}); correct it by hand"
        )
        return config
    (place,) = places
    *outer, key = place
    part = _at(config, outer)
    parts = {model: _at(source.config, outer) for model, source in stack.sources.items()}
    counts = {model: _count(own, key, stack.had) for model, own in parts.items()}
    order = numbered.Order(stack.layers, parts, counts, _count(part, key, stack.had))
    changed = numbered.rewrite(part, order, key, notes)
    return changed if not outer else {**config, outer[0]: changed}


def _count(part: Mapping[str, Any], key: str, had: int) -> int:
    """How many layers a config counts: fewer than there are where some predict tokens further ahead."""
    said = part.get(key)
    return said if type(said) is int and 0 < said <= had else had


def _at(config: Mapping[str, Any], outer: list[str]) -> Mapping[str, Any]:
    return config.get(outer[0], {}) if outer else config


def _places(config: Mapping[str, Any], stack: Stack, container: str) -> list[tuple[str, ...]]:
    """Return where the config may count the layers of a container."""
    if stack.module == "default":
        top = [(key,) for key in COUNTS if key in config]
        text = config.get("text_config") or {}
        return top[:1] or [("text_config", key) for key in COUNTS if key in text][:1]
    nested = {key: part for key, part in config.items() if isinstance(part, Mapping)}
    places: list[tuple[str, ...]] = [(key,) for key in PART_COUNTS if config.get(key) == stack.had]
    places += [(name, key) for name, part in nested.items() for key in PART_COUNTS if part.get(key) == stack.had]
    # `model.vision_tower.encoder.layers` is counted in vision_config, `decoder.block` in a key with "decoder".
    words = {word for part in container.split(".") for word in part.split("_")} - {"layers", "model"}
    fitting = [place for place in places if words & {word for part in place for word in part.split("_")}]
    if len(places) > 1 and fitting:
        return fitting
    return places


def contents(donor: Source, config: Mapping[str, Any], template: str | None) -> dict[str, bytes]:
    """Return the companions of the result, file name → content."""
    files = dict(donor.companions())
    if config:
        files["config.json"] = as_json(config)
    if template is not None:
        files.pop("chat_template.json", None)
        files[TEMPLATE_FILE] = template.encode()
        if TOKENIZER_CONFIG in files:
            # Readers that do not know the file of its own look here.
            files[TOKENIZER_CONFIG] = as_json(
                {**parse_json(files[TOKENIZER_CONFIG], f"{donor.name}: {TOKENIZER_CONFIG}"), "chat_template": template}
            )
    return files


def as_json(value: Mapping[str, Any]) -> bytes:
    """Write what a JSON file of a model holds."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def tokenizer_notes(sources: Mapping[str, Source]) -> list[str]:
    """Say which models have no tokenizer, and whether those there are differ."""
    found = {name: source.companions().get("tokenizer.json") for name, source in sources.items()}
    notes = [f"{name} has no tokenizer.json" for name, text in found.items() if text is None]
    if len({text for text in found.values() if text is not None}) > 1:
        notes.append("the tokenizers of the models differ; rows of the embeddings are merged by number all the same")
    return notes


def chat_template(wanted: str | None, sources: Iterable[Source], notes: list[str]) -> str | None:
    """Resolve `chat_template`: "auto" (the commonest of the models'), a name, or a Jinja template itself."""
    if not wanted:
        return None
    if wanted == "auto":
        found = [template.strip() for source in sources if (template := own_template(source))]
        if not found:
            notes.append("chat_template: auto, but no model has a chat template")
            return None
        return Counter(found).most_common(1)[0][0]  # the first of those equally common, in the order of the recipe
    return TEMPLATES.get(wanted, wanted)


def own_template(source: Source) -> str | None:
    """Return a model's own chat template, the default one if it has several."""
    files = source.companions()
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE].decode(errors="replace")
    for name in ("chat_template.json", TOKENIZER_CONFIG):
        template = parse_json(files[name], f"{source.name}: {name}").get("chat_template") if name in files else None
        if isinstance(template, list):
            template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        if isinstance(template, Mapping):
            template = template.get("default")
        if template:
            return str(template)
    return None
