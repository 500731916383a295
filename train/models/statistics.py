r"""Gram matrices of what enters a model's linear layers, $\sum_t x_t x_t^\top$, and its diagonal Fisher information.

Both are sums over sequences, which come in batches: a caller adds batch after batch and divides in the end.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..runtime.mesh import activations_on, mesh_of
from .attention import visible
from .config import ModelConfig
from .decoder import Linear, Params, bind, count_up
from .loss import Compute, loss_sums

Grams = dict[tuple[int, str], jax.Array]
"""By layer and by the names of the linear layers that read the same input, with spaces between them; layer −1 is the
head."""
HEAD = -1


class Tap:
    """Stands where a LoRA path would, adds nothing to a linear layer, and keeps what enters it."""

    def __init__(self, seen: dict[int, tuple[jax.Array, list[str]]], name: str):
        self.seen, self.name = seen, name

    def __call__(self, x: jax.Array, dtype) -> float:
        del dtype
        self.seen.setdefault(id(x), (x, []))[1].append(self.name)
        return 0.0


def add_grams(config: ModelConfig, params: Params, tokens, lengths, sums: Grams, *, dtype: str = "float32") -> Grams:
    """Add the Gram matrices [in, in] of a batch, float32, to `sums`, whose arrays are gone after the call.

    Args:
      params: unrolled; one block is compiled, whatever L.
      tokens: [B, T], right-padded. lengths: [B], the tokens of each row that count.
    """
    mesh = mesh_of(params)
    x, weights, views = _enter(config, params, tokens, lengths, mesh)
    layers = bind(config, params).model.layers
    for i, kind in enumerate(config.layers):
        graph, leaves = nnx.split(layers[str(i)])
        before = {names: sums.pop((layer, names)) for layer, names in list(sums) if layer == i}
        found, x = _step(graph, leaves, x, weights, *views[config.layers.index(kind)], before, jnp.dtype(dtype), mesh)
        sums |= {(i, names): gram for names, gram in found.items()}
    if not config.tie_word_embeddings:
        sums[HEAD, "lm_head"] = _last(config, params, x, weights, sums.pop((HEAD, "lm_head"), None), mesh)
    return sums


def by_weight(sums: Mapping[tuple[int, str], Any]) -> dict[str, Any]:
    """Return sums of `add_grams` by the names of the weights; weights that read the same input share an array.

    Example:
      >>> by_weight({(0, "mlp.gate_proj mlp.up_proj"): 1.0, (HEAD, "lm_head"): 2.0})
      {'model.layers.0.mlp.gate_proj.weight': 1.0, 'model.layers.0.mlp.up_proj.weight': 1.0, 'lm_head.weight': 2.0}
    """
    return {
        f"{name}.weight" if layer == HEAD else f"model.layers.{layer}.{name}.weight": gram
        for (layer, names), gram in sums.items()
        for name in names.split()
    }


@functools.partial(jax.jit, static_argnums=(0, 4))
def _enter(config, params: Params, tokens, lengths, mesh):
    """What enters the first layer, the weight of each token [B, T], and the rotations and mask of each layer's kind."""
    with activations_on(mesh):
        decoder = bind(config, params)
        positions = count_up(tokens.shape, lengths)
        weights = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.float32)
        views = decoder.views(positions, visible(positions))
        where = {config.layers.index(kind): view for kind, view in views.items()}  # a kind is no key of a pytree
        return decoder.embed(tokens), weights, where


@functools.partial(jax.jit, static_argnums=(0, 7, 8), donate_argnums=6)
def _step(graph, leaves, x, weights, rope, mask, before: dict[str, jax.Array], dtype, mesh):
    """The sums of a block with this batch added, and what leaves the block."""
    with activations_on(mesh):
        block = nnx.merge(graph, leaves)
        seen: dict[int, tuple[jax.Array, list[str]]] = {}
        for path, module in nnx.iter_modules(block):
            if isinstance(module, Linear):
                module.side = Tap(seen, ".".join(map(str, path)))
        out, *_ = block(x, rope, mask, None, None, dtype)
        return {" ".join(names): _gram(x, weights, before.get(" ".join(names))) for x, names in seen.values()}, out


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=4)
def _last(config, params: Params, x, weights, before, mesh) -> jax.Array:
    """The sum of what enters the head."""
    with activations_on(mesh):
        return _gram(bind(config, params).model.norm(x), weights, before)


def _gram(x: jax.Array, weights: jax.Array, before: jax.Array | None) -> jax.Array:
    """x [B, T, in], weights [B, T] → [in, in]."""
    flat = (x * weights[..., None]).reshape(-1, x.shape[-1])
    gram = jnp.matmul(flat.T, flat, precision=jax.lax.Precision.HIGHEST)
    return gram if before is None else before + gram


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=3)
def add_fisher(config: ModelConfig, params: Params, batch: dict[str, jax.Array], sums: Params, how: Compute) -> Params:
    r"""Add $(\nabla_\theta \sum_t w_t \log p_\theta(y_t \mid y_{<t}))^2$ of one sequence, element by element.

    Args:
      batch: tokens and weights [1, T], as for `loss_sums`.
      sums: like the parameters, float32; gone after the call.

    References:
      Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", https://arxiv.org/abs/2111.09832. There the
      answers are drawn from the model; with those of the data it is the *empirical* Fisher information.
    """
    gradient = jax.grad(lambda p: loss_sums(config, p, batch, how)[0])(params)
    return jax.tree.map(lambda total, g: total + jnp.square(g.astype(jnp.float32)), sums, gradient)
