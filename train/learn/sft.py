"""Supervised fine-tuning: a loop around the jitted step (step.py) that can stop anywhere.

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
import numpy as np

from ..log import UserError, say
from ..models.config import ModelConfig
from ..models.decoder import Params, is_stacked
from ..models.lora import check_targets, init_lora
from ..models.lora_files import save_lora
from ..models.loss import Compute, loss_sums
from ..models.open import Model
from ..models.stacked import stack_layers, unstack_layers
from ..runtime.checkpoint import abstract
from ..runtime.mesh import shardings
from ..runtime.processes import on_first
from . import frozen as adapters
from . import optim
from .batches import RowSource, steps_of
from .beside import Stream
from .frozen import Frozen
from .importance import settled, share_trained
from .masks import Everything, Mask
from .objectives import ResponseOnly
from .progress import Checkpoints, Log, Progress
from .reference import with_reference
from .settings import Sft, Step
from .shared_pairs import with_shared_prompts
from .shares import Shares
from .sparse import Entries, renewing
from .speed import batch_flops, peak_flops
from .stay import Anchor, held
from .step import State, compute_of, init_state, make_step, result
from .watch import skipped, spike_limit, tracing


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
        optim.decay_mask(shapes, config.step.decay)
        if config.lora is not None:
            check_targets(config.lora, params)
    except UserError as error:
        raise UserError(f"{where}{error}") from None


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
    teacher: Model | None = None,
    checkpoints: Checkpoints | None = None,
    trace_to: pathlib.Path | None = None,
    adapter_to: pathlib.Path | None = None,
    on_step: Callable[[dict[str, float]], None] = lambda metrics: None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> tuple[Params, Log]:
    """Train a copy of `params` on `rows`; with `config.lora` an adapter beside them, merged at the end.

    Args:
      held_out: rows whose loss is measured every `config.watch.evaluate_every` steps and at the end.
      anchor: what `config.stay` holds the weights near, and the original model of an objective's reference; None is
        `params`.
      teacher: the model that `config.distill` names.
      adapter_to: folder that PEFT reads, where `config.lora` trains an adapter; None writes none.
      trace_to: folder of a profiler trace, where `config.watch.trace_from` asks for one.
      on_step: called with the metrics of every update made, those before a checkpoint gone on from included.
      asked_to_stop: called after every update; the state is saved, and `Stopped` raised, where it says so.

    Returns:
      The tuned parameters (their average, with `config.step.ema`) in the dtype of `params`, and the metrics of every
      update made: step, loss (a target; β·KL is in it with `config.stay.kl`, and is not in held_out_loss), targets
      (tokens; pairs, with an objective of pairs), gradient_norm, learning_rate, skipped (updates so far), seconds,
      tokens_per_second (up to each row's last target), mfu (of every position computed), the objective's own metrics,
      and held_out_loss where it was measured.

    Raises:
      UserError: `max_skipped` updates in a row, or the last one, were not finite or spikes.
    """
    checkpoints = checkpoints or Checkpoints()
    schedule = steps_of(rows, config)
    total, rates = config.stay.last(schedule), optim.learning_rates(config, schedule)
    progress = Progress(config, total, checkpoints, on_step, asked_to_stop)
    trainee = prepared(
        model, params, config, rows=rows, mesh=mesh, seed=seed, dtype=dtype, anchor=anchor, teacher=teacher
    )
    rows = with_shared_prompts(model, rows, config, trainee.how)
    if config.objective.reference_model():
        base = anchor if anchor is not None and config.objective.reference_model() == "original" else params
        base = placed(stack_layers, base, mesh) if is_stacked(trainee.state.params) else base
        rows = with_reference(model, base, rows, config, trainee.how, mesh=mesh)
    beside = streamed(config, total, checkpoints, mesh)
    state, start = progress.resume(trainee.state)
    trainee = trainee._replace(state=state)
    peak, _ = peak_flops(dtype, mesh.size)
    with tracing(config.watch, trace_to) as before:
        clock = time.perf_counter()
        for number, batch in enumerate(Shares(mesh, config).batches(rows, seed=seed, start=start), start + 1):
            if number > total:
                break
            before(number)
            rate, limit = rates[number - 1], spike_limit(config.step.spike, progress.log)
            arguments = map(np.float32, (rate, optim.ema_keep(config, number - 1), limit))
            state, sums = trainee.step(trainee.state, batch, *arguments, *trainee.beside)
            trainee, sums = trainee._replace(state=state), jax.device_get(sums)
            now = time.perf_counter()
            seconds, clock = now - clock, now
            trainee = trainee._replace(state=beside(trainee.renewed(number), number))
            if made(sums, config.step, limit=limit, rate=rate, step=number, total=total):
                metrics = {"step": number, "learning_rate": rate, **metrics_of(sums, seconds)}
                if math.isfinite(peak):
                    metrics["mfu"] = batch_flops(model, batch, frozen=config.lora is not None) / seconds / peak
                if held_out is not None and (number % config.watch.evaluate_every == 0 or number == total):
                    tuned = trainee.whole()
                    metrics["held_out_loss"] = mean_loss(model, tuned, held_out, config, trainee.how, mesh=mesh)
                    clock = time.perf_counter()  # the next step is not charged for it
                progress.tell(metrics)
            progress.keep(number, trainee.state, trainee.whole)
    if config.lora is not None and adapter_to is not None:
        on_first(shutil.rmtree, adapter_to, ignore_errors=True)
        save_lora(adapter_to, config.lora, result(trainee.state, config), params)
    return jax.tree.map(lambda ours, given: ours.astype(given.dtype), trainee.whole(), params), progress.log


def streamed(
    config: Sft, total: int, checkpoints: Checkpoints, mesh: jax.sharding.Mesh
) -> Callable[[State, int], State]:
    """What is done with the state after every update for `sft.beside`: the last one's has the merged weights."""
    if not config.beside.every:
        return lambda state, number: state
    stream, blocks = Stream(config.beside, total), checkpoints.blocks
    if config.beside.block is None:
        blocks = None
    elif blocks is None:
        raise UserError("sft.beside.block: this run keeps nothing on disk; leave block null")

    def after(state: State, number: int) -> State:
        assert state.beside is not None, "init_state made it"
        mean, whole = stream.taken(state.beside, state.params, number)
        state = state._replace(beside=mean)
        if whole is not None and blocks is not None:
            blocks.keep(placed(unstack_layers, mean, mesh) if is_stacked(mean) else mean, whole, stream.schedule)
        if number < total or config.beside.decay is None:
            return state
        if blocks is None:
            return state._replace(average=mean)
        shapes = jax.eval_shape(unstack_layers, state.params)
        counts = [count for _, count in stream.blocks]
        return state._replace(average=blocks.merged(counts, abstract(shapes, shardings(mesh, shapes))))

    return after


class Trainee(NamedTuple):
    """What a run trains, how, and what its step reads beside it."""

    state: State
    """Of the newest update; the step donates it."""
    step: Callable[..., tuple[State, dict[str, jax.Array]]]
    how: Compute
    near: Anchor | None
    """What the weights stay near, with penalties of `sft.stay`."""
    frozen: Frozen | None
    """The weights beside the adapter, with `sft.lora`."""
    teacher: Params | None
    """Of the model that `sft.distill` names."""
    config: Sft
    mesh: jax.sharding.Mesh
    mask: Mask
    entries: Entries | None
    """Those that are trained of parameters that are trained in part."""

    def renewed(self, number: int) -> State:
        """The state after update `number`, the entries chosen anew where the mask says so."""
        state = self.state
        if self.entries is None or not self.mask.renews(number):
            return state
        places = tuple(x.sharding for x in jax.tree.leaves(state.optimizer))
        return state._replace(optimizer=renewing(self.entries, places)(state.params, state.optimizer))

    @property
    def beside(self) -> tuple[Frozen | None, Anchor | None, Params | None]:
        """The last arguments of the step."""
        return self.frozen, self.near, self.teacher

    def whole(self) -> Params:
        """The model that the run would return now: the adapter merged, the layers one by one."""
        return self._whole(result(self.state, self.config))

    def newest(self) -> Params:
        """The model as the last update left it, which is no average; the same arrays where they are a model's."""
        return self._whole(self.state.params)

    def _whole(self, params: Params) -> Params:
        if self.config.lora is not None and self.frozen is not None:
            params = adapters.merged(self.config.lora, self.frozen, params)
        return placed(unstack_layers, params, self.mesh) if is_stacked(params) else params


def prepared(
    model: ModelConfig,
    params: Params,
    config: Sft,
    *,
    mesh: jax.sharding.Mesh,
    seed: int,
    dtype: str,
    anchor: Params | None,
    teacher: Model | None = None,
    rows: RowSource | None = None,
) -> Trainee:
    """A state made of `params` and everything its step needs; see `fine_tune` for the arguments.

    Args:
      rows: what a mask measures importance on; None where all parameters are trained.
    """
    frozen, trained, entries = None, params, None
    if rows is not None and not isinstance(config.mask, Everything):
        config, entries = settled(config, model, params, rows, mesh=mesh, seed=seed, dtype=dtype)
        say(f"mask: {share_trained(config, params, entries):.2%} of the model's size is trained")
    if config.lora is not None:
        trained, frozen = adapters.freeze(config.lora, params, mesh, seed=seed)
        say(f"LoRA: {adapters.share(params, trained):.2%} of the model's size is trained")
    near = None
    if config.stay.penalised:
        near = Anchor(params if anchor is None else anchor, np.float32(config.stay.l2), np.float32(config.stay.kl))
    if config.step.layers == "stacked":
        trained = placed(stack_layers, trained, mesh)
        frozen = frozen and frozen._replace(params=placed(stack_layers, frozen.params, mesh))
        near = near and near._replace(params=placed(stack_layers, near.params, mesh))
    state = init_state(config, trained, mesh, entries)
    how = compute_of(config, model, state.params, mesh, dtype)
    say(f"attention: {how.attention}")
    theirs = taught = None
    if teacher is not None and config.distill is not None and config.distill.teacher is not None:
        theirs = teacher.params
        if config.step.layers == "stacked":
            theirs = placed(stack_layers, theirs, mesh)
        taught = teacher.config, compute_of(config, teacher.config, theirs, mesh, config.distill.teacher.dtype)
    step = make_step(model, config, how, taught)
    return Trainee(state, step, how, near, frozen, theirs, config, mesh, config.mask, entries)


def made(sums: dict[str, Any], step_config: Step, **about: Any) -> bool:
    """Whether the update was made; one that was not is told, or stops the run."""
    in_a_row = int(sums["skipped"][1])
    if in_a_row:
        loss = float(sums["loss"]) / max(float(sums["weight"]), 1e-6)
        skipped(in_a_row, loss=loss, norm=float(sums["gradient_norm"]), config=step_config, **about)
    return not in_a_row


def metrics_of(sums: dict[str, Any], seconds: float) -> dict[str, float]:
    """What is told of an update, from its sums over the batch and the time it took."""
    weight = float(sums["weight"])
    return {
        "loss": float(sums["loss"]) / max(weight, 1e-6),
        "targets": weight,
        "gradient_norm": float(sums["gradient_norm"]),
        "skipped": int(sums["skipped"][0]),
        "seconds": seconds,
        "tokens_per_second": float(sums["tokens"]) / seconds,
        **{name: float(value) / max(weight, 1e-6) for name, value in sums["metrics"].items()},
    }


def placed(change: Callable[[Params], Params], params: Params, mesh: jax.sharding.Mesh) -> Params:
    """`change(params)`, where the mesh has it."""
    return jax.jit(change, out_shardings=shardings(mesh, jax.eval_shape(change, params)))(params)


def one_epoch(config: Sft) -> Sft:
    """The settings of rows that are gone through once, as held-out ones are: their plain loss is what is measured."""
    return dataclasses.replace(config, epochs=1, objective=ResponseOnly(), distill=None)


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
