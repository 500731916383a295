"""Token-weighted cross-entropy, reported as a numerator and a denominator so that means are of tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..runtime.mesh import BATCH, ROWS, activations_on, row_ways, spread
from .attention import visible
from .balance import Routing, balance_sums, tokens_read
from .branches import BRANCHED, grouped, positions_of, there
from .config import ModelConfig
from .decoder import Params, bind, logprobs, shapes
from .divergence import Divergence, forward_kl, kl_sum
from .fused import Causal


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the loss is computed; what it is does not depend on it, rounding apart.

    Attributes:
      dtype: of the operands; sums are float32.
      remat: as for `Decoder`.
      logits_at_once: tokens whose logits are held at a time, see `nll_sum`.
      attention: "xla", or a kernel of models/fused.py.
      mesh: where it runs on several devices.
    """

    dtype: str = "float32"
    remat: str = "none"
    logits_at_once: int = 1024
    attention: str = "xla"
    mesh: jax.sharding.Mesh | None = None


def loss_sums(
    config: ModelConfig, params: Params, batch: dict[str, jax.Array], how: Compute = Compute(), **beside: Any
) -> tuple[jax.Array, jax.Array]:
    """Σ w·(−log p) and Σ w over a batch: their ratio is the mean loss a token; arguments as for `loss_and_metrics`."""
    return loss_and_metrics(config, params, batch, how, **beside)[:2]


def loss_and_metrics(
    config: ModelConfig,
    params: Params,
    batch: dict[str, jax.Array],
    how: Compute = Compute(),
    *,
    near: tuple[Params, Any] | None = None,
    divergence: Divergence = forward_kl,
    teacher: Teacher | None = None,
    balanced: float | None = None,
):
    r"""Σ w·(−log p) and Σ w over a batch, and sums of metrics.

    Args:
      batch: `tokens` [B, T] int32; `weights` [B, T] float32, the loss weight of each token as a target; optionally
        `targets` [B, K] int32, the positions whose weight is not 0, filled up with 0; optionally `segments` [B, T]
        int32, equal and contiguous for the tokens of one sequence of a packed row; optionally `inputs` [B, T] int32,
        which the model reads in place of the tokens, whose labels stay. Rows that branch: see branches.py.
      near: (θ_0, β): Σ w·β·D(p_θ, p_0) is added to the losses.
      divergence: D, of models/divergence.py.
      teacher: takes its share of the place of −log p.
      balanced: see `balance_sums`.

    Returns:
      (sum of weighted losses, sum of weights, sums of metrics): what is divided by the sum of weights is the mean.
    """
    *ours, routing = routed_at_targets(config, params, batch, how)
    hidden, labels, weights = ours
    head = Head(config, jnp.dtype(how.dtype), how.mesh)
    if teacher is None or teacher.share < 1:
        loss = nll_sum(head, how.logits_at_once, head.weight(params), hidden, labels, weights)
    else:
        loss = jnp.float32(0)
    if teacher is not None:
        taught = apart_sum(head, how, params, ours, seen_by_teacher(batch), teacher)
        loss = (1 - teacher.share) * loss + teacher.share * taught
    if near is not None:
        loss += _pull(head, how, params, ours, batch, near, divergence)
    more, metrics = balance_sums(config.experts, routing, jnp.sum(weights), balanced)
    return loss + more, jnp.sum(weights), metrics


