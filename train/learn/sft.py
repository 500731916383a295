"""Supervised fine-tuning: the jitted step, and a loop that can stop anywhere.

The order of the examples depends on the seed and the epoch alone, the step on its state and batch alone, so
a run resumed from a checkpoint of (state, step) ends with the same weights, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..config import Sft
from ..log import UserError
from ..mesh import batch_sharding, replicated, shardings
from ..models.config import ModelConfig
from ..models.decoder import Params
from .batches import Rows, batches, steps_of
from .objective import loss_sums
from .optim import learning_rate, transform


class State(NamedTuple):
    """What a step changes; donated to it."""

    params: Params
    moments: Any


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
