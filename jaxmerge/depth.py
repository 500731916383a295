r"""How deep a leaf lies: which siblings are layers, and whether a coefficient can be resolved for these leaves.

A leaf is of the layer that its path names by

  a whole number           `layers/3`, an entry of a list or a dict; the first in the path counts
  a number at the end of   `Dense_0`, `layers_1`, `h_2`, `block3`: of siblings NAME0 … NAME(n−1), n ≥ 2, that have the
  a name                   same leaves below them

The two halves of a gated MLP's input, `wi_0` and `wi_1` (T5, MaxText), lie side by side and are no layers. Under a
whole number nothing else is looked at: `layers/3/Dense_1` is of layer 3. A path in two sets (`Block_3/Dense_1`) has no
depth that a list could be read at.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.contract import nearest
from jaxmerge.where import first_match, matches

PARALLEL = ("wi",)  # siblings side by side, not one after the other
_NUMBERED = re.compile(r"(.*\D)(0|[1-9]\d*)")


class Layers(NamedTuple):
    """Layers that a path is in: their name with a star for the number, the path's number, and the last number."""

    name: str
    layer: int
    last: int


def depths(paths: Sequence[str]) -> dict[str, float]:
    """Return depth x = layer / (layers − 1) in [0, 1] of each path, 0 outside the layers.

    Layers are counted within their parent, so an encoder and a decoder each run from 0 to 1.

    Example:
      >>> depths(["h/0/w", "h/1/w", "h/2/w", "head/w"])
      {'h/0/w': 0.0, 'h/1/w': 0.5, 'h/2/w': 1.0, 'head/w': 0.0}
      >>> depths(["Dense_0/kernel", "Dense_1/kernel", "norm/scale"])
      {'Dense_0/kernel': 0.0, 'Dense_1/kernel': 1.0, 'norm/scale': 0.0}
    """
    sets = layers_of(tuple(paths))
    # A path in two sets is refused by `check` where its depth would be asked for.
    return {path: sets[path][0].layer / max(sets[path][0].last, 1) if len(sets[path]) == 1 else 0.0 for path in paths}


@functools.lru_cache(maxsize=16)
def layers_of(paths: tuple[str, ...]) -> dict[str, list[Layers]]:
    """Return the sets of layers that each path is in: none, one, or several, the outermost first.

    Example:
      >>> layers_of(("a_0/w_0", "a_0/w_1", "a_1/w_0", "a_1/w_1"))["a_1/w_0"]
      [Layers(name='a_*', layer=1, last=1), Layers(name='a_1/w_*', layer=0, last=1)]
    """
    named = {name: sorted(found)[-1] for name, found in _numbered(paths).items() if _fault(name, found) is None}
    whole: dict[str, int] = {}
    for path in paths:
        for head, part, _ in _components(path):
            if part.isdecimal():
                whole[head] = max(whole.get(head, 0), int(part))
                break
    return {path: _sets(path, named, whole) for path in paths}


def _sets(path: str, named: Mapping[str, int], whole: Mapping[str, int]) -> list[Layers]:
    found = []
    for head, part, _ in _components(path):
        if part.isdecimal():
            return [*found, Layers(f"{head}*", int(part), whole[head])]
        numbered = _NUMBERED.fullmatch(part)
        if numbered and (name := f"{head}{numbered[1]}*") in named:
            found.append(Layers(name, int(numbered[2]), named[name]))
    return found


def _components(path: str) -> list[tuple[str, str, str]]:
    """Each component of a path, with what is before it, the slash included, and what is after."""
    parts = path.split("/")
    return [("".join(f"{p}/" for p in parts[:i]), part, "/".join(parts[i + 1 :])) for i, part in enumerate(parts)]


def _numbered(paths: Sequence[str]) -> dict[str, dict[int, set[str]]]:
    """Siblings with a number at the end of their names: name with a star → number → paths of the leaves below it."""
    found: dict[str, dict[int, set[str]]] = {}
    for path in paths:
        for head, part, tail in _components(path):
            if part.isdecimal():
                break
            if numbered := _NUMBERED.fullmatch(part):
                found.setdefault(f"{head}{numbered[1]}*", {}).setdefault(int(numbered[2]), set()).add(tail)
    return found


def _fault(name: str, found: Mapping[int, set[str]]) -> str | None:
    """Say why numbered siblings are no layers, or None if they are."""
    if len(found) < 2:
        return "there is one"
    if name.rpartition("/")[2].rstrip("_*") in PARALLEL:
        return "they lie side by side"
    if sorted(found) != list(range(len(found))):
        return f"their numbers are {', '.join(map(str, sorted(found)))}"
    other = next((n for n, leaves in found.items() if leaves != found[0]), None)
    return None if other is None else f"number {other} has other leaves than number 0"


