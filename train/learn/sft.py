"""Supervised fine-tuning: the jitted step, and a loop that can stop anywhere.

The order of the examples depends on the seed and the epoch alone, the step on its state and batch alone, so
a run resumed from a checkpoint of (state, step) ends with the same weights, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..log import UserError, say
from ..models.config import ModelConfig
from ..models.decoder import Params, is_stacked
from ..models.fused import choose
from ..models.lora import check_targets, init_lora
from ..models.lora_files import save_lora
from ..models.loss import Compute, loss_sums
from ..models.stacked import stack_layers, unstack_layers
from ..runtime.mesh import replicated, shardings
from ..runtime.processes import on_first
from ..runtime.stop import Stopped
from . import frozen as adapters
from .batches import RowSource, steps_of
from .frozen import Frozen
from .optim import Moments, adamw, decay_mask, ema_keep, learning_rate, start
from .settings import Sft, Stay, Step
from .shares import Shares
from .speed import batch_flops, peak_flops, tokens_of
from .stay import Anchor, held, pull
from .watch import skipped, spike_limit, tracing


class State(NamedTuple):
    """What a step changes; donated to it."""

    params: Params
    """The weights, or with `sft.lora` the adapter beside them."""
    moments: Moments
    average: Params | None
    """Exponential moving average of the weights, float32; None where it is not asked for."""
    skipped: Any
    """Updates not made, [in all, in a row] int32."""


def init_state(config: Sft, params: Params, mesh: jax.sharding.Mesh) -> State:
    """A state that owns a copy of `params`; Adam's moments lie where their parameters lie."""
    masters = jnp.dtype(config.step.masters)

    def make(params):
        return State(
            jax.tree.map(lambda p: jnp.array(p, masters, copy=True), params),
            start(params),
            jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params) if config.step.ema else None,
            jnp.zeros(2, jnp.int32),
        )

    return jax.jit(make, out_shardings=state_shardings(config, params, mesh))(params)


def state_shardings(config: Sft, params: Params, mesh: jax.sharding.Mesh) -> State:
    """Without these, `jit` would silently replicate the moments."""
    ours, count = shardings(mesh, params), replicated(mesh)
    return State(ours, Moments(ours, ours, count), ours if config.step.ema else None, count)


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


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
    read = Sft(
        batch=config.batch,
        micro_batch=config.micro_batch,
        lora=config.lora,
        stay=Stay(float(config.stay.l2 > 0), float(config.stay.kl > 0), config.stay.freeze),
        step=dataclasses.replace(
            Step(), clip=config.step.clip, weight_decay=config.step.weight_decay, decay=config.step.decay
        ),
    )
    return _make_step(model, read, how)


@functools.lru_cache(maxsize=8)
def _make_step(model: ModelConfig, config: Sft, how: Compute):
    micro, stay = config.micro_batch or config.batch, config.stay

    def mean_gradient(params, batch, frozen, anchor):
        def sums(params, part):
            if config.lora is not None:
                params = adapters.joined(config.lora, frozen, params, part)
            return loss_sums(model, params, part, how, near=(anchor.params, anchor.kl) if stay.kl else None)

        gradient = jax.value_and_grad(sums, has_aux=True)
        if micro == config.batch:
            (loss, weight), grads = gradient(params, batch)
        else:
            # Part i has rows i, i + n, …: each device cuts its own rows, none moves.
            parts = jax.tree.map(lambda x: x.reshape(micro, -1, *x.shape[1:]).swapaxes(0, 1), batch)
            zero = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

            def add(total, part):
                (loss, weight), grads = gradient(params, part)
                return jax.tree.map(jnp.add, total, ((loss, weight), wide(grads))), None

            (loss, weight), grads = jax.lax.scan(add, zero, parts)[0]
        total = jnp.maximum(weight, 1e-6)
        return loss, weight, jax.tree.map(lambda g: g.astype(jnp.float32) / total, grads)

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
        loss, weight, grads = mean_gradient(state.params, batch, frozen, anchor)
        if stay.l2 and anchor is not None:
            grads = pull(state.params, anchor, grads)
        kept = held(stay.freeze, state.params) if stay.freeze else None
        if kept is not None:
            grads = jax.tree.map(lambda g, is_kept: jnp.zeros_like(g) if is_kept else g, grads, kept)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= limit * jnp.maximum(weight, 1e-6))
        params, moments = adamw(config.step, state.params, state.moments, grads, norm=norm, rate=rate, good=good)
        if kept is not None:  # weight decay moves them too
            params = jax.tree.map(lambda new, old, is_kept: old if is_kept else new, params, state.params, kept)
        average = state.average
        if average is not None:
            keep = jnp.where(good, keep, 1.0)
            average = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, average, wide(params))
        counts = jnp.where(good, state.skipped * jnp.array([1, 0]), state.skipped + 1)
        sums = {"loss": loss, "weight": weight, "gradient_norm": norm, "skipped": counts, "tokens": tokens_of(batch)}
        return State(params, moments, average, counts), sums

    return step


