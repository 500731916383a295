"""The optimizer of a run, put together from optax's transforms; which one and how, `sft.optimizer` says.

Every one is the same chain: clip the gradient by its global norm, turn it into a direction, add λθ where a parameter
decays, multiply by −η. The rate η is an argument of the step, so one executable serves every rate of every phase.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmerge.tree import leaf_paths, named_leaves
from jaxmerge.where import matches

from ..log import UserError
from ..runtime.mesh import replicated, shardings
from .optimizers import Adafactor, AdamW, Lion, Muon, ScheduleFree, Sgd
from .settings import Sft
from .sparse import Chosen, Entries, gathered, scattered

Transform = optax.GradientTransformationExtraArgs | optax.GradientTransformation


def adamw(config: AdamW, params: Any) -> Transform:
    del params
    return optax.scale_by_adam(config.b1, config.b2, config.eps, config.eps_root, nesterov=config.nesterov)


def lion(config: Lion, params: Any) -> Transform:
    del params
    return optax.scale_by_lion(config.b1, config.b2)


def adafactor(config: Adafactor, params: Any) -> Transform:
    del params
    return optax.chain(
        optax.adafactor(
            min_dim_size_to_factor=config.min_dim_size_to_factor,
            decay_rate=config.decay_rate,
            decay_offset=config.decay_offset,
            multiply_by_parameter_scale=config.multiply_by_parameter_scale,
            clipping_threshold=config.clipping_threshold,
            momentum=config.momentum,
            eps=config.eps,
            factored=config.factored,
        ),
        optax.scale(-1),  # it descends; a direction is what is descended along
    )


def sgd(config: Sgd, params: Any) -> Transform:
    del params
    return optax.identity() if config.momentum is None else optax.trace(config.momentum, config.nesterov)


def muon(config: Muon, params: Any) -> Transform:
    """Muon for the matrices [out, in] of the layers, stacked or not, and Adam for all else.

    optax tells matrices by their rank, which is wrong of embeddings, of the head and of stacked layers' norms.
    """
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    inside = [re.search(r"(^|/)layers/", p) is not None and decays(p) for p in leaf_paths(params)]
    return optax.contrib.muon(
        -1.0,  # it descends; a direction is what is descended along
        ns_steps=config.ns_steps,
        beta=config.beta,
        eps=config.eps,
        nesterov=config.nesterov,
        adaptive=config.adaptive,
        preconditioning=config.preconditioning,
        adam_b1=config.adam_b1,
        adam_b2=config.adam_b2,
        adam_eps_root=config.adam_eps_root,
        muon_weight_dimension_numbers=jax.tree.unflatten(
            jax.tree.structure(params), [matrix if is_inside else None for is_inside in inside]
        ),
        consistent_rms=config.consistent_rms,
    )


def schedule_free(config: ScheduleFree, params: Any) -> Transform:
    """The direction of the AdamW inside; its momentum is schedule-free's own, so it has none itself."""
    return adamw(AdamW(b1=0.0, b2=config.b2, eps=config.eps), params)


OPTIMIZERS: dict[str, Callable[[Any, Any], Transform]] = {
    "adamw": adamw,
    "lion": lion,
    "adafactor": adafactor,
    "sgd": sgd,
    "muon": muon,
    "schedule_free": schedule_free,
}
"""By name: the settings and the parameters (arrays or shapes) to the direction of an update."""


def transform(config: Sft, params: Any, rate: Any, frozen: Any = None) -> Transform:
    """The whole update of `config` as one transform of gradients.

    Args:
      params: float32 arrays or shapes. rate: η, a number or traced. frozen: True at the leaves that are kept as they
        are, and have no moments; None where all are trained.
    """
    step, optimizer = config.step, config.optimizer
    made = optax.chain(
        OPTIMIZERS[optimizer.name](optimizer, params),
        optax.add_decayed_weights(step.weight_decay, decay_mask(params, step.decay)),
        optax.scale_by_learning_rate(rate),
    )
    if isinstance(optimizer, ScheduleFree):
        made = optax.contrib.schedule_free(made, rate, optimizer.b1, optimizer.weight_lr_power)
    made = optax.chain(optax.clip_by_global_norm(step.clip), made)
    return made if frozen is None else optax.transforms.selective_transform(made, freeze_mask=frozen)


def start(config: Sft, params: Any, frozen: Any = None, entries: Entries | None = None) -> Any:
    """The optimizer's state before the first update: float32, whatever the parameters are.

    Args:
      entries: those that are trained of parameters that are trained in part.
    """
    places = None if entries is None else entries.places(named_leaves(params))
    seen = params if places is None else gathered(params, places)
    with jax.numpy_dtype_promotion("standard"):
        state = transform(config, seen, 0.0, frozen).init(wide(seen))
    return state if places is None else Chosen(places, state)


