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
from ..models.divergence import DIVERGENCES
from ..models.fused import choose
from ..models.loss import Compute, Teacher, loss_and_metrics, objective_sums
from ..models.settings import Source
from ..runtime.mesh import replicated, shardings
from . import frozen as adapters
from . import optim
from .beside import begun
from .frozen import Frozen
from .looked_at import with_constants
from .settings import Sft, Stay, Step
from .sparse import Entries
from .speed import tokens_of
from .stay import Anchor, held, pull, zeroed


class State(NamedTuple):
    """What a step changes; donated to it."""

    params: Params
    """The weights, or with `sft.lora` the adapter beside them."""
    optimizer: Any
    """optax's state, float32 where it is like a parameter."""
    average: Params | None
    """Exponential moving average of the weights, float32, that is returned (`step.ema`) or teaches (`distill`); None
    where neither is asked for."""
    skipped: Any
    """Updates not made, [in all, in a row] int32."""
    beside: Params | None = None
    """Mean of the snapshots of a block so far, float32; None without `sft.beside`. The step passes it on."""


def init_state(config: Sft, params: Params, mesh: jax.sharding.Mesh, entries: Entries | None = None) -> State:
    """A state that owns a copy of `params`; moments lie where their parameters lie.

    Args:
      entries: with a sparse `config.mask`, those that are trained.
    """
    masters = jnp.dtype(config.step.masters)

    def make(params):
        return State(
            jax.tree.map(lambda p: jnp.array(p, masters, copy=True), params),
            optim.start(config, params, held(config.stay.freeze, params), entries),
            jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
            if config.step.ema or config.self_taught
            else None,
            jnp.zeros(2, jnp.int32),
            begun(params) if config.beside.every else None,
        )

    return jax.jit(make, out_shardings=state_shardings(config, params, mesh, entries))(params)


def state_shardings(config: Sft, params: Params, mesh: jax.sharding.Mesh, entries: Entries | None = None) -> State:
    """Without these, `jit` would silently replicate the moments."""
    ours = shardings(mesh, params)
    begin = functools.partial(optim.start, config, frozen=held(config.stay.freeze, params), entries=entries)
    optimizer = optim.state_places(params, mesh, jax.eval_shape(begin, params))
    average, beside = (
        ours if asked else None for asked in (config.step.ema or config.self_taught, config.beside.every)
    )
    return State(ours, optimizer, average, replicated(mesh), beside)


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


