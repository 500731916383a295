r"""Pytrees of parameters: paths, checks that name the leaf, task vectors, dot, norm, casts.

A leaf is named by its path, components joined by slashes: `model/layers/0/mlp/up_proj/weight`. Dicts, lists,
dataclasses, Linen's FrozenDict, NNX State (its trailing `.value` left out) and Equinox modules are all named
by `jax.tree_util` key paths, so any registered pytree works.

What is merged: array leaves of a real floating dtype, float8 to float64. Arithmetic is in float32 (float64
for float64 leaves) and cast back once. Integer, boolean and PRNG-key arrays, and leaves that are no arrays
(an activation function, a name), are *passed through*: taken from the base if there is one, else from the
first model. Complex leaves are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

PyTree = Any
Array = jax.Array


class Aligned(NamedTuple):
    """Trees side by side: leaf i is `models[m][i]`, named `paths[i]`, and `base[i]` if there is a base."""

    paths: list[str]
    models: list[list[Any]]
    base: list[Any] | None
    treedef: Any


def path_name(key_path: Sequence[Any]) -> str:
    """Write a `jax.tree_util` key path as `model/layers/0/weight`.

    Example:
      >>> [(path, _)] = jax.tree_util.tree_flatten_with_path({"a": [1.0]})[0]
      >>> path_name(path)
      'a/0'
    """
    keys = list(key_path)
    # An NNX Variable is a node with one child, `.value`: the parameter's name is the Variable's.
    if len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys.pop()
    return "/".join(_key_name(key) for key in keys)


def _key_name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return `{path: leaf}` in flattening order.

    Example:
      >>> named_leaves({"b": 2, "a": {"x": 1}})
      {'a/x': 1, 'b': 2}
    """
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {path_name(path): leaf for path, leaf in pairs}
    if len(named) != len(pairs):
        paths = [path_name(path) for path, _ in pairs]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"two leaves are both named {twice!r}; rename a key so that paths are unique")
    return named


def merged_leaves(tree: PyTree) -> dict[str, Any]:
    """Return `{path: leaf}` of the leaves that rules merge: what may be handed to a `jit`, as functions may not.

    Example:
      >>> list(merged_leaves({"w": jnp.ones(2), "activation": jax.nn.relu, "step": jnp.int32(3)}))
      ['w']
    """
    return {path: leaf for path, leaf in named_leaves(tree).items() if is_merged(leaf)}


def leaf_paths(tree: PyTree) -> list[str]:
    """Return the path of every leaf, in flattening order."""
    return list(named_leaves(tree))


def is_array(leaf: Any) -> bool:
    """True for anything with a dtype and a shape: jax and numpy arrays, tracers, PRNG keys."""
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def is_merged(leaf: Any) -> bool:
    """True for the leaves that rules merge: arrays of a real floating dtype, bfloat16 and float8 included."""
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_concrete(*values: Any) -> bool:
    """True if no value (or entry of a list or dict of values) is traced, so that it may be looked at."""
    return not any(isinstance(value, Tracer) for value in jax.tree.leaves(values))


def describe(leaf: Any) -> str:
    """Say what a leaf is, for an error: `float32[2,3]` or the type's name."""
    if is_array(leaf):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return type(leaf).__name__


