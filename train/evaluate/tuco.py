r"""TuCo, the tuning contribution: how much of what a tuned model adds to its stream the original would not have.

At layer l of the tuned model's own stream $x_l$, $\mathrm{PTC}_l = f_l^{pre}(x_l)$ is what the original's
block would add and $\mathrm{FTC}_l = f_l^{ft}(x_l) - f_l^{pre}(x_l)$ is the rest of what the tuned one adds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..generate.score import padded
from ..models.attention import visible, within
from ..models.config import ModelConfig
from ..models.decoder import Params, bind, count_up
from ..models.rope import rope_table
from ..models.stacked import unstack_layers
from .texts import ROWS


def tuco(config: ModelConfig, tuned: Params, base: Params, prompts: Sequence[Sequence[int]], *, dtype="float32"):
    r"""Measure $\|\sum_l FTC_l\| / (\|\sum_l PTC_l\| + \|\sum_l FTC_l\|)$ at the last token of each prompt.

    0 where the two models do the same, 1 where the original would do nothing. Norms are of vectors [D].

    Args:
      prompts: n sequences of tokens.

    Returns:
      (TuCo [n], share by layer [n, L]: the same with the sums up to layer l), float32.

    References:
      Nuti et al., "TuCo: Measuring the Contribution of Fine-Tuning to Individual Responses of LLMs",
      https://arxiv.org/abs/2506.23423. What enters layer 0, the embedding, belongs to neither sum.
    """
    tuned, base = unstack_layers(tuned), unstack_layers(base)
    length = padded(max(map(len, prompts)))
    found = []
    for start in range(0, len(prompts), ROWS):
        part = prompts[start : start + ROWS]
        tokens, lengths = np.zeros((ROWS, length), np.int32), np.ones(ROWS, np.int32)
        for row, prompt in enumerate(part):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        shares = contributions(config, tuned, base, tokens, lengths, dtype=dtype)
        found.append(np.asarray(shares)[: len(part)])
    by_layer = np.concatenate(found)
    return by_layer[:, -1], by_layer


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def contributions(config: ModelConfig, tuned: Params, base: Params, tokens, lengths, *, dtype: str) -> jax.Array:
    """TuCo of the sums up to each layer, [B, L], of right-padded tokens [B, T] with lengths [B]."""
    decoder = bind(config, tuned)
    after, before = decoder.model, bind(config, base).model
    positions = count_up(tokens.shape, lengths)
    mask, last = visible(positions), (jnp.arange(tokens.shape[0]), lengths - 1)
    x = decoder.embed(tokens)
    original = added = jnp.zeros((tokens.shape[0], config.hidden_size), jnp.float32)
    shares = []
    for i, (window, rotation) in enumerate(config.layers):
        view = (rope_table(config, positions, rotation), within(mask, window), None, None, jnp.dtype(dtype))
        pre, *_ = before.layers[str(i)](x, *view)
        ft, *_ = after.layers[str(i)](x, *view)
        original, added = original + (pre - x)[last], added + (ft - pre)[last]
        shares.append(share(original, added))
        x = ft
    return jnp.stack(shares, axis=1)


def share(original: jax.Array, added: jax.Array) -> jax.Array:
    """‖FTC‖ / (‖PTC‖ + ‖FTC‖) of vectors [..., D]; 0 where both are 0.

    Example:
      >>> float(share(jnp.array([3.0, 4.0]), jnp.array([0.0, 5.0])))
      0.5
    """
    ptc, ftc = jnp.linalg.norm(original, axis=-1), jnp.linalg.norm(added, axis=-1)
    return ftc / jnp.where(ptc + ftc > 0, ptc + ftc, 1.0)
