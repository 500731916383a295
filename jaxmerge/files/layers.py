r"""Which part of a model a tensor is, told from its name alone: module, layer, before or after the layers.

A layer is the first whole-number component of a name: `model.layers.3.mlp.experts.7.w` is of layer 3 in the
container `model.layers`. mergekit has a table for each architecture; this has none, so it merges any.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from jaxmerge.files.recipe import Module

# What comes before the layers, by the names that embeddings go by; the rest (norms, heads, poolers) comes after.
_BEFORE = re.compile(r"(^|[._])(embd|embed(?!_out)\w*|wte|wpe|shared|rotary_pos_emb|relative_pe)([._]|$)")


def is_before(name: str) -> bool:
    """Say whether a tensor outside the layers belongs to the first slice; otherwise to the last.

    Example:
      >>> is_before("model.embed_tokens.weight"), is_before("model.norm.weight"), is_before("embed_out.weight")
      (True, False, False)
    """
    return _BEFORE.search(name) is not None


def split(name: str) -> tuple[str, int, str] | None:
    """Return container, layer and the rest of a tensor's name; None outside the layers.

    Example:
      >>> split("model.layers.3.mlp.experts.7.w"), split("lm_head.weight")
      (('model.layers', 3, 'mlp.experts.7.w'), None)
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return None if at is None else (".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))


def container(name: str) -> str | None:
    """Return the container of a tensor's layer; None outside the layers."""
    parts = split(name)
    return None if parts is None else parts[0]


def depths(names: Iterable[str]) -> dict[str, float]:
    """Return each tensor's t = layer / (layers − 1) within its container, 0 outside; of a single layer 1, as mergekit.

    Example:
      >>> depths(["h.0.w", "h.1.w", "h.2.w", "head.w", "g.0.w"])
      {'h.0.w': 0.0, 'h.1.w': 0.5, 'h.2.w': 1.0, 'head.w': 0.0, 'g.0.w': 1.0}
    """
    names = list(names)
    last = {within: count - 1 for within, count in layer_counts(names).items()}
    layers = {name: split(name) for name in names}
    return {name: 0.0 if at is None else at[1] / last[at[0]] if last[at[0]] else 1.0 for name, at in layers.items()}


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """Return how many layers each container has."""
    counts: dict[str, int] = {}
    for name in names:
        if (parts := split(name)) is not None:
            counts[parts[0]] = max(counts.get(parts[0], 0), parts[1] + 1)
    return counts


def container_of(names: Iterable[str], module: str, model: str) -> str:
    """Return the one container of layers among `names`, or say why slices cannot be cut."""
    counts = layer_counts(names)
    if len(counts) == 1:
        return next(iter(counts))
    if not counts:
        raise ValueError(f"module {module!r} of {model!r} has no layers (no tensor's name has a number); use models")
    listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
    raise ValueError(
        f"module {module!r} of {model!r} has {len(counts)} containers of layers: {listed}; say which the slices are "
        f"of: modules: {{{next(iter(counts))}: {{slices: …}}, default: {{models: …}}}}"
    )


def by_layer(names: Iterable[str], within: str) -> dict[int, dict[str, str]]:
    """Return the names of a container's tensors: layer → rest of the name → name."""
    found: dict[int, dict[str, str]] = {}
    for name in names:
        parts = split(name)
        if parts is not None and parts[0] == within:
            found.setdefault(parts[1], {})[parts[2]] = name
    return found


def module_of(name: str, modules: Iterable[Module]) -> str | None:
    """Return the module that claims a tensor: of prefixes that fit the longest, else `default` if there is one."""
    names = [module.name for module in modules]
    fitting = [prefix for prefix in names if name.startswith(prefix + ".")]
    if fitting:
        return max(fitting, key=len)
    return "default" if "default" in names else None


def check_modules(modules: Iterable[Module], tensors: Mapping[str, Iterable[str]]) -> None:
    """Raise if a named module is no prefix of any tensor's name."""
    for module in modules:
        if module.name == "default":
            continue
        for model, names in tensors.items():
            if any(name.startswith(module.name + ".") for name in names):
                continue
            prefixes = sorted(layer_counts(names)) or sorted({name.split(".")[0] for name in names})
            raise ValueError(
                f"module {module.name!r}: no tensor of {model!r} has a name that starts with {module.name + '.'!r}; "
                f"modules are named by such prefixes, as {', '.join(prefixes[:6])}, and 'default' for the rest"
            )
