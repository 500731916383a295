"""Supervised fine-tuning: what goes into a batch, the jitted step, and a loop that can stop anywhere.

The order of the examples depends on the seed and the epoch alone, the step on its state and batch alone, so
a run resumed from a checkpoint of (state, step) ends with the same weights, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..config import Sft
from ..log import UserError
from ..mesh import batch_sharding, replicated, shardings
from ..models.config import ModelConfig
from ..models.decoder import Params
from .objective import loss_sums
from .optim import learning_rate, transform


class State(NamedTuple):
    """What a step changes; donated to it."""

    params: Params
    moments: Any


@dataclasses.dataclass(frozen=True)
class Rows:
    """Examples as arrays: tokens [n, T] int32 right-padded, weights [n, T] float32 (0 where not learnt)."""

    tokens: np.ndarray
    weights: np.ndarray
    dropped: int = 0
    """Examples longer than max_length."""

    @property
    def targets(self) -> int:
        """Tokens with a loss."""
        return int((self.weights[:, 1:] > 0).sum())

    @functools.cached_property
    def positions(self) -> np.ndarray | None:
        """Where each row has its targets, [n, K] filled up with 0; None if most positions are targets."""
        has = self.weights[:, 1:] > 0
        most = -(-int(has.sum(axis=1).max()) // 8) * 8
        if most > 0.75 * has.shape[1]:
            return None
        # Targets first, in their order: a stable sort of "is none".
        order = np.argsort(~has, axis=1, kind="stable")[:, :most]
        return np.where(np.take_along_axis(has, order, axis=1), order + 1, 0).astype(np.int32)


def to_rows(examples: Sequence[Mapping[str, Any]], config: Sft, pad_id: int = 0) -> Rows:
    """Pad examples {tokens, prompt_length, weight} to one length; too long ones are dropped and counted."""
    kept = [e for e in examples if len(e["tokens"]) <= config.max_length]
    if not kept:
        raise UserError(
            f"sft: none of {len(examples)} examples is at most sft.max_length={config.max_length} tokens long; raise it"
            if examples
            else "sft: there is no example to train on"
        )
    longest = max(len(e["tokens"]) for e in kept)
    # T − 1 positions are computed: a multiple of 16 of them.
    length = 1 + -(-(longest - 1) // 16) * 16
    tokens = np.full((len(kept), length), pad_id, np.int32)
    weights = np.zeros((len(kept), length), np.float32)
    for row, e in enumerate(kept):
        n = len(e["tokens"])
        tokens[row, :n] = e["tokens"]
        weights[row, 0 if config.loss == "all" else e["prompt_length"] : n] = e.get("weight", 1.0)
    return Rows(tokens, weights, len(examples) - len(kept))


def batches(rows: Rows, config: Sft, *, seed: int, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Every row once an epoch in an order drawn from (seed, epoch); the last batch is filled with weight 0."""
    n = len(rows.tokens)
    per_epoch = math.ceil(n / config.batch)
    for step in range(start, per_epoch * config.epochs):
        epoch, index = divmod(step, per_epoch)
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)
        chosen = order[index * config.batch : (index + 1) * config.batch]
        batch = {"tokens": rows.tokens[chosen], "weights": rows.weights[chosen]}
        if rows.positions is not None:
            batch["targets"] = rows.positions[chosen]
        missing = config.batch - len(chosen)
        yield {name: np.pad(values, ((0, missing), (0, 0))) for name, values in batch.items()}


def steps_of(rows: Rows, config: Sft) -> int:
    return math.ceil(len(rows.tokens) / config.batch) * config.epochs


def init_state(config: Sft, params: Params, mesh: jax.sharding.Mesh) -> State:
    """A state that owns a copy of `params`; Adam's moments lie where their parameters lie."""
    where = state_shardings(config, params, mesh)
    copy = jax.jit(lambda p: State(jax.tree.map(jnp.copy, p), transform(config).init(p)), out_shardings=where)
    return copy(params)


def state_shardings(config: Sft, params: Params, mesh: jax.sharding.Mesh) -> State:
    """Without these, `jit(tx.init)` would silently replicate the moments."""
    tx, ours = transform(config), shardings(mesh, params)
    moments = optax.tree_map_params(
        tx,
        lambda _, where: where,
        jax.eval_shape(tx.init, params),
        ours,
        transform_non_params=lambda _: replicated(mesh),
    )
    return State(ours, moments)


