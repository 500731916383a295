"""What enters each layer of a model for some prompts: the states that gates of a mixture of experts are made of."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmerge.files.checkpoints.quantised import CONFIG_KEYS
from jaxmerge.files.checkpoints.source import Source, main_dtype, read

from .attention import visible
from .decoder import Params, bind, count_up, runner
from .hf import COMPUTED, place
from .hf_config import config_from_hf

BATCH = 8  # prompts that run together


def read_states(model: Source, prompts: Sequence[Sequence[int]], average: bool) -> np.ndarray:
    """Run an open checkpoint on prompts and return what enters each layer.

    The weights are held whole, in the dtype that most of them are stored in; the arithmetic is float32.

    Args:
      model: of a family that the decoder knows.
      prompts: P prompts as tokens, each at least one.
      average: the mean over a prompt's tokens; else the state of its last token.

    Returns:
      [P, L, D] float32.

    Raises:
      UserError: the decoder does not know the model's family, or its tensors do not fit.
    """
    attributes = {key: value for key, value in model.config.items() if key not in CONFIG_KEYS}
    config = config_from_hf(attributes, source=model.folder / "config.json")
    tensors = {name: tensor for name, tensor in model.tensors.items() if not COMPUTED.fullmatch(name)}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    dtype = main_dtype((tensor.dtype, tensor.size) for tensor in tensors.values())
    params = place(config, found, lambda name: read(tensors[name]), source=model.name, dtype=dtype)
    return states_of(config, params, prompts, average=average)


def states_of(config, params: Params, prompts: Sequence[Sequence[int]], *, average: bool) -> np.ndarray:
    """Return what enters each layer, [P, L, D] float32, of unrolled parameters; `read_states` says the rest."""
    width = max(map(len, prompts))
    parts = []
    for start in range(0, len(prompts), BATCH):
        rows = list(prompts[start : start + BATCH])
        rows += [[0]] * (min(BATCH, len(prompts)) - len(rows))  # all batches have one shape
        tokens = np.asarray([[*row, *[0] * (width - len(row))] for row in rows], np.int32)
        lengths = np.asarray([len(row) for row in rows], np.int32)
        parts.append(_states(config, params, jnp.asarray(tokens), jnp.asarray(lengths), average))
    return np.concatenate(parts)[: len(prompts)]


def _states(config, params: Params, tokens: jax.Array, lengths: jax.Array, average: bool) -> np.ndarray:
    """tokens [B, T], right-padded to T from `lengths` [B] → [B, L, D]; one block is compiled, whatever L."""
    layers = bind(config, params).model.layers
    x, weights, views = _enter(config, params, tokens, lengths, average)
    kept = []
    for i, kind in enumerate(config.layers):
        graph, leaves = nnx.split(layers[str(i)])
        state, x = _step(graph, leaves, x, weights, *views[config.layers.index(kind)])
        kept.append(np.asarray(state))
    return np.stack(kept, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _enter(config, params: Params, tokens: jax.Array, lengths: jax.Array, average: bool):
    """What enters the first layer, the weight of each token [B, T], and the rotations and mask of each layer's kind."""
    decoder = bind(config, params)
    positions = count_up(tokens.shape, lengths)
    index = jnp.arange(tokens.shape[1])
    counted = (index < lengths[:, None] if average else index == lengths[:, None] - 1).astype(jnp.float32)
    views = decoder.views(positions, visible(positions))
    where = {config.layers.index(kind): view for kind, view in views.items()}  # a kind is no key of a pytree
    return decoder.embed(tokens), counted / counted.sum(axis=1, keepdims=True), where


@functools.partial(jax.jit, static_argnums=0)
def _step(graph, leaves, x: jax.Array, weights: jax.Array, rope, mask) -> tuple[jax.Array, jax.Array]:
    """The state [B, D] that enters a block, and what leaves it."""
    state = jnp.einsum("bt,btd->bd", weights, x, precision="highest")
    return state, runner(graph, jnp.float32, "none")(leaves, x, rope, mask, None, None)[0]
