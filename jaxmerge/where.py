r"""Where a rule acts: path patterns, stacked layers, coefficients per leaf and per layer.

One grammar for every pattern. A pattern is a run of whole path components, found anywhere in the path;
inside a component `*` and `?` are the shell's; `**` stands for any number of components; a leading `/` ties
the run to the start of the path.

  `mlp`               every leaf with a component `mlp`
  `layers/1`          layer 1, and not layer 10
  `self_attn/?_proj`  q_proj, k_proj, v_proj, o_proj of every layer
  `/lm_head`          the head at the top, not `model/vision/lm_head`
  `**`                everything

Stacked layers. `stacked=("model/layers",)` says that every leaf under `model/layers` has a leading [L] axis.
Layer l of the leaf `model/layers/mlp/weight` is then treated, and named, as the leaf
`model/layers/l/mlp/weight` of an unstacked tree: the same filters, coefficients and random masks.

Coefficients. A shared coefficient (t, alpha, scale) is
  a number or traced scalar        the same for every leaf
  a list, or an array of shape [m] a gradient: piecewise linear over depth x = layer / (layers − 1); leaves
                                   outside the layers (embeddings, final norm, head) take x = 0. What layers
                                   are, and what is refused, says `jaxmerge.depth`
  a dict pattern → one of these    the first pattern that matches the leaf's path wins
A coefficient per model (weights, alphas, density) is one of these for all, or a sequence of them, one a model.
"""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge.tree import Array, is_concrete, leaf_paths

Where = str | Sequence[str] | Callable[[str], bool]
Value = float | Array | np.ndarray | np.generic
"""A number; of arrays those of shape (), traced ones too."""
OverDepth = Value | Sequence[Value]
"""A number, or a gradient over depth: a list, or an array of shape [m]."""
Coefficient = OverDepth | Mapping[str, OverDepth]
"""A shared coefficient: a number, a list over depth, or a dict pattern → one of these."""
PerModel = Coefficient | Sequence[Coefficient] | Mapping[str, Coefficient | Sequence[Coefficient]]
"""A coefficient per model: a shared one for all models, or a sequence of them, one a model."""


@functools.lru_cache(maxsize=4096)
def _parsed(pattern: str) -> tuple[bool, list[Callable[[str], bool] | None]]:
    """Return whether a pattern is tied to the start, and a test of each of its components; None stands for `**`."""
    if not pattern.strip("/"):
        raise ValueError(f"pattern {pattern!r} is empty; wanted path components, as in 'mlp' or '**' for all")
    components = pattern.strip("/").split("/")
    return pattern.startswith("/"), [None if c == "**" else _component(c) for c in components]


def _component(glob: str) -> Callable[[str], bool]:
    """Return a test of one path component: `*` stands for any characters, `?` for one.

    The text between two stars is looked for where it first stands, behind the text before it; a later place could
    match no more. So no star is ever tried twice, and the time is linear in the component, however many stars there
    are. To a backtracking regular expression each star is one more power of it.
    """
    first, *middle = glob.split("*")
    if not middle and "?" not in glob:
        return glob.__eq__
    # Without repetitions, these expressions are as fast as a search for a string.
    pieces = [re.compile(re.escape(piece).replace(r"\?", "."), re.DOTALL) for piece in (first, *middle)]
    if not middle:
        return lambda name: pieces[0].fullmatch(name) is not None
    lengths, last = len(first), len(middle[-1])

    def fits(name: str) -> bool:
        if not pieces[0].match(name):
            return False
        at = lengths
        for piece in pieces[1:-1]:
            found = piece.search(name, at)
            if found is None:
                return False
            at = found.end()
        return len(name) - last >= at and pieces[-1].match(name, len(name) - last) is not None

    return fits


def _find(pattern: str, path: str) -> tuple[int, int] | None:
    """Return the first run of a path's components that a pattern matches, the longest from there: [start, end).

    Row i of a table says from which components on the pattern from its i-th component on matches; a row needs the one
    below it alone, so the time is the product of the two lengths.
    """
    tied, tests = _parsed(pattern)
    names = path.split("/")
    count = len(names)
    rows = [[True] * (count + 1)]
    for test in reversed(tests):
        below, row = rows[-1], [False] * (count + 1)
        row[count] = test is None and below[count]
        for j in reversed(range(count)):
            if test is None:
                row[j] = below[j] or (names[j] != "" and row[j + 1])
            else:
                row[j] = below[j + 1] and test(names[j])
        rows.append(row)
    rows.reverse()
    start = next((j for j in range(1 if tied else count + 1) if rows[0][j]), None)
    if start is None:
        return None
    end = start
    for test, row, below in zip(tests, rows, rows[1:], strict=False):
        if test is not None:
            end += 1
            continue
        while end < count and names[end] != "" and row[end + 1]:
            end += 1
        while not below[end]:  # the last place that the rest matches from
            end -= 1
    return start, end


def matches(where: Where, path: str) -> bool:
    """Say whether `where` (a pattern, several of which one must match, or a predicate) selects `path`.

    Example:
      >>> matches("layers/1", "model/layers/1/mlp/weight"), matches("layers/1", "model/layers/10/mlp/weight")
      (True, False)
    """
    if callable(where):
        return bool(where(path))
    if isinstance(where, str):
        return _find(where, path) is not None
    return any(matches(pattern, path) for pattern in where)


def select(tree: Any, where: Where) -> list[str]:
    """Return the paths of `tree`'s leaves that `where` selects; a pattern that selects none is an error."""
    paths = leaf_paths(tree)
    chosen = [path for path in paths if matches(where, path)]
    if not chosen:
        raise ValueError(f"{where!r} selects none of the {len(paths)} leaves; the first is {paths[:1]}")
    return chosen