def objective_sums(
    config: ModelConfig,
    params: Params,
    batch: dict[str, jax.Array],
    how: Compute,
    objective: Objective,
    *,
    near: tuple[Params, Any] | None = None,
    divergence: Divergence = forward_kl,
    teacher: Teacher | None = None,
    balanced: float | None = None,
):
    r"""An objective that is any function L of the tokens' log-probabilities, and its gradient.

    The logits are never all in memory. The log-probabilities ℓ are computed first, a chunk of logits at a time; the
    objective gives $c_i = \partial L / \partial \ell_i$; then $\sum_i c_i \nabla \ell_i$ is the gradient of a weighted
    sum of losses, which `nll_sum` takes as it takes that of fine-tuning. The projection to logits is computed twice.

    Args:
      batch: as for `loss_sums`. With groups of G sequences that belong together, what the model reads is [B, G, T].
        All else is handed to the objective: arrays of the shape of `tokens` where the targets are, others as they are.
      objective: see `Objective`.
      near, divergence, teacher: as for `loss_sums`, by their means over the tokens and that of the objective.
      balanced: see `balance_sums`.

    Returns:
      (sum of losses, sum of weights, sums of metrics): what is divided by the sum of weights is the mean.
    """
    rows = as_rows(batch)
    *ours, routing = routed_at_targets(config, params, rows, how)
    hidden, labels, weights = ours
    head = Head(config, jnp.dtype(how.dtype), how.mesh)
    each = token_losses(head, how, params, hidden, labels)
    beside = {name: values for name, values in batch.items() if name not in READ and name not in SHOWN}
    if "cells" not in batch:
        beside = {
            name: grouped(batch, there(rows, values.reshape(-1, values.shape[-1])))
            if values.shape == batch["tokens"].shape
            else values
            for name, values in beside.items()
        }

    def of(each):
        loss, weight, metrics = objective(-grouped(batch, each), grouped(batch, weights), beside)
        return loss, (weight, metrics)

    (loss, (weight, metrics)), slopes = jax.value_and_grad(of, has_aux=True)(each)
    moved = nll_sum(head, how.logits_at_once, head.weight(params), hidden, labels, jax.lax.stop_gradient(slopes))
    loss += moved - jax.lax.stop_gradient(moved)
    mean = weight / jnp.maximum(jnp.sum(weights), 1e-6)
    if teacher is not None:
        shown = {name: x.reshape(-1, x.shape[-1]) for name, x in seen_by_teacher(batch).items()}
        taught = apart_sum(head, how, params, ours, shown, teacher)
        loss = (1 - teacher.share) * loss + teacher.share * mean * taught
    if near is not None:
        loss += mean * _pull(head, how, params, ours, rows, near, divergence)
    more, of_router = balance_sums(config.experts, routing, weight, balanced)
    return loss + more, weight, {**metrics, **of_router}


READ = ("tokens", "weights", "targets", "segments", "inputs", *BRANCHED)
"""What a model reads of a batch."""
SHOWN = {"teacher_tokens": "tokens", "teacher_weights": "weights", "teacher_targets": "targets"}
"""What a teacher reads of a batch, where that is another prompt before the same completion; K is the student's."""


class Teacher(NamedTuple):
    """A model whose distributions q are learnt: $\\sum_i w_i\\,D(p_i, q_i)$ takes this share of the loss's place."""

    config: ModelConfig
    params: Params
    how: Compute
    divergence: Divergence
    share: float = 1.0


