r"""Skill localisation: learn which few changed parameters carry what fine-tuning taught, and graft these alone.

start = graft_mask(tuned, base, density=0.01)
found = learn_mask(tuned, base, loss, batches, density=0.01, optimizer=optax.adam(0.3))
grafted = grafting([tuned], base=base, mask=found.mask)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge.statistics import graft_mask, grafting
from jaxmerge.tree import PyTree
from jaxmerge.where import Coefficient

Loss = Callable[[PyTree, Any], Any]


class Graft(NamedTuple):
    """A learned mask, and what it and the start are worth.

    Attributes:
      mask: 0 base or 1 tuned, a pytree like the models, in their dtypes.
      loss: mean over the batches of the loss of the model that the mask grafts.
      share: of all parameters, those that the mask takes from the tuned model.
      start_loss, start_share: the same of the largest changes, which the search began with.
    """

    mask: PyTree
    loss: float
    share: float
    start_loss: float
    start_share: float


def learn_mask(
    tuned: PyTree,
    base: PyTree,
    loss: Loss,
    batches: Sequence[Any],
    *,
    density: Coefficient,
    optimizer: Any,
    passes: int = 20,
    bias: float = 3.0,
    penalty: float = 0.0,
    stacked: Sequence[str] = (),
) -> Graft:
    r"""Learn the mask γ of a graft: $\min_S L(\theta_b + \sigma(S) \odot \tau)$ by gradient, then round.

    S begins at +b where γ₀ is 1 and at −b elsewhere, γ₀ being the mask of the largest changes (`graft_mask`). This is
    the paper's $\gamma_0 + (1 - 2\gamma_0)\,\sigma(S' - b)$: S is S' − b, with its sign turned where γ₀ is 1. After
    each pass over the batches the rounded mask [S > 0] is measured, and the best of these and of γ₀ is returned: the
    result is never worse than the start on these batches. The paper takes a few steps of SGD and keeps the mask sparse
    by that alone; `penalty` is not the paper's.

    Args:
      tuned, base: models of one structure, in floating dtypes.
      loss: (params, batch) → scalar, differentiable.
      batches: each is handed to `loss`; a step is taken on each of them in turn. Batches of one shape compile once.
      density: share of each leaf that γ₀ takes.
      optimizer: of S, with `init` and `update` as optax has them.
      passes: over the batches.
      bias: b; the larger, the slower a parameter changes sides.
      penalty: λ of $L + \lambda\,\mathrm{mean}(\gamma)$: parameters that do not matter leave the mask.
      stacked: containers whose leaves have a leading layer axis.

    Example:
      >>> import optax
      >>> base, tuned = {"w": jnp.zeros(3)}, {"w": jnp.array([3.0, 1.0, 2.0])}
      >>> found = learn_mask(  # only the second change is wanted, and it is the smallest
      ...     tuned, base, lambda p, y: jnp.sum((p["w"] - y) ** 2), [jnp.array([0.0, 1.0, 0.0])],
      ...     density=0.34, optimizer=optax.adam(0.5))
      >>> found.mask["w"].tolist(), found.start_loss, found.loss
      ([0.0, 1.0, 0.0], 10.0, 0.0)

    References:
      Panigrahi et al., "Task-Specific Skill Localization in Fine-tuned Language Models",
      https://arxiv.org/abs/2302.06600; the form of γ is that of its authors' code.
    """
    if not batches or passes < 1:
        raise ValueError(f"learn_mask: {len(batches)} batches and passes={passes}; wanted one of each or more")
    start = graft_mask(tuned, base, density=density, stacked=stacked)
    scores = jax.tree.map(lambda mask: bias * (2.0 * mask.astype(jnp.float32) - 1.0), start)

    def worth(mask, tuned, base, batch):
        found = loss(grafting([tuned], base=base, stacked=stacked, mask=mask), batch)
        return found + penalty * _share(mask), found

    @jax.jit
    def step(scores, state, tuned, base, batch):
        def relaxed(scores):
            return worth(jax.tree.map(jax.nn.sigmoid, scores), tuned, base, batch)[0]

        gradient = jax.grad(relaxed)(scores)
        with jax.numpy_dtype_promotion("standard"):  # of others' code
            updates, state = optimizer.update(gradient, state, scores)
        return jax.tree.map(jnp.add, scores, updates), state

    measure, rounded = jax.jit(worth), jax.jit(lambda scores: jax.tree.map(_round, scores, start))

    def judge(mask):
        found = [measure(mask, tuned, base, batch) for batch in batches]
        return tuple(sum(float(pair[i]) for pair in found) / len(found) for i in (0, 1))

    best, first = start, judge(start)
    least, state = first, optimizer.init(scores)
    for _ in range(passes):
        for batch in batches:
            scores, state = step(scores, state, tuned, base, batch)
        mask = rounded(scores)
        if (found := judge(mask))[0] < least[0]:
            best, least = mask, found
    return Graft(best, least[1], float(_share(best)), first[1], float(_share(start)))


def _round(score: jax.Array, like: jax.Array) -> jax.Array:
    return (score > 0).astype(like.dtype)


def _share(mask: PyTree) -> jax.Array:
    leaves = jax.tree.leaves(mask)
    ones = jnp.stack([jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves])
    return jnp.sum(ones) / sum(leaf.size for leaf in leaves)
