"""Caches of keys and values, a row a sequence: made, filled, lengthened, some of them kept."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..models.attention import KV
from ..models.config import ModelConfig
from ..runtime.mesh import activations_on, spread, spread_sharding
from .together import Together

OnMesh = jax.sharding.Mesh | None
"""The mesh of the parameters; None is one device."""


def empty_caches(c: ModelConfig, slots: int, length: int, dtype: str, mesh: OnMesh = None) -> tuple[KV, ...]:
    """One KV a layer, model after model: slots over the mesh's rows, heads over its tensor axis."""
    if isinstance(c, Together):
        return tuple(itertools.chain(*(empty_caches(part, slots, length, dtype, mesh) for part in c.parts)))
    return _maker(c.num_hidden_layers, (slots, c.num_key_value_heads, length, c.head_dim), dtype, mesh)()


@functools.lru_cache(maxsize=64)
def _maker(layers: int, shape: tuple[int, ...], dtype: str, mesh: OnMesh) -> Callable[[], tuple[KV, ...]]:
    """The program that makes empty caches: kept by size, for a function made anew is compiled anew."""

    def make():
        return tuple(KV(*(jnp.zeros(shape, dtype) for _ in "kv")) for _ in range(layers))

    return jax.jit(make, out_shardings=None if mesh is None else spread_sharding(mesh, shape, tensor=1))


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("caches",))
def fill(caches: tuple[KV, ...], prompts: tuple[KV, ...], slots: jax.Array, rows: jax.Array, *, mesh: OnMesh = None):
    """Copy prefilled row rows[i] into slot slots[i]; a slot out of range is skipped."""

    def copy(cache, prompt):
        return spread(cache.at[slots, :, : prompt.shape[2]].set(prompt[rows], mode="drop"), tensor=1)

    with activations_on(mesh):
        return jax.tree.map(copy, caches, prompts)


@functools.partial(jax.jit, static_argnames=("mesh",))
def kept(caches: tuple[KV, ...], slots: jax.Array, *, mesh: OnMesh = None) -> tuple[KV, ...]:
    """The caches of some slots alone, [n] indices."""
    with activations_on(mesh):
        return jax.tree.map(lambda cache: spread(cache[slots], tensor=1), caches)


@functools.partial(jax.jit, static_argnames=("length", "mesh"))
def grow(caches: tuple[KV, ...], length: int, *, mesh: OnMesh = None):
    """The caches with room for `length` positions; what they hold stays where it is."""

    def longer(cache):
        return spread(jnp.pad(cache, ((0, 0), (0, 0), (0, length - cache.shape[2]), (0, 0))), tensor=1)

    with activations_on(mesh):
        return jax.tree.map(longer, caches)
