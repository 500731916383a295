r"""How much each layer matters for a text: by leaving it out, and by the first order of its weights.

The paper of IMM (Yuan et al., https://arxiv.org/abs/2503.02103) says that self-training changes most where it matters
least, and its score of importance cannot be read off the public material; these are the two usual ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

import jaxmerge
from jaxmerge.tree import named_leaves

from ..log import UserError
from ..models.config import ModelConfig
from ..models.decoder import Params
from ..models.loss import Compute, loss_sums
from ..models.stacked import unstack_layers, with_layers
from .texts import Batch, Loss, mean_gradient, mean_loss


@functools.lru_cache(maxsize=64)
def loss_of(config: ModelConfig, dtype: str = "float32") -> Loss:
    """The summed loss of a decoder, compiled once a config and shape of batch."""
    how = Compute(dtype=dtype)
    return jax.jit(lambda params, batch: loss_sums(config, params, batch, how))


def without_layer(config: ModelConfig, params: Params, layer: int) -> tuple[ModelConfig, Params]:
    """Replace one block by the identity: the residual stream passes it unchanged.

    The model that is left has L − 1 layers; each keeps its own kind (window, rotation), whatever its new number.
    """
    count = config.num_hidden_layers
    if count < 2:
        raise UserError(f"leaving out layers needs two or more, and the model has {count}")
    keep = [i for i in range(count) if i != layer]

    def kinds(listed: tuple) -> tuple:
        return tuple(listed[i] for i in keep) if listed else ()

    shorter = dataclasses.replace(
        config,
        num_hidden_layers=count - 1,
        layer_types=kinds(config.layer_types),
        rope_layers=kinds(config.rope_layers),
    )
    layers = unstack_layers(params)["model"]["layers"]
    return shorter, with_layers(params, {str(new): layers[str(old)] for new, old in enumerate(keep)})


def skip_importance(
    config: ModelConfig,
    params: Params,
    given: Sequence[Batch],
    *,
    dtype: str = "float32",
    on_layer: Callable[[], None] = lambda: None,
) -> tuple[list[float], float]:
    r"""Measure importance by ablation, $I_l = \mathrm{NLL}(\theta \text{ without } l) - \mathrm{NLL}(\theta)$.

    Args:
      given: batches of held-out text.
      dtype: of the operands.
      on_layer: called as each layer is done.

    Returns:
      (I [L] in nats a token, NLL of the whole model). Negative where the text is likelier without the layer.
    """
    whole = mean_loss(loss_of(config, dtype), params, given)
    rises = []
    for layer in range(config.num_hidden_layers):
        shorter, rest = without_layer(config, params, layer)
        rises.append(mean_loss(loss_of(shorter, dtype), rest, given) - whole)
        on_layer()
    return rises, whole


def taylor_importance(loss: Loss, params: Params, given: Sequence[Batch]) -> dict[str, float]:
    r"""Measure importance to first order, $I_g = \sum_{w \in g} |w \cdot \partial L/\partial w|$.

    Each term is the first-order change of the loss L if w were set to 0.

    Returns:
      By layer group (`model/layers/3`, `model/embed_tokens`), nats a token.

    References:
      Molchanov et al., "Importance Estimation for Neural Network Pruning", https://arxiv.org/abs/1906.10771, taken
      without its square.
    """
    params = unstack_layers(params)
    gradient = mean_gradient(loss, params, given)
    return taylor_sums(params, gradient)


def taylor_sums(params: Params, gradient: Params) -> dict[str, float]:
    """Sum |w·g| over the leaves of each layer group."""
    products = jax.device_get(jax.tree.map(lambda w, g: jnp.sum(jnp.abs(w * g), dtype=jnp.float32), params, gradient))
    sums: dict[str, float] = {}
    for path, value in named_leaves(products).items():
        group = jaxmerge.layer_group(path)
        sums[group] = sums.get(group, 0.0) + float(value)
    return sums


def of_layers(groups: dict[str, float], count: int) -> list[float]:
    """Pick the numbered layers out of values by layer group, in order.

    Example:
      >>> of_layers({"model/layers/1": 2.0, "model/norm": 9.0, "model/layers/0": 1.0}, 2)
      [1.0, 2.0]
    """
    return [groups[f"model/layers/{i}"] for i in range(count)]