def make_step(
    model: ModelConfig, config: Sft, how: Compute | str, taught: tuple[ModelConfig, Compute] | None = None
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """The jitted update `(state, batch, rate, keep=0, limit=inf, frozen, anchor, teacher=None) → (state, metrics)`.

    `state` is donated.

    rate: the learning rate. keep: of the weights' average, see `ema_keep`. limit: a mean loss above it, or one that
    is not finite, or such a gradient, leaves the state as it was, and is counted. frozen: with `config.lora`, the
    weights beside the adapter. anchor: with penalties of `config.stay`, what is stayed near. teacher: with
    `config.distill`, the weights of its teacher, where it is not the state's average.

    One function for all settings that differ only in what it does not read.

    Args:
      how: a dtype's name is a `Compute` of that dtype, the rest as in `config.step`, and plain attention.
      taught: sizes of the teacher that `config.distill` names, and how it is computed; None where the average teaches.
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
        stay=Stay(
            float(config.stay.l2 > 0), float(config.stay.kl > 0), config.stay.divergence, freeze=config.stay.freeze
        ),
        step=dataclasses.replace(
            Step(),
            clip=config.step.clip,
            weight_decay=config.step.weight_decay,
            decay=config.step.decay,
            router_aux_loss_coef=None if model.experts is None else config.step.router_aux_loss_coef,
        ),
        distill=config.distill and dataclasses.replace(config.distill, teacher=taught and Source(path="its"), ema=0.0),
    )
    return _make_step(model, read, how, taught)


@functools.lru_cache(maxsize=8)
def _make_step(model: ModelConfig, config: Sft, how: Compute, taught: tuple[ModelConfig, Compute] | None):
    count, stay = config.batch // (config.micro_batch or config.batch), config.stay

    def mean_gradient(params, batch, frozen, anchor, source):
        def sums(params, part):
            if config.lora is not None:
                params = adapters.joined(config.lora, frozen, params, part)
            near = (anchor.params, anchor.kl) if stay.kl else None
            return _sums(model, params, part, how, config, near, source)

        gradient = jax.value_and_grad(sums, has_aux=True)
        if count == 1:
            (loss, others), grads = gradient(params, batch)
        else:
            # Part i has rows i, i + n, …: each device cuts its own rows, none moves.
            parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
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
        teacher: Params | None = None,
    ):
        source = source_of(config, frozen, state.average if taught is None else teacher, *(taught or (model, how)))
        loss, others, grads = mean_gradient(state.params, batch, frozen, anchor, source)
        if stay.l2 and anchor is not None:
            grads = pull(state.params, anchor, grads)
        kept = held(stay.freeze, state.params)
        grads = optim.seen(state.optimizer, grads if kept is None else zeroed(grads, kept))
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= limit * jnp.maximum(others["weight"], 1e-6))
        params, optimizer = optim.update(
            config, state.params, state.optimizer, grads, rate=rate, good=good, frozen=kept
        )
        if how.mesh is not None:  # the compiler would lay norms over fsdp, and the next step be another program
            places = shardings(how.mesh, params), optim.state_places(params, how.mesh, optimizer)
            params, optimizer = jax.lax.with_sharding_constraint((params, optimizer), places)
        average = None if state.average is None else moved(state.average, params, jnp.where(good, keep, 1.0))
        counts = jnp.where(good, state.skipped * jnp.array([1, 0]), state.skipped + 1)
        sums = {"loss": loss, **others, "gradient_norm": norm, "skipped": counts, "tokens": tokens_of(batch)}
        return State(params, optimizer, average, counts, state.beside), sums

    return step


def moved(average: Params, params: Params, keep: jax.Array) -> Any:
    """The average of the weights after an update: keep · average + (1 − keep) · params."""
    return optax.incremental_update(optim.wide(params), average, 1 - keep)


def _sums(
    model: ModelConfig, params: Params, part: dict[str, jax.Array], how: Compute, config: Sft, near: Any, teacher: Any
):
    """The loss of (part of) a batch, and {weight, metrics}: sums over parts, which are divided by the weight."""
    beside: dict[str, Any] = {"near": near, "divergence": DIVERGENCES[config.stay.divergence], "teacher": teacher}
    if model.experts is not None:
        asked = config.step.router_aux_loss_coef
        beside["balanced"] = model.experts.balance if asked is None else asked
    if config.objective.joint and (teacher is None or teacher.share < 1):
        objective = config.objective.loss
        if looks_only(model, part, config, near):
            part, objective = with_constants(model, params, part, how, objective)
        loss, weight, metrics = objective_sums(model, params, part, how, objective, **beside)
    else:
        loss, weight, metrics = loss_and_metrics(model, params, part, how, **beside)
    return loss, {"weight": weight, "metrics": metrics}


def looks_only(model: ModelConfig, part: dict[str, jax.Array], config: Sft, near: Any) -> bool:
    """Whether the second sequences of a batch are computed without a gradient.

    Nothing but the objective may read them: a divergence and the balance of a mixture of experts have a gradient of
    every row, and dropout masks are drawn for all rows together.
    """
    alone = near is None and model.experts is None and not (config.lora is not None and config.lora.dropout)
    return config.objective.looks and alone and "cells" not in part


def source_of(config: Sft, frozen: Any, params: Any, sizes: ModelConfig, how: Compute) -> Teacher | None:
    """Whose distributions are learnt; frozen: the weights beside `params` where those are an adapter's average."""
    if config.distill is None:
        return None
    if config.lora is not None and config.self_taught:
        params = adapters.joined_whole(config.lora, frozen, params)
    return Teacher(sizes, params, how, config.distill.apart, config.distill.share)


def result(state: State, config: Sft) -> Params:
    """The weights a run is for: their average where one is kept for that."""
    if state.average is None or config.self_taught:
        return optim.weights_to_keep(state.optimizer, state.params)
    return state.average