def seen(state: Any, tree: Any) -> Any:
    """A tree like the parameters as the optimizer sees it: the entries that are trained, where some are not."""
    return gathered(tree, state.places) if isinstance(state, Chosen) else tree


def update(
    config: Sft, params: Any, state: Any, grads: Any, *, rate: jax.Array, good: jax.Array, frozen: Any = None
) -> tuple[Any, Any]:
    """Parameters and state after one update; as they were where it may not be made (`good` false).

    `optax.apply_if_finite` lets an update through after some in a row that were not finite, and knows nothing of a
    loss that jumps; `optax.conditionally_mask` counts an update that is not made. Hence their `lax.cond`, written here.
    Choosing leaf by leaf with `where` instead takes twice the time on a CPU: XLA then copies the moments.

    Args:
      grads: float32, `seen` by the optimizer. rate: η.
    """

    def made():
        before = seen(state, params)
        masters = wide(before)  # moments of one dtype, whatever the parameters are
        inner = state.inner if isinstance(state, Chosen) else state
        with jax.numpy_dtype_promotion("standard"):  # optax counts in int32 and multiplies by it
            updates, after = transform(config, before, rate, frozen).update(grads, inner, masters)
        new = jax.tree.map(lambda p, w, u: (w + u).astype(p.dtype), before, masters, updates)
        if isinstance(state, Chosen):
            return scattered(params, new, state.places), Chosen(state.places, after)
        return new, after

    return jax.lax.cond(good, made, lambda: (params, state))


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def state_places(params: Any, mesh: jax.sharding.Mesh, state: Any) -> Any:
    """The sharding of every leaf of the optimizer's state: that of its parameter where it has its shape, else whole.

    Args:
      state: arrays or shapes.
    """
    where = {
        path: (leaf.shape, place)
        for (path, leaf), place in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings(mesh, params)), strict=True
        )
    }

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        ends = (where[path[i:]] for i in range(len(path)) if path[i:] in where)
        return next((place for shape, place in ends if shape == leaf.shape), replicated(mesh))

    return jax.tree_util.tree_map_with_path(place, state)


def weights_to_keep(state: Any, params: Any) -> Any:
    """The weights a run is for: schedule-free's average x, which it keeps beside the y it takes gradients at."""

    def is_free(node: Any) -> bool:
        return isinstance(node, optax.contrib.ScheduleFreeState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_free) if is_free(node)]
    return optax.contrib.schedule_free_eval_params(found[0], params) if found else params


def decays(path: str, patterns: tuple[str, ...] = ()) -> bool:
    """Whether the parameter at `path` decays: where a pattern matches; with none, all but norms and biases.

    By name and not by rank: with stacked layers a norm has two axes.

    Example:
      >>> decays("model/norm/weight"), decays("model/layers/0/mlp/up_proj/weight"), decays("lm_head/weight", ("mlp",))
      (False, True, False)
    """
    return matches(patterns, path) if patterns else re.search(r"(norm/weight|/bias)$", path) is None


def decay_mask(params: Any, patterns: tuple[str, ...]) -> Any:
    """True at every leaf that decays; a pattern that matches no parameter is an error."""
    paths = checked_paths("sft.step.decay", patterns, params)
    return jax.tree.unflatten(jax.tree.structure(params), [decays(path, patterns) for path in paths])


def checked_paths(setting: str, patterns: tuple[str, ...], params: Any) -> list[str]:
    """The path of every leaf, once each of a setting's patterns is known to match one."""
    paths = leaf_paths(params)
    for pattern in patterns:
        if not any(matches(pattern, path) for path in paths):
            raise UserError(
                f"{setting}: {pattern!r} matches none of the {len(paths)} parameters; the first is {paths[0]}"
            )
    return paths


@functools.lru_cache(maxsize=8)
def learning_rates(config: Sft, steps: int) -> tuple[float, ...]:
    """The rate of each of `steps` updates: linear warm-up, then cosine to 0 or constant."""
    warmup = math.ceil(config.warmup * steps)
    peak = config.learning_rate
    after = optax.constant_schedule(peak)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup))
    schedule = after
    if warmup:
        schedule = optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1), after], [warmup])
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(True):  # near 0 a cosine in float32 has few digits
        return tuple(jax.jit(jax.vmap(schedule))(jnp.arange(steps, dtype=float)).tolist())


def ema_keep(config: Sft, step: int) -> float:
    """Share of the average kept at update number `step` (from 0): min(ema, (1 + n)/(10 + n)), n = step + 1.

    A short run then averages its own weights instead of remembering the ones it started from. An average that teaches
    (`sft.distill`) keeps the same share from the first update on: it is to stay behind the student.
    """
    if config.distill is not None and config.distill.by_itself:
        return config.distill.ema
    return min(config.step.ema, (2 + step) / (11 + step))
