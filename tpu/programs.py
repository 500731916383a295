"""The programs of a run, lowered from shapes alone for the devices of any mesh: the step, the decoder, the merge."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxmerge
from train.generate.caches import empty_caches
from train.generate.engine import Decoding, decode
from train.learn.settings import Sft, Step
from train.learn.step import compute_of, init_state, make_step, state_shardings
from train.models.config import ModelConfig
from train.models.decoder import shapes
from train.models.stacked import stack_layers
from train.runtime.mesh import batch_sharding, replicated, shardings, spread_sharding, without_fsdp


def sft_of(plan: Any) -> Sft:
    """The settings of the run that `plan` is of."""
    step = Step(
        attention=plan.attention,
        remat=plan.remat,
        layers=plan.layers,
        masters=plan.masters,
        logits_at_once=plan.logits_at_once,
    )
    return Sft(batch=plan.batch, micro_batch=plan.micro_batch, max_length=plan.length, step=step)


class Program(NamedTuple):
    """A jitted function and the shapes it is called with, each with its place."""

    function: Any
    arguments: tuple[Any, ...]
    static: dict[str, Any]

    def lower(self, **options: Any) -> jax.stages.Lowered:
        """For the devices of the arguments' mesh; `lowering_platforms=("tpu",)` lowers alone, on any devices."""
        return self.function.trace(*self.arguments, **self.static).lower(**options)

    @property
    def argument_bytes(self) -> float:
        """Bytes of the arguments on one device."""
        leaves = [x for x in jax.tree.leaves(self.arguments) if isinstance(x, jax.ShapeDtypeStruct)]
        return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def sft(model: ModelConfig, plan: Any, mesh: jax.sharding.Mesh) -> Program:
    """`train.learn.step.make_step` on a batch of [B, T] tokens."""
    config = sft_of(plan)
    params = shapes(model) if plan.layers == "unrolled" else jax.eval_shape(stack_layers, shapes(model))
    state = jax.eval_shape(functools.partial(init_state, config, mesh=mesh), params)
    state = placed(state, state_shardings(config, params, mesh))
    rows = batch_sharding(mesh, plan.micro_batch or plan.batch)
    kinds = {"tokens": jnp.int32, "weights": jnp.float32}
    batch = {name: shape((plan.batch, plan.length), kind, rows) for name, kind in kinds.items()}
    step = make_step(model, config, compute_of(config, model, params, mesh, plan.dtype))
    return Program(step, (state, batch, *(shape((), jnp.float32, replicated(mesh)) for _ in range(3))), {})


def decoder(model: ModelConfig, plan: Any, mesh: jax.sharding.Mesh) -> Program:
    """`train.generate.engine.decode`: CHUNK tokens for each of `slots` sequences of up to `length` tokens."""
    where = shardings(mesh, shapes(model))
    params = placed(shapes(model), jax.tree.map(without_fsdp, where) if plan.gather else where, plan.dtype)
    caches = jax.eval_shape(functools.partial(empty_caches, model, plan.slots, plan.length, plan.dtype))
    caches = jax.tree.map(lambda x: shape(x.shape, x.dtype, spread_sharding(mesh, x.shape, tensor=1)), caches)
    whole = replicated(mesh)
    numbers = (shape((plan.slots,), jnp.int32, whole) for _ in ("last", "at", "steps"))
    drawn = (shape((plan.slots, 2), jnp.uint32, whole), shape((), jnp.float32, whole))
    how = Decoding(greedy=False, dtype=plan.dtype)
    static = {"how": how, "mesh": mesh if mesh.size > 1 else None}
    return Program(decode, (model, params, caches, *numbers, *drawn), static)


def merge(model: ModelConfig, plan: Any, mesh: jax.sharding.Mesh) -> Program:
    """`jaxmerge.imm` of float32 models, its coefficient an argument."""
    del plan
    where = shardings(mesh, shapes(model))
    params = placed(shapes(model), where, jnp.float32)

    def imm(anchor, tuned, alpha):
        return jaxmerge.imm([tuned], base=anchor, alpha=alpha)

    return Program(jax.jit(imm, out_shardings=where), (params, params, shape((), jnp.float32, replicated(mesh))), {})


PROGRAMS = {"sft": sft, "decode": decoder, "merge": merge}


def shape(sizes: tuple[int, ...], dtype: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=where)


def placed(tree: Any, where: Any, dtype: Any = None) -> Any:
    return jax.tree.map(lambda x, place: shape(x.shape, dtype or x.dtype, place), tree, where)