@functools.lru_cache(maxsize=8)
def make_step(model: ModelConfig, config: Sft, dtype: str) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """The jitted update `(state, batch, rate) → (state, metrics)`; `state` is donated."""
    tx = transform(config)
    micro = config.micro_batch or config.batch

    def mean_gradient(params, batch):
        def sums(params, part):
            loss, weight = loss_sums(model, params, part, dtype=jnp.dtype(dtype))
            return loss, weight

        gradient = jax.value_and_grad(sums, has_aux=True)
        if micro == config.batch:
            (loss, weight), grads = gradient(params, batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(-1, micro, *x.shape[1:]), batch)
            zero = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, params))
            add = functools.partial(jax.tree.map, jnp.add)
            (loss, weight), grads = jax.lax.scan(lambda c, part: (add(c, gradient(params, part)), None), zero, parts)[0]
        total = jnp.maximum(weight, 1e-6)
        return loss, weight, jax.tree.map(lambda g: g / total, grads)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: dict[str, jax.Array], rate: jax.Array):
        loss, weight, grads = mean_gradient(state.params, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 count
            updates, moments = tx.update(grads, state.moments, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        return State(params, moments), {
            "loss": loss,
            "weight": weight,
            "gradient_norm": optax.tree.norm(grads),
        }

    return step


class Checkpoints:
    """Where a fine-tuning run saves its state; this one saves nothing and starts from the beginning."""

    def restore(self, like: State) -> tuple[State | None, int, list[dict[str, float]]]:
        """The newest state (None: start over), the step it stands at, the metrics so far."""
        del like
        return None, 0, []

    def save(self, state: State, step: int, metrics: list[dict[str, float]]) -> None:
        """Keep the state that stands before update number `step`."""

    def snapshot(self, params: Params, index: int) -> None:
        """Keep the weights as snapshot `index` of the run."""


def fine_tune(
    model: ModelConfig,
    params: Params,
    rows: Rows,
    config: Sft,
    *,
    mesh: jax.sharding.Mesh,
    seed: int,
    dtype: str = "float32",
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> tuple[Params, list[dict[str, float]]]:
    """Train a copy of `params` on `rows`; returns the tuned parameters and the metrics of every step.

    A loss that is not finite stops the run with a UserError naming the step.
    """
    checkpoints = checkpoints or Checkpoints()
    state = init_state(config, params, mesh)
    restored, start, log = checkpoints.restore(state)
    state = restored if restored is not None else state
    step, total = (
        make_step(model, dataclasses.replace(config, learning_rate=0.0), dtype),
        steps_of(rows, config),
    )
    if config.snapshots > total:
        raise UserError(f"sft.snapshots is {config.snapshots}, but there are only {total} steps; lower it")
    snapshots = {round(total * (i + 1) / config.snapshots): i for i in range(config.snapshots)}
    where = batch_sharding(mesh, config.micro_batch or config.batch)
    for metrics in log:
        on_step(metrics)
    clock = time.perf_counter()
    for number, batch in enumerate(batches(rows, config, seed=seed, start=start), start):
        rate = learning_rate(config, number, total)
        state, sums = step(state, jax.device_put(batch, where), jnp.float32(rate))
        loss, weight, norm = (float(sums[name]) for name in ("loss", "weight", "gradient_norm"))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UserError(
                f"sft: the loss is {loss} and the gradient's norm {norm} at step {number + 1} of {total} (learning "
                f"rate {rate:.3g}); lower sft.learning_rate"
            )
        now = time.perf_counter()
        metrics = {
            "step": number + 1,
            "loss": loss / max(weight, 1e-6),
            "targets": weight,
            "gradient_norm": norm,
            "learning_rate": rate,
            "seconds": now - clock,
        }
        clock = now
        log.append(metrics)
        on_step(metrics)
        if number + 1 in snapshots and number + 1 < total:
            checkpoints.snapshot(state.params, snapshots[number + 1])
        if (number + 1) % config.checkpoint_every == 0 and number + 1 < total:
            checkpoints.save(state, number + 1, log)
    return state.params, log
