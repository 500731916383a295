"""The jitted step of fine-tuning: the state it changes, where that lies on the mesh, and one update of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..log import UserError
from ..models.config import ModelConfig
from ..models.decoder import Params, is_stacked
from ..models.fused import choose
from ..models.loss import Compute, loss_sums, objective_sums
from ..runtime.mesh import replicated, shardings
from . import frozen as adapters
from . import optim
from .frozen import Frozen
from .settings import Sft, Stay, Step
from .speed import tokens_of
from .stay import Anchor, held, pull


class State(NamedTuple):
    """What a step changes; donated to it."""

    params: Params
    """The weights, or with `sft.lora` the adapter beside them."""
    optimizer: Any
    """optax's state, float32 where it is like a parameter."""
    average: Params | None
    """Exponential moving average of the weights, float32; None where it is not asked for."""
    skipped: Any
    """Updates not made, [in all, in a row] int32."""


def init_state(config: Sft, params: Params, mesh: jax.sharding.Mesh) -> State:
    """A state that owns a copy of `params`; moments lie where their parameters lie."""
    masters = jnp.dtype(config.step.masters)

    def make(params):
        return State(
            jax.tree.map(lambda p: jnp.array(p, masters, copy=True), params),
            optim.start(config, params, held(config.stay.freeze, params)),
            jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params) if config.step.ema else None,
            jnp.zeros(2, jnp.int32),
        )

    return jax.jit(make, out_shardings=state_shardings(config, params, mesh))(params)


def state_shardings(config: Sft, params: Params, mesh: jax.sharding.Mesh) -> State:
    """Without these, `jit` would silently replicate the moments."""
    ours = shardings(mesh, params)
    optimizer = optim.state_places(config, params, mesh, held(config.stay.freeze, params))
    return State(ours, optimizer, ours if config.step.ema else None, replicated(mesh))


def compute_of(config: Sft, model: ModelConfig, params: Params, mesh: jax.sharding.Mesh, dtype: str) -> Compute:
    """How a run computes its loss: what `config.step` says, its attention chosen for the mesh's devices."""
    one = mesh if mesh.size > 1 else None  # on one device no mesh is in the way of a kernel, nor of the compile cache
    platform = mesh.devices.flat[0].platform
    try:
        attention = choose(
            config.step.attention, model, platform=platform, dtype=dtype, stacked=is_stacked(params), mesh=one
        )
    except ValueError as error:
        raise UserError(f"sft.step.{error}") from None
    return Compute(dtype, config.step.remat, config.step.logits_at_once, attention, one)


def make_step(model: ModelConfig, config: Sft, how: Compute | str) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """The jitted update `(state, batch, rate, keep=0, limit=inf, frozen=None, anchor=None) → (state, metrics)`.

    `state` is donated.

    rate: the learning rate. keep: of the weights' average, see `ema_keep`. limit: a mean loss above it, or one that
    is not finite, or such a gradient, leaves the state as it was, and is counted. frozen: with `config.lora`, the
    weights beside the adapter. anchor: with penalties of `config.stay`, what is stayed near.

    One function for all settings that differ only in what it does not read.

    Args:
      how: a dtype's name is a `Compute` of that dtype, the rest as in `config.step`, and plain attention.
    """
    if isinstance(how, str):
        how = Compute(how, config.step.remat, config.step.logits_at_once)
    config.objective.check(model.vocab_size)
    read = Sft(
        batch=config.batch,
        micro_batch=config.micro_batch,
        lora=config.lora,
        optimizer=config.optimizer,
        objective=config.objective,
        stay=Stay(float(config.stay.l2 > 0), float(config.stay.kl > 0), config.stay.freeze),
        step=dataclasses.replace(
            Step(), clip=config.step.clip, weight_decay=config.step.weight_decay, decay=config.step.decay
        ),
    )
    return _make_step(model, read, how)


@functools.lru_cache(maxsize=8)
def _make_step(model: ModelConfig, config: Sft, how: Compute):
    micro, stay = config.micro_batch or config.batch, config.stay
    objective = config.objective

    def mean_gradient(params, batch, frozen, anchor):
        def sums(params, part):
            if config.lora is not None:
                params = adapters.joined(config.lora, frozen, params, part)
            near = (anchor.params, anchor.kl) if stay.kl else None
            if objective.joint:
                loss, weight, metrics = objective_sums(model, params, part, how, objective.loss, near=near)
            else:
                (loss, weight), metrics = loss_sums(model, params, part, how, near=near), {}
            return loss, {"weight": weight, "metrics": metrics}

        gradient = jax.value_and_grad(sums, has_aux=True)
        if micro == config.batch:
            (loss, others), grads = gradient(params, batch)
        else:
            # Part i has rows i, i + n, …: each device cuts its own rows, none moves.
            parts = jax.tree.map(lambda x: x.reshape(micro, -1, *x.shape[1:]).swapaxes(0, 1), batch)
            shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

            def add(total, part):
                return jax.tree.map(jnp.add, total, optim.wide(gradient(params, part))), None

            (loss, others), grads = jax.lax.scan(add, zero, parts)[0]
        total = jnp.maximum(others["weight"], 1e-6)
        return loss, others, jax.tree.map(lambda g: g.astype(jnp.float32) / total, grads)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: State,
        batch: dict[str, jax.Array],
        rate: jax.Array,
        keep=0.0,
        limit=math.inf,
        frozen: Frozen | None = None,
        anchor: Anchor | None = None,
    ):
        loss, others, grads = mean_gradient(state.params, batch, frozen, anchor)
        if stay.l2 and anchor is not None:
            grads = pull(state.params, anchor, grads)
        kept = held(stay.freeze, state.params)
        if kept is not None:  # their gradients count in no norm
            grads = jax.tree.map(lambda g, is_kept: jnp.zeros_like(g) if is_kept else g, grads, kept)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= limit * jnp.maximum(others["weight"], 1e-6))
        params, optimizer = optim.update(
            config, state.params, state.optimizer, grads, rate=rate, good=good, frozen=kept
        )
        if how.mesh is not None:  # the compiler would lay norms over fsdp, and the next step be another program
            places = shardings(how.mesh, params), optim.state_places(config, params, how.mesh, kept)
            params, optimizer = jax.lax.with_sharding_constraint((params, optimizer), places)
        average: Any = state.average
        if average is not None:
            moved = 1 - jnp.where(good, keep, 1.0)
            average = optax.incremental_update(optim.wide(params), average, moved)
        counts = jnp.where(good, state.skipped * jnp.array([1, 0]), state.skipped + 1)
        sums = {"loss": loss, **others, "gradient_norm": norm, "skipped": counts, "tokens": tokens_of(batch)}
        return State(params, optimizer, average, counts), sums

    return step


def result(state: State) -> Params:
    """The weights a run is for: their average where one is kept."""
    return optim.weights_to_keep(state.optimizer, state.params) if state.average is None else state.average