def check(value: Any, paths: Sequence[str], *, name: str, per_model: bool = False) -> None:
    """Refuse a pattern that decides nothing, and a list over depth where the layers are not clear.

    Args:
      paths: all leaves of the tree, stacked ones layer by layer.
      per_model: a sequence is one coefficient a model, and a list over depth stands within it.

    Example:
      >>> check({"**": 0.3, "mlp": 1.0}, ["layers/0/mlp/w", "head/w"], name="t")
      Traceback (most recent call last):
      ValueError: t: the pattern 'mlp' decides for no leaf, for '**' stands before it; put 'mlp' first
      >>> check([0.2, 0.8], ["mlp/w", "head/w"], name="t")
      Traceback (most recent call last):
      ValueError: t=[0.2, 0.8] is a list over depth, but no leaf that it decides for is in layers (2, first 'mlp/w'); \
wanted siblings such as layers/0, layers/1 or Dense_0, Dense_1; pass a number, or stacked= if layers are stacked
    """
    _check(value, list(paths), layers_of(tuple(paths)), name, per_model)


def _check(value: Any, paths: list[str], sets: Mapping[str, list[Layers]], name: str, per_model: bool) -> None:
    if isinstance(value, Mapping):
        _check_patterns(value, paths, list(sets), name)
        decided: dict[str, list[str]] = {pattern: [] for pattern in value}
        for path in paths:
            if (pattern := first_match(value, path)) is not None:
                decided[pattern].append(path)
        for pattern, inner in value.items():
            if decided[pattern]:
                _check(inner, decided[pattern], sets, f"{name}[{pattern!r}]", per_model)
    elif _is_list(value) and per_model:
        for i in range(len(value)) if isinstance(value, Sequence) or np.ndim(value) > 1 else ():
            _check(value[i], paths, sets, f"{name}[{i}]", False)
    elif _is_list(value) and len(value) > 1:
        _check_layers(value, paths, sets, name)


def _is_list(value: Any) -> bool:
    return (isinstance(value, Sequence) and not isinstance(value, str | bytes)) or np.ndim(value) >= 1


def _check_patterns(value: Mapping[str, Any], paths: Sequence[str], every: Sequence[str], name: str) -> None:
    matched = {pattern: {p for p in paths if matches(pattern, p)} for pattern in value}
    for place, (pattern, found) in enumerate(matched.items()):
        if not found:
            words = {part for path in every for part in path.split("/")}
            strange = next((part for part in pattern.strip("/").split("/") if part not in words), "")
            hint = nearest(strange, sorted(words))
            raise ValueError(
                f"{name}: the pattern {pattern!r} matches none of the {len(paths)} leaves; {hint}the first leaf is "
                f"{paths[0]!r}; change the pattern, or leave it out"
            )
        wider = next((b for b in list(matched)[:place] if found < matched[b]), None)
        if wider is not None:
            raise ValueError(
                f"{name}: the pattern {pattern!r} decides for no leaf, for {wider!r} stands before it; "
                f"put {pattern!r} first"
            )


def _check_layers(value: Any, paths: Sequence[str], sets: Mapping[str, list[Layers]], name: str) -> None:
    """Refuse a list over depth for leaves that are in no layers at all, or for a leaf that is in two sets of them."""
    shown = f"{name}={value}" if isinstance(value, list | tuple) else name
    two = next((path for path in paths if len(sets[path]) > 1), None)
    if two is not None:
        outer, inner = sets[two][:2]
        raise ValueError(
            f"{shown} is a list over depth, but leaf {two!r} is in two sets of layers, {outer.name!r} "
            f"({outer.last + 1}) and {inner.name!r} ({inner.last + 1}); give each layer its number by a pattern: "
            f"{name}={{{outer.name.replace('*', '0')!r}: …, {outer.name.replace('*', '1')!r}: …, '**': …}}"
        )
    if any(sets[path] for path in paths):
        return
    near = {key: why for key, found in _numbered(list(sets)).items() if (why := _fault(key, found)) is not None}
    said = "".join(f"; {key!r} are no layers, for {why}" for key, why in list(near.items())[:3])
    raise ValueError(
        f"{shown} is a list over depth, but no leaf that it decides for is in layers ({len(paths)}, first {paths[0]!r})"
        f"{said}; wanted siblings such as layers/0, layers/1 or Dense_0, Dense_1; pass a number, or stacked= if layers "
        "are stacked"
    )