def check_patterns(config: Sft, params: Params, where: str = "") -> None:
    """Raise what a step would raise of path patterns that match nothing, before there are examples to learn.

    Args:
      params: arrays or shapes. where: what the message begins with.
    """

    def trained(params: Params) -> Params:
        if config.lora is not None:
            params = init_lora(config.lora, params, jax.random.key(0))
        return stack_layers(params) if config.step.layers == "stacked" else params

    try:
        shapes = jax.eval_shape(trained, params)
        held(config.stay.freeze, shapes)
        decay_mask(shapes, config.step.decay)
        if config.lora is not None:
            check_targets(config.lora, params)
    except UserError as error:
        raise UserError(f"{where}{error}") from None


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
    rows: RowSource,
    config: Sft,
    *,
    mesh: jax.sharding.Mesh,
    seed: int,
    dtype: str = "float32",
    held_out: RowSource | None = None,
    anchor: Params | None = None,
    checkpoints: Checkpoints | None = None,
    trace_to: pathlib.Path | None = None,
    adapter_to: pathlib.Path | None = None,
    on_step: Callable[[dict[str, float]], None] = lambda metrics: None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> tuple[Params, list[dict[str, float]]]:
    """Train a copy of `params` on `rows`; with `config.lora` an adapter beside them, merged at the end.

    Args:
      held_out: rows whose loss is measured every `config.watch.evaluate_every` steps and at the end.
      anchor: what `config.stay` holds the weights near; None is `params`.
      adapter_to: folder that PEFT reads, where `config.lora` trains an adapter; None writes none.
      trace_to: folder of a profiler trace, where `config.watch.trace_from` asks for one.
      on_step: called with the metrics of every update made, those before a checkpoint gone on from included.
      asked_to_stop: called after every update; the state is saved, and `Stopped` raised, where it says so.

    Returns:
      The tuned parameters (their average, with `config.step.ema`) in the dtype of `params`, and the metrics of every
      update made: step, loss (a target; β·KL is in it with `config.stay.kl`, and is not in held_out_loss), targets,
      gradient_norm, learning_rate, skipped (updates so far), seconds, tokens_per_second (up to each row's last
      target), mfu (of every position computed), and held_out_loss where it was measured.

    Raises:
      UserError: `max_skipped` updates in a row, or the last one, were not finite or spikes.
    """
    checkpoints = checkpoints or Checkpoints()
    schedule = steps_of(rows, config)
    total = config.stay.last(schedule)
    if config.snapshots > total:
        raise UserError(f"sft.snapshots is {config.snapshots}, but there are only {total} steps; lower it")
    snapshots = {round(total * (i + 1) / config.snapshots): i for i in range(config.snapshots)}
    lora, frozen, trained = config.lora, None, params
    if lora is not None:
        trained, frozen = adapters.freeze(lora, params, mesh, seed=seed)
        say(f"LoRA: {adapters.share(params, trained):.2%} of the model's size is trained")
    if config.step.layers == "stacked":
        trained = placed(stack_layers, trained, mesh)
        frozen = frozen and Frozen(placed(stack_layers, frozen.params, mesh), frozen.key)
    near = None
    if config.stay.penalised:
        near = params if anchor is None else anchor
        near = placed(stack_layers, near, mesh) if config.step.layers == "stacked" else near
        near = Anchor(near, np.float32(config.stay.l2), np.float32(config.stay.kl))
    state = init_state(config, trained, mesh)
    del trained  # the state has a copy

    def whole(trained: Params) -> Params:
        if lora is not None and frozen is not None:
            trained = adapters.merged(lora, frozen, trained)
        return placed(unstack_layers, trained, mesh) if is_stacked(trained) else trained

    restored, start, log = checkpoints.restore(state)
    state = restored if restored is not None else state
    how = compute_of(config, model, state.params, mesh, dtype)
    say(f"attention: {how.attention}")
    step = make_step(model, config, how)
    shares = Shares(mesh, config)
    peak, _ = peak_flops(dtype, mesh.size)
    for metrics in log:
        on_step(metrics)
    with tracing(config.watch, trace_to) as before:
        clock = time.perf_counter()
        for number, batch in enumerate(shares.batches(rows, seed=seed, start=start), start):
            if number == total:
                break
            before(number + 1)
            rate, keep = learning_rate(config, number, schedule), ema_keep(config, number)
            limit = spike_limit(config.step.spike, log)
            arguments = map(np.float32, (rate, keep, limit))
            state, sums = step(state, batch, *arguments, frozen, near)
            loss, weight, norm = (float(sums[name]) for name in ("loss", "weight", "gradient_norm"))
            loss, (never_made, in_a_row) = loss / max(weight, 1e-6), sums["skipped"].tolist()
            now = time.perf_counter()
            seconds, clock = now - clock, now
            if in_a_row:
                told = {"loss": loss, "norm": norm, "limit": limit, "rate": rate, "step": number + 1, "total": total}
                skipped(in_a_row, **told, config=config.step)
            else:
                metrics = {
                    "step": number + 1,
                    "loss": loss,
                    "targets": weight,
                    "gradient_norm": norm,
                    "learning_rate": rate,
                    "skipped": never_made,
                    "seconds": seconds,
                    "tokens_per_second": float(sums["tokens"]) / seconds,
                }
                if math.isfinite(peak):
                    metrics["mfu"] = batch_flops(model, batch, frozen=lora is not None) / seconds / peak
                if held_out is not None and ((number + 1) % config.watch.evaluate_every == 0 or number + 1 == total):
                    metrics["held_out_loss"] = mean_loss(model, whole(result(state)), held_out, config, how, mesh=mesh)
                    clock = time.perf_counter()  # the next step is not charged for it
                log.append(metrics)
                on_step(metrics)
            if number + 1 in snapshots and number + 1 < total:
                checkpoints.snapshot(whole(result(state)), snapshots[number + 1])
            stopping = asked_to_stop() and number + 1 < total
            if stopping or ((number + 1) % config.checkpoint_every == 0 and number + 1 < total):
                checkpoints.save(state, number + 1, log)
            if stopping:
                say(f"stopped after step {number + 1} of {total}; saved")
                raise Stopped
    if lora is not None and adapter_to is not None:
        on_first(shutil.rmtree, adapter_to, ignore_errors=True)
        save_lora(adapter_to, lora, result(state), params)
    return jax.tree.map(lambda ours, given: ours.astype(given.dtype), whole(result(state)), params), log


