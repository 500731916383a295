r"""Iterative model merging (IMM): the merge that ends a round, its schedules, and where its anchor lives.

Yuan et al., "Superficial Self-Improved Reasoners Benefit from Model Merging", https://arxiv.org/abs/2503.02103
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.arithmetic import _interpolate
from jaxmerge.contract import requires
from jaxmerge.leaves import Operands, leafwise
from jaxmerge.sparsify import bernoulli, expected
from jaxmerge.tree import Array, PyTree, align, is_array, is_concrete
from jaxmerge.where import Coefficient


def _linear(x: Operands, *, alpha: Array) -> Array:
    assert x.base is not None
    return _interpolate(Operands((x.base, *x.models)), t=alpha)


def _dropped(x: Operands, *, alpha: Array, drop: Array) -> Array:
    # The anchor is the base, and without a reference it is that: its own delta is zero then.
    assert x.base is not None
    assert x.keys is not None
    start, *anchor = (*x.extra, x.base)
    shares = (alpha, 1 - alpha)
    total = jnp.zeros_like(start)
    for i, model in enumerate((*x.models, *anchor)):
        total = total + shares[i] * expected(bernoulli(model - start, x.keys[i], 1 - drop), 1 - drop)
    return start + total


@requires(most=1, base="required", key="optional")
def imm(
    models: Sequence[PyTree],
    *,
    base: PyTree | None = None,
    key: Array | None = None,
    names: Sequence[str] | None = None,
    stacked: Sequence[str] = (),
    donate: bool = False,
    alpha: Coefficient = 0.5,
    drop: Coefficient = 0.0,
    reference: PyTree | None = None,
) -> PyTree:
    r"""Merge a round's tuned model with its anchor: $(1-\alpha)\,\theta_0 + \alpha\,\theta_t$.

    With drop p > 0 each element of the deltas from the reference r is dropped with probability p and the
    rest divided by 1 − p (DARE): $r + (1-\alpha)\,D(\theta_0 - r) + \alpha\,D(\theta_t - r)$. The
    expectation is the formula above. In the authors' instructions p = 0.2 and α = 1/2.

    Args:
      models: [tuned], the model after this round's fine-tuning.
      base: the anchor θ_0: the original model (the paper's), or the previous round's; may be offloaded.
      key: PRNG key, needed for drop > 0.
      names: [name of tuned] for its random mask; the anchor's is drawn under the name "anchor".
      stacked: containers whose leaves have a leading layer axis.
      alpha: share of tuned. A number, a list over depth (layer-adaptive), or a dict pattern → value;
        `alpha_schedule` gives a round's value.
      drop: p. Concrete 0 takes no key and draws nothing.
      reference: what the deltas are taken from; by default the anchor, whose own delta is then zero. Another
        choice is the pretrained base: both deltas are dropped then.

    Returns:
      Parameters with the structure, shapes, dtypes and shardings of tuned.

    Example:
      >>> imm([{"w": jnp.array([2.0])}], base={"w": jnp.array([1.0])}, alpha=0.5)
      {'w': Array([1.5], dtype=float32)}

    References:
      Yuan et al., "Superficial Self-Improved Reasoners Benefit from Model Merging", https://arxiv.org/abs/2503.02103
    """
    share: Any = drop  # a number may be looked at, a list or a dict is left to `leafwise`
    is_number = isinstance(share, int | float) or (is_array(share) and share.shape == ())
    if is_number and is_concrete(share):
        if not 0 <= float(share) < 1:
            raise ValueError(f"imm: drop={float(share)}, wanted a probability in [0, 1)")
        if float(share) == 0:
            return leafwise(_linear, models, base=base, stacked=stacked, shared={"alpha": alpha})
    if key is None:
        raise ValueError(f"imm: drop={drop} draws random masks; pass key=jax.random.key(seed), or drop=0.0")
    if reference is not None:
        align([*models, reference], labels=["models[0]", "reference"])  # so that errors call it that
    name = "tuned" if names is None else names[0]
    return leafwise(
        _dropped,
        models,
        base=base,
        key=key,
        names=[name] if reference is None else [name, "anchor"],
        stacked=stacked,
        shared={"alpha": alpha, "drop": drop},
        extra=[] if reference is None else [reference],
    )


def alpha_schedule(round: int, rounds: int, spec: Any) -> Any:
    """Return alpha for round `round` of `rounds` (counted from 1).

    Args:
      round: 1 … rounds.
      rounds: number of rounds.
      spec: a number: the same every round; a list: one entry a round, each anything `imm` takes; a mapping
        with "schedule": "linear" or "cosine", "start" and "end": from start in the first round to end in the
        last; any other mapping: path patterns, handed on as it is (`{"**": [0.3, 0.7]}` is layer-adaptive).

    Example:
      >>> [alpha_schedule(r, 3, {"schedule": "linear", "start": 0.2, "end": 0.8}) for r in (1, 2, 3)]
      [0.2, 0.5, 0.8]
    """
    if not 1 <= round <= rounds:
        raise ValueError(f"alpha_schedule: round {round} is not in 1…{rounds}; rounds count from 1")
    if isinstance(spec, int | float):
        return float(spec)
    if isinstance(spec, Mapping):
        return _scheduled((round - 1) / max(rounds - 1, 1), spec) if "schedule" in spec else spec
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        if len(spec) != rounds:
            raise ValueError(f"alpha has {len(spec)} entries for {rounds} rounds; give one a round, or a number")
        return spec[round - 1]
    raise ValueError(
        f"alpha={spec!r}; wanted a number, a list with one entry a round, "
        '{"schedule": "linear" | "cosine", "start": a, "end": b}, or a dict of path patterns'
    )


def _scheduled(part: float, spec: Mapping[str, Any]) -> float:
    wanted = {"schedule", "start", "end"}
    if set(spec) != wanted:
        raise ValueError(f"alpha schedule has the keys {sorted(spec)}, wanted exactly {sorted(wanted)}")
    start, end = float(spec["start"]), float(spec["end"])
    if spec["schedule"] == "linear":
        return start + part * (end - start)
    if spec["schedule"] == "cosine":
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * part))
    raise ValueError(f"alpha schedule {spec['schedule']!r} is unknown; wanted 'linear' or 'cosine'")


def offload(tree: PyTree) -> PyTree:
    """Move arrays to pinned host memory, keeping their shardings; on CPU, where there is one memory, a no-op.

    What it saves: a float32 anchor of P parameters costs 4P bytes of device memory spread over the mesh. SFT
    with AdamW holds weights, gradients and two moments, 16P bytes: with the anchor 20P, without 16P, a fifth
    less. (8 B parameters on 16 chips: 2 of 10 GB a chip.) Every rule brings an offloaded leaf back one leaf
    at a time, so a merge needs the largest leaf on top, and 4P bytes over the host link: 32 GB over 16 links
    of 16 GB/s take an eighth of a second a round.
    """
    return _to_memory(tree, host=True)


def onload(tree: PyTree) -> PyTree:
    """Move arrays back from pinned host memory to their devices; a no-op where they are there."""
    return _to_memory(tree, host=False)


def _to_memory(tree: PyTree, host: bool) -> PyTree:
    def move(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        device = next(iter(leaf.sharding.device_set))
        kind = "pinned_host" if host else device.default_memory().kind
        known = {memory.kind for memory in device.addressable_memories()}
        if device.platform == "cpu" or kind not in known or leaf.sharding.memory_kind == kind:
            return leaf
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))

    return jax.tree.map(move, tree)