def seen_by_teacher(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A batch as the teacher reads it: with its own prompts where it has some, and no token hidden from it."""
    if "teacher_tokens" in batch:
        return {ours: batch[name] for name, ours in SHOWN.items()}
    return {name: batch[name] for name in READ if name in batch and name != "inputs"}


class Objective(Protocol):
    """A loss of a batch as a function of the log-probabilities of its tokens."""

    def __call__(
        self, logps: jax.Array, weights: jax.Array, beside: dict[str, jax.Array], /
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """(Sum of losses, sum of what they are divided by, sums of metrics divided by the same).

        Args:
          logps: of the targets, [B, K] or with groups [B, G, K], float32.
          weights: of the same shape; 0 where there is no target, everywhere in a row that only fills up the batch.
          beside: what else the batch holds.
        """
        ...


def token_losses(head: Head, how: Compute, params: Params, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    """−log p of each label [B, K], without a gradient."""
    ours = jax.lax.stop_gradient((head.weight(params), hidden))
    return _over_chunks(head, how.logits_at_once, *ours, labels, jnp.ones(labels.shape, jnp.float32), gradient=False)[1]


def token_logps(config: ModelConfig, params: Params, batch: dict[str, jax.Array], how: Compute) -> jax.Array:
    """log p of each token of a batch, of the shape of its weights, without a gradient; 0 where there is no weight.

    With them as another array of the batch, an objective has the log-probabilities of a reference or of a sampler.
    """
    rows, shape = as_rows(batch), batch["weights"].shape
    hidden, labels, weights = at_targets(config, params, rows, how)
    logps = -token_losses(Head(config, jnp.dtype(how.dtype), how.mesh), how, params, hidden, labels)
    logps = jnp.where(weights != 0, logps, 0.0)
    if "cells" in rows:
        return grouped(batch, logps)
    if "targets" not in rows:
        return jnp.pad(logps, ((0, 0), (1, 0))).reshape(shape)
    each = jnp.arange(len(logps))[:, None]
    return jnp.zeros((len(logps), shape[-1]), jnp.float32).at[each, rows["targets"]].add(logps).reshape(shape)


def _pull(head: Head, how: Compute, params: Params, ours, batch, near, divergence: Divergence) -> jax.Array:
    """Σ w·β·D(p_θ, p_0); ours: (hidden, labels, weights) at the targets."""
    base, beta = jax.lax.stop_gradient(near)
    return beta * apart_sum(head, how, params, ours, batch, Teacher(head.config, base, how, divergence))


def apart_sum(head: Head, how: Compute, params: Params, ours, batch, other: Teacher) -> jax.Array:
    """Σ w·D of our distributions from another model's that reads `batch`; ours: as for `_pull`."""
    hidden, labels, weights = ours
    base = jax.lax.stop_gradient(other.params)
    theirs, _, _ = at_targets(other.config, base, batch, other.how)
    their_head = Head(other.config, jnp.dtype(other.how.dtype), other.how.mesh)
    pair = (head.weight(params), hidden), (their_head.weight(base), theirs)
    return kl_sum(head, how.logits_at_once, *pair, labels, weights, other.divergence, their_head=their_head)


def at_targets(config: ModelConfig, params: Params, batch: dict[str, jax.Array], how: Compute):
    """(last hidden states [B, K, D], labels [B, K], their weights [B, K]) where something is learnt."""
    return routed_at_targets(config, params, batch, how)[:3]


def routed_at_targets(config: ModelConfig, params: Params, batch: dict[str, jax.Array], how: Compute):
    """`at_targets`, and fourth what the routers of a mixture of experts said; None of a dense model."""
    tokens, weights = batch["tokens"], batch["weights"]
    inputs = batch.get("inputs", tokens)
    targets, segments = batch.get("targets"), batch.get("segments")
    parents, sources = batch.get("parents"), batch.get("sources")
    if sources is None:  # the last token is a label alone
        inputs, segments = inputs[:, :-1], None if segments is None else segments[:, :-1]
        sources = None if targets is None else jnp.maximum(targets - 1, 0)
    positions = unpacked_positions(weights[:, 1:]) if segments is None else positions_of(segments, parents)
    if how.attention == "xla":
        seen = visible(positions, segments, parents)
    else:
        stand = None if parents is None else positions
        seen = Causal(segments, how.attention, mesh=how.mesh, parents=parents, positions=stand)
    dtype = jnp.dtype(how.dtype)
    with activations_on(how.mesh):
        hidden, _, scores = bind(config, params).routed(inputs, positions, seen, dtype=dtype, remat=how.remat)
    read = tokens_read(weights) if segments is None else segments > 0
    if sources is not None:
        hidden = jnp.take_along_axis(hidden, sources[..., None], axis=1)
    weights = there(batch, weights)
    labels = there(batch, batch.get("answers", tokens))
    learnt = weights if targets is None else jnp.where(targets > 0, weights, 0.0)
    return hidden, labels, learnt, None if config.experts is None else Routing(scores, read)


def as_rows(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a model reads of a batch, groups of sequences as rows; rows that branch hold theirs already."""
    read = {name: batch[name] for name in READ if name in batch}
    return read if "cells" in read else {name: x.reshape(-1, x.shape[-1]) for name, x in read.items()}


def unpacked_positions(weights: jax.Array) -> jax.Array:
    """0, 1, 2, … up to the last token whose successor has a weight (weights [B, T] are the successors').

    All later tokens keep its position: nothing is learnt from them, and rope scalings that look at a row's largest
    position must not look there.
    """
    index = jnp.broadcast_to(jnp.arange(weights.shape[1]), weights.shape)
    return jnp.minimum(index, jnp.max(jnp.where(weights != 0, index, 0), axis=1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Head:
    """The projection to logits as a function of its one matrix: what `nll_sum` differentiates."""

    config: ModelConfig
    dtype: jnp.dtype
    mesh: jax.sharding.Mesh | None = None

    @property
    def path(self) -> tuple[str, ...]:
        return ("model", "embed_tokens", "weight") if self.config.tie_word_embeddings else ("lm_head", "weight")

    def weight(self, params: Params) -> jax.Array:
        node: Any = params
        for name in self.path:
            node = node[name]
        return node

    def __call__(self, weight: jax.Array, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] of hidden [..., D]: the decoder's own, caps included, with no other parameter in place."""

        def graft(path, shape):
            return weight if tuple(entry.key for entry in path) == self.path else shape

        params = jax.tree_util.tree_map_with_path(graft, shapes(self.config))
        with activations_on(self.mesh):
            return bind(self.config, params).head(spread(hidden), self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def nll_sum(head: Head, at_once: int, weight: jax.Array, hidden: jax.Array, labels: jax.Array, weights: jax.Array):
    r"""$\sum_i w_i (\mathrm{logsumexp}(z_i) - z_{i, y_i})$, logits $z = h W^\top$ of a chunk at a time.

    The whole logits [B, K, V] are 12 GB in float32 for 16 × 2048 tokens of a 100,000-word vocabulary, and autodiff
    keeps them for the backward pass. The gradient of a sum needs nothing that comes later: each chunk's is taken
    while its logits are there, and the backward pass multiplies by the incoming scalar. Nothing is computed twice.

    Args:
      head: what makes logits of (weight, hidden).
      at_once: tokens a chunk, over all rows; chunks run along the row, so that rows stay where the mesh put them.
      weight [V, D]. hidden [B, K, D]. labels [B, K] int32. weights [B, K] float32.

    References:
      Hsu et al., "Liger Kernel", https://arxiv.org/abs/2410.10989, section 3 (FusedLinearCrossEntropy).
    """
    return _over_chunks(head, at_once, weight, hidden, labels, weights, gradient=False)[0]


def _forward(head, at_once, weight, hidden, labels, weights):
    loss, each, d_weight, d_hidden = _over_chunks(head, at_once, weight, hidden, labels, weights, gradient=True)
    return loss, (each, d_weight, d_hidden)


def _backward(head, at_once, saved, g):
    del head, at_once
    each, d_weight, d_hidden = saved
    return g.astype(d_weight.dtype) * d_weight, g.astype(d_hidden.dtype) * d_hidden, None, g * each


nll_sum.defvjp(_forward, _backward)


def _over_chunks(head, at_once, weight, hidden, labels, weights, *, gradient: bool):
    """(loss, loss of each token [B, K], gradients of the weight and of hidden, or None twice)."""
    mesh = head.mesh
    if mesh is None or len(hidden) % row_ways(mesh):
        return _over_own(head, at_once, weight, hidden, labels, weights, gradient=gradient)

    wide = weight.dtype

    def own_rows(weight, *rows):
        loss, each, d_weight, d_hidden = _over_own(
            dataclasses.replace(head, mesh=None), at_once, weight.astype(wide), *rows, gradient=gradient
        )
        # Here, once: within the loop over chunks the compiler would sum the gradient [V, D] over all devices each time.
        loss, d_weight = jax.lax.psum((loss, d_weight), ROWS)
        return loss, each, d_weight, d_hidden

    whole, rows = PartitionSpec(), BATCH
    return jax.shard_map(
        own_rows,
        mesh=mesh,
        in_specs=(whole, rows, rows, rows),
        out_specs=(whole, rows, whole, rows),
        axis_names=set(ROWS),  # the vocabulary stays spread over `tensor`
        check_vma=False,
    )(weight.astype(head.dtype), hidden, labels, weights)  # gathered in the operands' dtype: half the bytes


def _over_own(head, at_once, weight, hidden, labels, weights, *, gradient: bool):
    """`_over_chunks` of one device's rows."""
    B, K, _ = hidden.shape
    width = max(1, at_once // B)
    count = -(-K // width)
    width = -(-K // count)  # the last chunk is then filled up by less than `count` tokens

    def loss_of(weight, hidden, labels, weights):
        each = -logprobs(head(weight, hidden), labels)
        return jnp.sum(each * weights), each

    def chunk(carry, part):
        loss, d_weight = carry
        if not gradient:
            more, each = loss_of(weight, *part)
            return (loss + more, None), (each, None)
        (more, each), (d_w, d_h) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(weight, *part)
        return (loss + more, d_weight + d_w.astype(jnp.float32)), (each, d_h)

    if count == 1:
        (loss, d_weight), (each, d_hidden) = chunk((jnp.float32(0), jnp.float32(0)), (hidden, labels, weights))
        return loss, each, None if d_weight is None else d_weight.astype(weight.dtype), d_hidden

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, count * width - K), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, count, width, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(B, count * width, *x.shape[3:])[:, :K]

    start = (jnp.float32(0), jnp.zeros(weight.shape, jnp.float32) if gradient else None)
    (loss, d_weight), (each, d_hidden) = jax.lax.scan(chunk, start, tuple(map(split, (hidden, labels, weights))))
    if d_weight is None:
        return loss, join(each), None, None
    return loss, join(each), d_weight.astype(weight.dtype), join(d_hidden)
