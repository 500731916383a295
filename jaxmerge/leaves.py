r"""Run one formula on every leaf: the one engine under every rule.

A rule is a module-level *leaf function* in float32 and a call of `leafwise`:

    def _interpolate(x, *, t):
        a, b = x.models
        return a + t * (b - a)

The leaf function sees one unstacked leaf: `x.models` N arrays, `x.base` an array or None, `x.keys` [N] PRNG
keys or None; shared coefficients as scalars (), coefficients per model as vectors [N], options as they are.
The engine checks the trees, widens to float32, resolves coefficients by path, maps over the layers of stacked
leaves, derives the keys, casts back once, and keeps the first model's dtype, shape and sharding. Coefficients
and keys are traced arguments of one jitted function per (leaf function, shape, options): no value of theirs
compiles anything anew.

Keys of the random rules: `fold_in(fold_in(key, crc32(leaf path)), crc32(model name))`. crc32, because
Python's own hash of a string is salted per process. So the draw for a leaf of a model depends on the seed,
the leaf's path and the model's name, and on nothing else: not on the order of the models, the sharding, the
device count, or other leaves.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import math
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import depth, tree, where
from jaxmerge.contract import DONATE
from jaxmerge.tree import Array, PyTree, Tracer

Convert = Callable[[Any, int], Any]
Check = Callable[[Any, str], None]
Aside = Callable[[Sequence[Any], Any, Any], tuple[Any, ...]]


class Operands(NamedTuple):
    """What a leaf function sees of one leaf, widened to float32."""

    models: tuple[Array, ...]
    base: Array | None = None
    keys: Array | None = None
    extra: tuple[Array, ...] = ()
    stored: tuple[Array, ...] = ()  # the models and the base, if there is one, as they came: see `reread`
    widen: Callable[[Array], Array] = lambda array: array
    on_one_device: bool = False  # known to be: blocks of it may be taken in a loop, which would gather a mesh
    aside: tuple[Array, ...] = ()  # what the host computed of the leaf: see `leafwise`

    def reread(self, stored: tuple[Array, ...]) -> Operands:
        """Return these operands with models and base widened from `stored`, in the order of `self.stored`.

        For what a loop repeats: it should read the weights as they are stored and widen them in passing, where
        `self.models` from outside the loop would be held in float32.
        """
        widened = tuple(self.widen(array) for array in stored)
        count = len(self.models)
        base = None if self.base is None else widened[count]
        return self._replace(models=widened[:count], base=base, stored=tuple(stored))

    def after(self, *results: Array) -> Operands:
        """Return these operands, read again from what is stored once `results` are there.

        The compiler then computes from them anew: it holds nothing from before, and weights that are themselves
        computed it computes once, not again with another rounding. Random numbers it draws anew, the same.
        """
        stored, keys, _ = jax.lax.optimization_barrier((self.stored, self.keys, results))
        return self.reread(stored)._replace(keys=keys)

    @property
    def deltas(self) -> tuple[Array, ...]:
        r"""$\tau_i = \theta_i - \theta_b$ of each model."""
        assert self.base is not None
        return tuple(model - self.base for model in self.models)


def leafwise(
    leaf: Callable[..., Array],
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    shared: Mapping[str, Any] | None = None,
    each: Mapping[str, Any] | None = None,
    options: Mapping[str, Hashable] | None = None,
    convert: Mapping[str, Convert] | None = None,
    check: Mapping[str, Check] | None = None,
    extra: Sequence[PyTree] = (),
    beside: Sequence[Mapping[str, Array]] = (),
    aside: Aside | None = None,
) -> PyTree:
    """Apply `leaf` to every floating leaf of `models`; see the module's docstring.

    Args:
      leaf: module-level function `(Operands, **coefficients, **options) -> array`, of one unstacked leaf.
      models: N pytrees alike in paths and shapes.
      base: one more such pytree, or None.
      key: threefry key for random rules, or None.
      names: N names of the models, for the keys; by default "0", "1", …: then masks go by position.
      stacked: patterns of containers whose leaves have a leading layer axis.
      shared: coefficients resolved to a scalar a leaf.
      each: coefficients resolved to [N] a leaf.
      options: static, hashable arguments of `leaf`.
      convert: for some coefficients, `(value, n) -> array`: what the leaf function gets for a leaf of n
        elements (of a layer), as a count k for a density. Called on the host where the value is concrete.
      check: for some coefficients, `(resolved value, path)`: raises where a concrete one will not do. Called for
        every leaf (layer) before any is merged.
      extra: more trees alike in paths and shapes (statistics of the models, masks): `x.extra`.
      beside: mappings from path to an array of any shape, after the others in `x.extra` of the leaves that have one.
      aside: `(models, base, cast) -> arrays`, a function of NumPy arrays that is called where a leaf's values are known
        and in a CPU's memory. Its arrays, of the leaf's shape, are `x.aside`; elsewhere that is empty.

    Returns:
      A pytree with structure, shapes, dtypes and shardings of models[0].
    """
    count = len(models)
    labels = [f"models[{i}]" for i in range(count)] + [f"statistics[{i}]" for i in range(len(extra))]
    trees = tree.align([*models, *extra], base, labels=labels)
    key = None if key is None else as_key(key)
    name_salts = np.asarray([zlib.crc32(str(n).encode()) for n in names or range(count)], np.uint32)
    layers = {
        path: where.layer_paths(path, first.shape, stacked) or [path]
        for path, first in zip(trees.paths, trees.models[0], strict=True)
        if hasattr(first, "shape")  # of an array, or of one that a mask has set aside
    }
    every = [p for path in trees.paths for p in layers.get(path, [path])]
    merged_paths = [p for p, first in zip(trees.paths, trees.models[0], strict=True) if tree.is_merged(first)]
    merged_layers = {path: layers[path] for path in merged_paths}
    resolved = _resolved(merged_layers, every, count, shared or {}, each or {}, check or {})
    frozen = tuple(sorted((options or {}).items()))
    spare = _spare(trees)
    out = []
    for i, path in enumerate(trees.paths):
        first = trees.models[0][i]
        base_leaf = None if trees.base is None else trees.base[i]
        if not tree.is_merged(first):
            out.append(first if base_leaf is None else base_leaf)
            continue
        is_stacked = layers[path] != [path]
        size = max(1, math.prod(first.shape) // len(layers[path])) if first.shape else 1
        salts = np.asarray([zlib.crc32(p.encode()) for p in layers[path]], np.uint32)
        leaves = [m[i] for m in trees.models]
        near = aside is not None and base_leaf is not None and all(map(_in_host_memory, (*leaves[:count], base_leaf)))
        run = _run_over_first if id(first) in spare else _run
        merged = run(
            _on_device(first),
            tuple(_on_device(x) for x in (*leaves[1:], *(b[path] for b in beside if path in b))),
            None if base_leaf is None else _on_device(base_leaf),
            key,
            salts if is_stacked else salts[0],
            name_salts,
            {
                name: _array(values if is_stacked else values[0], size, (convert or {}).get(name))
                for name, values in resolved[path].items()
            },
            aside(leaves[:count], base_leaf, _DTYPES.get()[0]) if near and aside is not None else (),
            count=count,
            leaf=leaf,
            options=frozen,
            is_stacked=is_stacked,
            dtypes=_DTYPES.get(),
            on_one_device=all(_on_one_device(model[i]) for model in trees.models),
        )
        out.append(_keep_sharding(merged, first))
    return jax.tree.unflatten(trees.treedef, out)


def _resolved(
    layers: Mapping[str, list[str]],
    every: list[str],
    count: int,
    shared: Mapping[str, Any],
    each: Mapping[str, Any],
    check: Mapping[str, Check],
) -> dict[str, dict[str, list[Any]]]:
    """Resolve and check coefficients: path of a leaf → name → one value a layer; of `each` a list with one a model.

    Args:
      layers: paths of each merged leaf's layers, its own where it is not stacked.
      every: all paths of the tree, merged or not: what depth is counted over and patterns are held against.
    """
    deep = depth.depths(every)
    resolved = {
        path: {name: [where.resolve(v, p, deep[p], name=name) for p in parts] for name, v in shared.items()}
        | {name: [where.resolve_each(v, p, deep[p], count, name=name) for p in parts] for name, v in each.items()}
        for path, parts in layers.items()
    }
    for name, value in shared.items():
        depth.check(value, every, name=name)
    for name, value in each.items():
        depth.check(value, every, name=name, per_model=True)
    for name, fits in check.items():
        for path, coefficients in resolved.items():
            for layer, value in zip(layers[path], coefficients[name], strict=True):
                fits(value, layer)
    return resolved


@contextlib.contextmanager
def dtypes(cast: Any = None, out: Any = None) -> Iterator[None]:
    """Within it rules cast floating leaves to `cast` first, and the result, once, to `out`; None: as it is.

    For callers who keep weights in files: casting before and after the rule would hold copies of a leaf, and round
    a result of another dtype twice. Not for use around a `jit` of your own: the dtypes are no part of its cache key.
    """
    token = _DTYPES.set((cast, out))
    try:
        yield
    finally:
        _DTYPES.reset(token)


_DTYPES: contextvars.ContextVar[tuple[Any, Any]] = contextvars.ContextVar("dtypes", default=(None, None))


def _spare(trees: tree.Aligned) -> set[int]:
    """The leaves (their ids) of the first model that a result may be written over.

    Those that are arrays of jax already, of the result's dtype, and nobody else's in this call: neither another
    model's, nor the base's, nor there twice, as tied embeddings may be.
    """
    if not DONATE.get() or _DTYPES.get()[1] is not None:
        return set()
    uses = collections.Counter(id(leaf) for leaves in (*trees.models, trees.base or ()) for leaf in leaves)
    mine = [leaf for leaf in trees.models[0] if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)]
    return {id(leaf) for leaf in mine if uses[id(leaf)] == 1}


STATIC = ("count", "leaf", "options", "is_stacked", "dtypes", "on_one_device")


def _merge(
    first, others, base, key, path_salt, name_salts, coefficients, aside,
    *, count, leaf, options, is_stacked, dtypes, on_one_device,
):  # fmt: skip
    cast, out = dtypes
    models = (first, *others)
    dtype = tree.wide(cast or models[0].dtype)

    def one(models, base, path_salt, coefficients, aside):
        keys = None
        if key is not None:
            keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, path_salt)))(name_salts)
        # Statistics and masks keep their precision: `cast` is of weights.
        widened = (*map(widen, models[:count]), *(more.astype(dtype) for more in models[count:]))
        stored = models[:count] if base is None else (*models[:count], base)
        wide_base = None if base is None else widen(base)
        operands = Operands(widened[:count], wide_base, keys, widened[count:], stored, widen, on_one_device, aside)
        values = {
            name: value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value
            for name, value in coefficients.items()
        }
        return leaf(operands, **values, **dict(options))

    def widen(leaf):
        return leaf.astype(dtype) if cast is None else leaf.astype(cast).astype(dtype)

    run = jax.vmap(one) if is_stacked else one
    return run(models, base, path_salt, coefficients, aside).astype(out or models[0].dtype)


_run = jax.jit(_merge, static_argnames=STATIC)
_run_over_first = jax.jit(_merge, static_argnames=STATIC, donate_argnames="first")


def as_key(key: Any) -> Array:
    """Return a typed threefry key, or say how to make one."""
    typed = tree.is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and not (tree.is_array(key) and key.dtype == np.uint32 and tuple(key.shape[-1:]) == (2,)):
        raise TypeError(f"key is {tree.describe(key)}, wanted a PRNG key; pass key=jax.random.key(seed)")
    if not typed:
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise ValueError(
            f"key has the implementation {jax.random.key_impl(key)}, wanted threefry2x32: others draw other "
            "masks on another mesh; pass jax.random.key(seed, impl='threefry2x32')"
        )
    if key.shape != ():
        raise ValueError(f"key has shape {key.shape}, wanted one key of shape ()")
    return key


def _array(values: Any, size: int, convert: Convert | None) -> Any:
    """Numbers and traced scalars, nested in lists, as one array: on the host if they all are numbers."""
    if isinstance(values, list):
        arrays = [_array(value, size, convert) for value in values]
        return jnp.stack(arrays) if any(isinstance(a, jax.Array) for a in arrays) else np.stack(arrays)
    if convert is not None:
        values = convert(values, size)
        if hasattr(values, "dtype") and not jnp.issubdtype(values.dtype, jnp.floating):
            return values
    dtype = np.float64 if jax.config.jax_enable_x64 else np.float32  # type: ignore[attr-defined]
    return jnp.asarray(values, dtype) if isinstance(values, jax.Array) else np.asarray(values, dtype)


def _in_host_memory(leaf: Any) -> bool:
    """Whether NumPy may read a leaf where it lies, and XLA would compute there too."""
    if isinstance(leaf, np.ndarray):
        device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
        return getattr(device, "platform", device) == "cpu"
    if not isinstance(leaf, jax.Array) or not _on_one_device(leaf):
        return False
    (device,) = leaf.sharding.device_set
    return device.platform == "cpu"


def _on_one_device(leaf: Any) -> bool:
    if isinstance(leaf, Tracer):
        return False  # where it lies is not known yet
    return not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1


def _on_device(leaf: Any) -> Any:
    """Bring a leaf offloaded to host memory onto its device: one leaf at a time, so one leaf is the peak."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
        return leaf
    default = next(iter(leaf.sharding.device_set)).default_memory().kind
    if leaf.sharding.memory_kind in (None, default):
        return leaf
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(default))


def settle(leaf: Any, first: Any) -> Any:
    """Give a leaf taken over as it is the dtype, memory and sharding of the first model's."""
    if not tree.is_merged(first) or leaf is first:
        return leaf
    return _keep_sharding(jnp.asarray(_on_device(leaf)).astype(first.dtype), first)


def _keep_sharding(merged: Array, first: Any) -> Array:
    if isinstance(merged, Tracer) or not isinstance(first, jax.Array):
        return merged
    wanted = first.sharding
    default = next(iter(wanted.device_set)).default_memory().kind
    if wanted.memory_kind not in (None, default):
        wanted = wanted.with_memory_kind(default)
    if merged.sharding.is_equivalent_to(wanted, merged.ndim):
        return merged
    return jax.device_put(merged, wanted)