def placed(change: Callable[[Params], Params], params: Params, mesh: jax.sharding.Mesh) -> Params:
    """`change(params)`, where the mesh has it."""
    return jax.jit(change, out_shardings=shardings(mesh, jax.eval_shape(change, params)))(params)


def result(state: State) -> Params:
    """The weights a run is for: their average where it is kept."""
    return state.params if state.average is None else state.average


def one_epoch(config: Sft) -> Sft:
    """The settings of rows that are gone through once, as held-out ones are."""
    return dataclasses.replace(config, epochs=1)


def mean_loss(
    model: ModelConfig, params: Params, rows: RowSource, config: Sft, how: Compute, *, mesh: jax.sharding.Mesh
) -> float:
    """Σ w·(−log p) / Σ w over all rows, `micro_batch` at a time."""
    once = dataclasses.replace(one_epoch(config), batch=config.micro_batch or config.batch, micro_batch=None, lora=None)
    sums = [_evaluate(model, params, batch, how) for batch in Shares(mesh, once).batches(rows, seed=0)]
    loss, weight = np.sum(np.array(jax.device_get(sums), np.float64), axis=0)
    return float(loss / max(weight, 1e-6))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _evaluate(model: ModelConfig, params: Params, batch: dict[str, jax.Array], how: Compute):
    return loss_sums(model, params, batch, how)
