"""The merge at the end of a round, whatever its rule: what IMM's (anchor, tuned, α) means to each rule of the library.

- `imm`: (1 − α) anchor + α tuned, with DARE and a reference of its own
- `slerp`: from the anchor to the tuned model, α of the way along the arc
- rules of task vectors (ties, dare, …): anchor + α × what the rule makes of tuned − anchor
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import jaxmerge

from ..models.decoder import Params
from ..models.experts import stacks_of
from .settings import Merge


def merged(
    anchor: Params,
    tuned: Params,
    config: Merge,
    alpha: Any,
    *,
    reference: Params | None = None,
    key: jax.Array | None = None,
) -> Params:
    """The weights a round ends with; unselected parameters stay tuned.

    Args:
      alpha: of the tuned model; a number, or what `jaxmerge.alpha_schedule` hands on.
      reference: where imm measures deltas from; None is the anchor.

    Raises:
      ValueError: the rule does not take what `config.parameters` gives.
    """
    rule = jaxmerge.RULES[config.rule]
    models, base, given = [tuned], anchor, {"key": key, "stacked": stacks_of(anchor), **config.parameters}
    if config.rule == "imm":
        given |= {"alpha": alpha, "drop": config.drop, "reference": reference}
    elif config.rule == "slerp":
        models, base = [tuned, anchor], None  # the first is what unselected parameters keep
        given["t"] = complement(alpha)
    else:
        given |= {"weights": [alpha], "normalize": False}
    if config.where:
        rule = jaxmerge.masked(rule, config.where, otherwise="first")
    try:
        return rule(models, base=base, **given)
    except TypeError as error:
        raise ValueError(
            f"merge.parameters={dict(config.parameters)}: {config.rule} does not take them ({error})"
        ) from error


def candidates(config: Merge, number: int, rounds: int) -> list[Any]:
    """The values of α that round `number` may use: one, or the candidates of a search."""
    if isinstance(config.alpha, dict) and "search" in config.alpha:
        return list(config.alpha["search"])
    return [jaxmerge.alpha_schedule(number, rounds, config.alpha)]


def complement(alpha: Any) -> Any:
    """1 − α, of a number, a gradient over depth, or a map of either by path."""
    if isinstance(alpha, Mapping):
        return {pattern: complement(a) for pattern, a in alpha.items()}
    return [1.0 - a for a in alpha] if isinstance(alpha, list | tuple) else 1.0 - alpha


def key_of(key: jax.Array, round: int) -> jax.Array:
    """The key of the random masks of a round's merge, from that of the run."""
    return jax.random.fold_in(jax.random.fold_in(key, round), np.uint32(0xDA2E))


def running_average(models: Sequence[Params]) -> Params:
    """The mean of the original model and of what every earlier round ended with."""
    return models[0] if len(models) == 1 else jaxmerge.average(models)


def layer_alphas(importance: Sequence[float], change: Sequence[float], span: Sequence[float]) -> list[float]:
    r"""α of each layer: the first of `span` where merging must protect most, the last where it need not.

    A layer's score is $I_l C_l$, what moving all its weights by the relative change C_l costs to first order:
    $\sum_w |w\, \partial L/\partial w| \cdot \lVert\Delta\rVert / \lVert\theta\rVert$. α falls with its rank.

    Args:
      importance: I_l [L], Taylor's, of the anchor on held-out reasoning text. change: C_l [L] of the tuned model.

    Example:
      >>> layer_alphas([9.0, 1.0, 2.0], [1.0, 1.0, 1.0], [0.2, 0.8])
      [0.2, 0.8, 0.5]
    """
    low, high = span
    scores = [i * c for i, c in zip(importance, change, strict=True)]
    order = sorted(range(len(scores)), key=lambda l: (scores[l], l))
    rank = {layer: r for r, layer in enumerate(order)}
    steps = max(1, len(scores) - 1)
    return [round(high + (low - high) * rank[layer] / steps, 9) for layer in range(len(scores))]


def by_layer(alphas: Sequence[float]) -> dict[str, float]:
    """Coefficients by path, α_l for layer l and their mean for what is of no layer.

    Of several patterns that match a path the first wins, so the one that matches all comes last.

    Example:
      >>> by_layer([0.2, 0.6])
      {'model/layers/0': 0.2, 'model/layers/1': 0.6, '**': 0.4}
    """
    return {f"model/layers/{i}": a for i, a in enumerate(alphas)} | {"**": sum(alphas) / len(alphas)}


def importance_span(alpha: Any) -> Sequence[float] | None:
    """The two ends of `alpha: {importance: [α where it matters most, α where least]}`, else None."""
    return alpha["importance"] if isinstance(alpha, Mapping) and "importance" in alpha else None
