r"""The words of recipes: where each one counts, what is said of one that has no effect where it stands, model names.

Published recipes hold keys that change nothing: a parameter of another method, `revision` beside a model, `dtype` among
the parameters. mergekit passes over them in silence; here each is a note, so that a recipe runs as it was published and
its reader knows what it does not do. A word that is in no recipe's grammar is most likely misspelt and stays an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmerge.files.checkpoints.safetensors import DTYPES
from jaxmerge.files.methods import EXTENSION, IGNORED, known, methods

KEYS = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer",
    "tokenizer_source", "chat_template", "name", "seed", "adapter",
)  # fmt: skip
SLICE_KEYS = ("sources", "base_model", "parameters", "residual_weight")
MODULE_KEYS = ("models", "slices", "parameters")
MODEL_KEYS = ("model", "parameters", "statistics")
SOURCE_KEYS = ("model", "layer_range", "parameters", "statistics")
# Without these a recipe is another one: in the wrong place they are an error.
BEARING = ("merge_method", "models", "slices", "modules", "sources", "model", "parameters")
# Of mergekit's command: what does the same here is a key of `jaxmerge merge`.
OPTIONS = (
    "allow_crimes", "clone_tensors", "copy_tokenizer", "cuda", "lazy_unpickle", "lora_merge_cache", "low_cpu_memory",
    "out_shard_size", "random_seed", "safe_serialization", "trust_remote_code", "write_model_card",
)  # fmt: skip
FLOATS = {str(dtype): dtype for dtype in DTYPES.values() if jnp.issubdtype(dtype, jnp.floating)}


def parameter_names() -> set[str]:
    """Every parameter of every method."""
    return {name for method in methods().values() for name in (*method.parameters, *method.unused)} | {*IGNORED}


def idle(word: Any, place: str) -> str | None:
    """Return the note on a word that has no effect where it stands; None if it is no word of the grammar.

    Args:
      word: a key that does not count at its place.
      place: what it was found as, such as "key of a model".
    """
    if not isinstance(word, str) or word in BEARING:
        return None
    if word.startswith(EXTENSION):
        return f"{place} {word!r} is an extension and has no effect"
    if word == "revision":
        return "'revision' beside a model has no effect, as in mergekit; write the model as org/name@revision"
    if word in parameter_names():
        if place.startswith("parameter"):
            return f"parameter {word!r} has no effect in {place.removeprefix('parameter of ')}: it is of other methods"
        return f"{word!r} has no effect as a {place}; move it to the 'parameters' there"
    if word in OPTIONS:
        return f"{word!r} has no effect as a {place}: it is an option of mergekit's command (docs/merge.md, Flags)"
    if word in (*KEYS, *SLICE_KEYS, *SOURCE_KEYS):
        where = "of the recipe" if word in KEYS else "of a slice or its sources"
        return f"{word!r} has no effect as a {place}: it is a key {where}"
    return None


def model_name(value: Any, key: str) -> str:
    """Return a model's name, `path` or `path+adapter`; mergekit's mapping {model, lora} is written so too."""
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} is {value!r}, wanted the path of a model")
    for part in value:
        # An architecture is told by the names of its tensors alone, so overriding it changes nothing.
        known(part, ("model", "lora", "path", "revision", "override_architecture"), f"key of {key}")
    if "path" in value:
        revision = value.get("revision")
        return model_name(value["path"], key) + (f"@{revision}" if revision is not None else "")
    parts = [value.get("model"), *([value["lora"]] if value.get("lora") is not None else [])]
    return "+".join(model_name(part, key) for part in parts)


def listed(value: Any, name: str, form: str) -> list[Any]:
    """Return a list that is not empty; `form` says what an entry of it is."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name!r} must be a list of {{{form}}}, found {value!r}")
    return value


def layer_range(value: Any, model: str) -> tuple[int, int]:
    """Check a `layer_range` [first, end): whole numbers, which may be written as text."""
    edges = [_whole(edge) for edge in value] if isinstance(value, list) else []
    found = [edge for edge in edges if edge is not None]
    if len(edges) != 2 or len(found) != 2 or not 0 <= found[0] <= found[1]:
        raise ValueError(f"layer_range of {model!r} is {value!r}, wanted [first, end] with 0 ≤ first ≤ end")
    return found[0], found[1]


def _whole(value: Any) -> int | None:
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def floating_dtype(value: Any, key: str) -> np.dtype | None:
    """Return the floating dtype that a recipe names; None where it leaves the choice."""
    if value in (None, "", "auto"):
        return None
    name = str(value).removeprefix("torch.")
    known(name, FLOATS, key)
    return FLOATS[name]


def read_seed(document: Mapping[str, Any]) -> int:
    """Return the seed of a recipe, 0 where it has none."""
    seed = document.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed!r:.100}, wanted an integer of 64 bits")
    return seed
