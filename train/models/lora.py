r"""LoRA: frozen weights with a low-rank side path, $y = W x + \frac{\alpha}{r} B A x$.

Training goes through the side path, never through W + s·B·A: with the sum, autodiff forms ∂L/∂W of the whole
matrix on the way to A and B, a third of a step's work and a matrix of memory a weight, and dropout of the side's
input has no sum to be part of. The sum, exact in float32, is for sampling, merging and export.

An adapter is a tree like the parameters' with `lora_A/weight` [r, in] and `lora_B/weight` [out, r] at each module;
with stacked layers (stacked.py) both have the leading axis L too.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmerge.files.patterns import is_found

from ..log import UserError, mistakes
from .config import Lora
from .matmul import matmul_t

Params = dict[str, Any]
Path = tuple[str, ...]


class Side(nnx.Module):
    """x → B·A·x beside a weight; the scale is in B already."""

    def __init__(self, leaves: Params):
        self.a, self.b = nnx.Param(leaves["a"]), nnx.Param(leaves["b"])
        self.key = nnx.Variable(leaves["key"]) if "key" in leaves else None
        self.keep = nnx.Variable(leaves["keep"]) if "keep" in leaves else None

    def __call__(self, x: jax.Array, dtype) -> jax.Array:
        if self.key is not None and self.keep is not None:
            keep = self.keep[...]
            kept = jax.random.bernoulli(jax.random.wrap_key_data(self.key[...]), keep, x.shape)
            x = jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros_like(x))
        return matmul_t(matmul_t(x, self.a[...], dtype), self.b[...], dtype)


def init_lora(lora: Lora, params: Params, key: jax.Array) -> Params:
    """A new adapter for the matrices of `params` that `lora.targets` name: B zero, so that it changes nothing.

    Args:
      params: arrays or shapes, layers unrolled or stacked.
      key: A ~ U(−1/√in, 1/√in), drawn from the key and the module's path.
    """
    adapter: Params = {}
    for path, weight in modules(params):
        name = "/".join(path)
        if not any(is_named(pattern, name) for pattern in lora.targets):
            continue
        if path[-1] in ("embed_tokens", "lm_head"):
            raise UserError(f"lora.targets name {name}; adapters of embeddings and heads are not known, leave it out")
        if "/experts/" in f"/{name}/":
            raise UserError(
                f"lora.targets name {name}; adapters of experts are not known: name others alone, such as "
                "'self_attn/.*_proj$'"
            )
        *stack, rows, columns = weight.shape
        k = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
        a = jax.random.uniform(k, (*stack, lora.rank, columns), minval=-1, maxval=1) * columns**-0.5
        set_at(adapter, (*path, "lora_A", "weight"), a)
        set_at(adapter, (*path, "lora_B", "weight"), jnp.zeros((*stack, rows, lora.rank)))
    if not adapter:
        near = sorted({path[-1] for path, _ in modules(params)})
        raise UserError(f"lora.targets {list(lora.targets)!r:.200} name no matrix of the model; modules end in {near}")
    return adapter


def is_named(pattern: str, name: str) -> bool:
    """Whether a pattern of `lora.targets` is found in the path of a module, in time linear in the path."""
    with mistakes():
        return is_found(pattern, name, "lora.targets")


def check_targets(lora: Lora, params: Params) -> None:
    """Refuse a pattern of `lora.targets` that names no matrix of `params`: the others would hide it."""
    names = ["/".join(path) for path, _ in modules(params)]
    for pattern in lora.targets:
        if not any(is_named(pattern, name) for name in names):
            near = sorted({name.rpartition("/")[2] for name in names})
            raise UserError(f"lora.targets: {pattern!r:.200} names no matrix of the model; modules end in {near}")


def attach(lora: Lora, params: Params, adapter: Params, *, key: jax.Array | None = None) -> Params:
    """Parameters with the adapter as side paths, for `decoder.bind` and all that calls it; differentiable in both.

    Args:
      key: of the dropout masks, one a step (and part of a batch); None: no dropout.
    """
    joined = copy_dicts(params)
    for path, a, b in pairs(adapter):
        leaves = {"a": a, "b": b * lora.scale}
        if key is not None and lora.dropout:
            stack = a.shape[:-2]
            k = jax.random.fold_in(key, np.uint32(zlib.crc32("/".join(path).encode())))
            leaves["key"] = jax.random.key_data(jax.random.split(k, stack) if stack else k)
            leaves["keep"] = jnp.full(stack, 1 - lora.dropout, jnp.float32)
        node = at(joined, path)
        if "weight" not in node:
            raise UserError(f"the adapter has {'/'.join(path)}, the model has no such matrix")
        node["side"] = leaves
    return joined


def detach(params: Params) -> tuple[Params, dict[Path, Params]]:
    """What `attach` joined: (plain parameters, module path → leaves of its side)."""
    sides: dict[Path, Params] = {}

    def walk(tree: Params, path: Path) -> Params:
        if "side" in tree:
            sides[path] = tree["side"]
        return {
            key: walk(value, (*path, key)) if isinstance(value, dict) else value
            for key, value in tree.items()
            if key != "side"
        }

    return walk(params, ()), sides


def merge_lora(lora: Lora, params: Params, adapter: Params) -> Params:
    """W + s·B·A in float32, each matrix cast back once; the others are the same arrays."""
    merged = copy_dicts(params)
    for path, a, b in pairs(adapter):
        node = at(merged, path)
        weight = node["weight"]
        with jax.default_matmul_precision("highest"):
            change = lora.scale * jnp.matmul(b.astype(jnp.float32), a.astype(jnp.float32))
        node["weight"] = (weight.astype(jnp.float32) + change).astype(weight.dtype)
    return merged


# --- trees ---


def modules(params: Params, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Module path → its matrix. Norms are vectors, of stacked layers too: they are passed over by name."""
    weight = params.get("weight")
    if weight is not None and not path[-1].endswith("norm"):
        yield path, weight
    for key, value in params.items():
        if isinstance(value, dict):
            yield from modules(value, (*path, key))


def pairs(adapter: Params, path: Path = ()) -> Iterator[tuple[Path, jax.Array, jax.Array]]:
    """(module path, A, B) of an adapter."""
    if "lora_A" in adapter:
        yield path, adapter["lora_A"]["weight"], adapter["lora_B"]["weight"]
        return
    for key, value in adapter.items():
        yield from pairs(value, (*path, key))


def copy_dicts(tree: Params) -> Params:
    return {key: copy_dicts(value) if isinstance(value, dict) else value for key, value in tree.items()}


def at(tree: Params, path: Path) -> Params:
    for i, key in enumerate(path):
        if key not in tree:
            raise UserError(f"the adapter has {'/'.join(path)}, the model nothing at {'/'.join(path[: i + 1])}")
        tree = tree[key]
    return tree


def set_at(tree: Params, path: Path, value: Any) -> None:
    *branches, last = path
    for key in branches:
        tree = tree.setdefault(key, {})
    tree[last] = value