def layer_index(path: str) -> int | None:
    """Return the layer a path belongs to: its first integer component, or None.

    Example:
      >>> layer_index("model/layers/3/mlp/experts/7/weight"), layer_index("lm_head/weight")
      (3, None)
    """
    return next((int(part) for part in path.split("/") if part.isdecimal()), None)


def layer_group(path: str) -> str:
    """Name the layer of a path: up to the first integer component, else the parent path.

    Example:
      >>> layer_group("model/layers/3/mlp/weight"), layer_group("lm_head/weight"), layer_group("w")
      ('model/layers/3', 'lm_head', 'w')
    """
    parts = path.split("/")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return "/".join(parts[: i + 1])
    return "/".join(parts[:-1]) or path


def layer_paths(path: str, shape: Sequence[int], stacked: Sequence[str]) -> list[str] | None:
    """Return the L paths of a stacked leaf's layers, or None if `path` is under no stacked container.

    Example:
      >>> layer_paths("model/layers/w", (2, 5), ("layers",))
      ['model/layers/0/w', 'model/layers/1/w']
    """
    patterns = [stacked] if isinstance(stacked, str) else stacked
    for pattern in patterns:
        found = _find(pattern, path)
        if found is None:
            continue
        if not shape:
            raise ValueError(
                f"leaf {path!r} has shape (), but stacked={pattern!r} wants a leading layer axis; "
                "name a container whose leaves are all stacked"
            )
        names = path.split("/")
        head, tail = "/".join(names[: found[1]]), "/".join(names[found[1] :])
        return [f"{head}/{l}/{tail}" if tail else f"{head}/{l}" for l in range(shape[0])]
    return None


def resolve(value: Any, path: str, depth: float, *, name: str) -> Any:
    """Resolve a shared coefficient for one leaf to a Python number or a traced scalar.

    Example:
      >>> resolve({"mlp": [0.0, 1.0], "**": 0.3}, "layers/1/mlp/w", 0.25, name="t")
      0.25
    """
    if isinstance(value, Mapping):
        return resolve(_decided(value, path, name), path, depth, name=name)
    if isinstance(value, str | bytes) or value is None:
        raise TypeError(f"{name}={value!r} is not a number, a list over depth, or a dict of path patterns")
    if isinstance(value, Sequence) or np.ndim(value) == 1:
        return _gradient(value, depth, name)
    if np.ndim(value) != 0:
        raise ValueError(f"{name} has shape {np.shape(value)}, wanted a scalar or a list over depth")
    return value


def resolve_each(value: Any, path: str, depth: float, count: int, *, name: str) -> list[Any]:
    """Resolve a coefficient per model for one leaf to `count` numbers or traced scalars.

    Example:
      >>> resolve_each([0.5, {"mlp": 1.0, "**": [0.0, 0.2]}], "head/w", 0.0, 2, name="weights")
      [0.5, 0.0]
    """
    if isinstance(value, Mapping):
        return resolve_each(_decided(value, path, name), path, depth, count, name=name)
    if (isinstance(value, Sequence) and not isinstance(value, str | bytes)) or np.ndim(value) >= 1:
        if len(value) != count:
            raise ValueError(f"{name} has {len(value)} entries, wanted {count}: one a model, or one number for all")
        return [resolve(value[i], path, depth, name=f"{name}[{i}]") for i in range(count)]
    return [resolve(value, path, depth, name=name)] * count


def first_match(value: Mapping[str, Any], path: str) -> str | None:
    """Return the first pattern of a coefficient that matches a leaf's path: the one that decides; None without one."""
    return next((pattern for pattern in value if matches(pattern, path)), None)


def _decided(value: Mapping[str, Any], path: str, name: str) -> Any:
    hits = [pattern for pattern in value if matches(pattern, path)]
    if not hits:
        raise ValueError(
            f"no pattern of {name} matches leaf {path!r} (patterns: {list(value)}); add '**' for all the rest"
        )
    traced = not is_concrete(value)
    keeps_order = isinstance(value, OrderedDict) or list(value) != sorted(value)
    if len(hits) > 1 and traced and not keeps_order:
        raise ValueError(
            f"{name} is a traced dict and patterns {hits[:2]} both match leaf {path!r}: jit sorts the keys "
            "of a dict, so which comes first is lost; pass a collections.OrderedDict"
        )
    return value[hits[0]]


def _gradient(points: Any, depth: float, name: str) -> Any:
    count = len(points)
    if count == 0:
        raise ValueError(f"{name} is an empty list, wanted at least one point over depth")
    at = depth * (count - 1)
    low = min(int(at), count - 1)
    part = at - low
    if part == 0.0:
        return points[low]
    return points[low] * (1.0 - part) + points[low + 1] * part


# Kinds in the order in which a layer computes; others follow under their own names.
KINDS = ("q", "k", "v", "o", "gate", "up", "down", "norms")


_NAMES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up",
    "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip


def kind(name: str) -> str:
    """Name the kind of matrix that a tensor of a layer is.

    Example:
      >>> kind("model.layers.3.self_attn.q_proj.weight"), kind("model.layers.3.input_layernorm.weight")
      ('q', 'norms')
      >>> kind("h.0.attn.c_attn.bias"), kind("model.layers.0.mlp.experts.7.up_proj.weight")
      ('c_attn', 'up')
    """
    parts = [part for part in name.split(".") if not part.isdecimal()]
    module = parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]
    if "norm" in module or re.fullmatch(r"ln_\w+", module):
        return "norms"
    return _NAMES.get(module, module)