def wide(dtype: Any) -> np.dtype:
    """The dtype of the arithmetic for a leaf dtype: float32, or float64 for float64."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def or_one(divisor: Array) -> Array:
    """Return a divisor that is never zero: 1 where it is, for quotients of what is then zero too."""
    return jnp.where(divisor == 0, 1, divisor)


def align(models: Sequence[PyTree], base: PyTree | None = None, *, labels: Sequence[str] | None = None) -> Aligned:
    """Lay `models` and `base` side by side, or raise a ValueError that names the first leaf that differs.

    Paths and shapes must agree; `labels` name the models in errors. Floating dtypes may differ (an
    anchor kept in bfloat16, say): the result has the first model's. Container types may
    differ too (a dict and a FrozenDict with the same paths).
    """
    if isinstance(models, dict) or not isinstance(models, Sequence):
        raise TypeError(
            f"models must be a sequence of pytrees, found {type(models).__name__}; "
            "pass a list, also for one model: rule([tuned], base=base)"
        )
    if not models:
        raise ValueError("models is empty, wanted at least one pytree")
    first = named_leaves(models[0])
    trees = [list(first.values())]
    for i, model in enumerate(models[1:], start=1):
        trees.append(_like_first(model, first, labels[i] if labels else f"models[{i}]"))
    base_leaves = None if base is None else _like_first(base, first, "base")
    for path, leaf in first.items():
        if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(
                f"leaf {path!r} of models[0] is {describe(leaf)}; complex leaves have no merge rule here; "
                "split it into real and imaginary leaves first"
            )
    return Aligned(list(first), trees, base_leaves, jax.tree.structure(models[0]))


def _like_first(tree: PyTree, first: dict[str, Any], name: str) -> list[Any]:
    found = named_leaves(tree)
    missing = [path for path in first if path not in found]
    extra = [path for path in found if path not in first]
    if missing:
        raise ValueError(
            f"{name} has no leaf {missing[0]!r} (and lacks {len(missing)} of the {len(first)} of models[0]); "
            "merge models of one architecture, or drop the leaf from models[0]"
        )
    if extra:
        raise ValueError(
            f"{name} has a leaf {extra[0]!r} that models[0] lacks ({len(extra)} such leaves); "
            "merge models of one architecture, or drop the leaf"
        )
    for path, wanted in first.items():
        leaf = found[path]
        if is_array(leaf) != is_array(wanted) or is_merged(leaf) != is_merged(wanted):
            raise ValueError(
                f"leaf {path!r} of {name} is {describe(leaf)}, wanted {describe(wanted)} as in models[0]; "
                "cast one of the two"
            )
    unlike = [path for path, wanted in first.items() if is_array(wanted) and found[path].shape != wanted.shape]
    if unlike:
        raise ValueError(_unlike_shapes(found, first, unlike, name))
    return [found[path] for path in first]


# What embeddings and heads are called: leaves with a row (the head of a kernel: a column) for every word.
OF_WORDS = {
    "embed", "embedder", "embedding", "embed_in", "embed_out", "embed_tokens", "head", "input_embedding", "lm_head",
    "logits_dense", "output_layer", "shared", "tok_embeddings", "token_embedder", "unembed", "word_embeddings", "wte",
}  # fmt: skip


def _unlike_shapes(found: dict[str, Any], first: dict[str, Any], unlike: list[str], name: str) -> str:
    """Say which shapes differ: first of all that the vocabularies do, where rows of an embedding or head are why."""
    shapes = {path: (tuple(found[path].shape), tuple(first[path].shape)) for path in unlike}
    of_words = [path for path in unlike if _other_vocabulary(path, *shapes[path])]
    path = (of_words or unlike)[0]
    said = f"leaf {path!r} of {name} has shape {shapes[path][0]}, wanted {shapes[path][1]} as in models[0]"
    more = f" (and {len(unlike) - 1} of {len(first)} leaves more differ)" if unlike[1:] else ""
    if not of_words:
        return f"{said}{more}; merge models of one architecture"
    way = "give the models one vocabulary first, as `jaxmerge merge` does on disk with tokenizer_source: union"
    return f"the vocabularies differ: {said}{more}; {way}"


def _other_vocabulary(path: str, one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether a leaf is an embedding or head, and differs in its count of words alone."""
    parts = path.split("/")
    axis = -1 if parts[-1] == "kernel" else 0  # of a Linen or NNX layer, [D, V]
    if OF_WORDS.isdisjoint(parts) or len(one) != len(other) or len(one) not in (1, 2):
        return False
    return one[axis] != other[axis] and sum(a != b for a, b in zip(one, other, strict=True)) == 1


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Cast the floating leaves to `dtype`; the others stay as they are.

    Example:
      >>> cast({"w": jnp.ones(2), "step": jnp.int32(3)}, jnp.bfloat16)["w"].dtype
      dtype(bfloat16)
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype) if is_merged(leaf) else leaf, tree)


def task_vector(tuned: PyTree, base: PyTree) -> dict[str, Array]:
    r"""Return $\tau = \theta_t - \theta_b$ as `{path: float32 array}` over the floating leaves.

    Example:
      >>> task_vector({"w": jnp.array([3.0])}, {"w": jnp.array([1.0])})
      {'w': Array([2.], dtype=float32)}
    """
    trees = align([tuned], base)
    assert trees.base is not None
    return {
        path: _widen(t) - _widen(b)
        for path, t, b in zip(trees.paths, trees.models[0], trees.base, strict=True)
        if is_merged(t)
    }


def _widen(leaf: Any) -> Array:
    return jnp.asarray(leaf).astype(wide(leaf.dtype))


def dot(a: PyTree, b: PyTree) -> Array:
    r"""Return $\langle a, b \rangle$ over all floating leaves, in float32, shape ().

    Example:
      >>> float(dot({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}))
      11.0
    """
    trees = align([a, b])
    products = [
        jnp.sum(_widen(x) * _widen(y)).astype(jnp.float32)
        for x, y in zip(trees.models[0], trees.models[1], strict=True)
        if is_merged(x)
    ]
    return sum(products, start=jnp.zeros((), jnp.float32))


def norm(tree: PyTree) -> Array:
    r"""Return the Frobenius norm $\|\theta\|_F$ over all floating leaves, in float32, shape ()."""
    return jnp.sqrt(dot(tree, tree))
