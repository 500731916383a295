"""Learning from a model's own fresh samples: each step draws, judges, and learns.

    for step in range(steps):
        groups = draw(questions)         # by the engine, in this process, from the very arrays that are trained
        lesson = improver.lesson(groups) # what is learnt: rows, and arrays beside them
        state = step(state, lesson)      # one update or more by the step of fine-tuning

What is drawn depends on the seed, the step, the question and the sample's number, and on nothing else; so a run
resumed from a checkpoint of (state, step) ends with the same weights, bit for bit. `rollouts.py` says what an improver
is, `improvers.py` which there are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ..generate.rollout import Prompt, Sample, rollout
from ..generate.settings import Settings
from ..log import UserError, say
from ..models.branches import obstacle
from ..models.config import ModelConfig
from ..models.decoder import Params
from ..models.loss import Compute, token_logps
from ..models.open import Model
from ..runtime.mesh import activations_on, everywhere, row_ways
from ..runtime.processes import on_first
from . import optim
from .progress import Checkpoints, Log, Progress
from .rollouts import Batch, Course, Group, Lesson, OnPolicy, parts
from .settings import Sft
from .sft import Trainee, made, metrics_of, prepared
from .shared import Sharing
from .shares import Shares

Judge = Callable[[Sequence[Sample]], list[float | None]]
"""The score of each sample, None where it could not be judged; samples are named by their prompts' ids."""


class Questions(NamedTuple):
    """What is asked: see `Course` for the fields."""

    prompts: Sequence[Prompt]
    categories: Sequence[str]
    solutions: Sequence[tuple[int, ...] | None]
    shown: Sequence[tuple[int, ...]] = ()


def learn_on_policy(
    model: Model,
    questions: Questions,
    judge: Judge,
    improver: OnPolicy,
    drawing: Settings,
    config: Sft,
    *,
    mesh: jax.sharding.Mesh,
    seed: int,
    dtype: str = "float32",
    anchor: Params | None = None,
    teacher: Model | None = None,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[dict[str, float]], None] = lambda metrics: None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> tuple[Params, Log]:
    """Train a copy of `model.params` for `improver.steps` steps.

    Args:
      drawing: how samples are drawn; `drawing.samples` are a group.
      config: how an update is computed, and how often the state is kept; the learning rate's schedule is over steps.
      seed, anchor, teacher, checkpoints, on_step, asked_to_stop: as for `fine_tune`.

    Returns:
      The tuned parameters, and the metrics of every step: those of `fine_tune`, means over the step's updates, then
      reward (mean), truncated (share), completion_tokens (mean), unjudged, samples, updates, generate_seconds, and what
      the improver tells.
    """
    total, rates = config.stay.last(improver.steps), optim.learning_rates(config, improver.steps)
    progress = Progress(config, total, checkpoints or Checkpoints(), on_step, asked_to_stop)
    objective: Any = improver.objective(drawing)
    config = dataclasses.replace(config, objective=objective)
    trainee = prepared(
        model.config, model.params, config, mesh=mesh, seed=seed, dtype=dtype, anchor=anchor, teacher=teacher
    )
    state, start = progress.resume(trainee.state)
    trainee = trainee._replace(state=state)
    shares = Shares(mesh, config)
    course = course_of(model, questions, improver, drawing, trainee.how, shares)
    for number in range(start + 1, total + 1):
        clock = time.perf_counter()
        course = course._replace(student=trainee.newest(), average=trainee.whole)
        groups = draw_groups(model, course, judge, improver, drawing, progress.log, seed=seed, step=number - 1)
        drawn = time.perf_counter() - clock
        lesson = improver.lesson(groups, course)
        course = course._replace(student=model.params)  # the updates donate the others
        trainee, learnt = learn(trainee, shares, lesson, improver, rate=rates[number - 1], step=number, total=total)
        seconds = time.perf_counter() - clock
        metrics = {
            "step": number, "learning_rate": rates[number - 1], **learnt, **told_of(groups), **lesson.metrics,
            "generate_seconds": drawn, "seconds": seconds,
        }  # fmt: skip
        progress.tell(metrics)
        progress.keep(number, trainee.state, trainee.whole)
    return jax.tree.map(lambda ours, given: ours.astype(given.dtype), trainee.whole(), model.params), progress.log


def course_of(
    model: Model, questions: Questions, improver: OnPolicy, drawing: Settings, how: Compute, shares: Shares
) -> Course:
    """What an improver may use, before the first step."""
    if improver.questions > len(questions.prompts):
        raise UserError(
            f"improver.questions is {improver.questions}, and there are {len(questions.prompts)} training questions; "
            "lower it"
        )
    updates = improver.iterations * -(-improver.questions * drawing.samples // shares.config.batch)
    return Course(
        *questions,
        drawing=drawing,
        pad_id=model.tokenizer.pad_id or 0,
        reference=model.params,
        student=model.params,
        average=lambda: model.params,
        several=updates > 1,
        logps=functools.partial(log_probabilities, model.config, how, shares),
        sharing=sharing_of(model.config, improver, drawing, how, shares),
    )


def sharing_of(
    model: ModelConfig, improver: OnPolicy, drawing: Settings, how: Compute, shares: Shares
) -> Sharing | None:
    """How rows share prompts, where they may and can; the reason is told where they may and cannot."""
    config = shares.config
    if not improver.share_prompts:
        return None
    reason = obstacle(model, how.attention)
    if reason is None and not improver.shares(config):
        reason = (
            "with improver.normalise=bnpo the loss depends on which answers are a micro-batch; sft.micro_batch=null "
            "shares prompts"
        )
    if reason:
        also = ", and samples without an advantage are computed" if improver.skip_equal else ""
        say(f"prompts are computed for each of their answers{also}: {reason}")
        return None
    skips = improver.skip_equal and (reason := what_reads_all(config)) is None
    if reason:
        say(f"samples without an advantage are computed: {reason}")
    micro, ways = config.micro_batch or config.batch, row_ways(shares.mesh)
    ways = 1 if micro % ways else ways
    return Sharing(model, config.batch, config.batch // micro, ways, longest=drawing.max_new_tokens, skips=skips)


def what_reads_all(config: Sft) -> str | None:
    """Why samples without an advantage change an update, or None."""
    if config.stay.kl:
        return "sft.stay.kl is of all tokens"
    if config.lora is not None and config.lora.dropout:
        return "the masks of sft.lora.dropout are drawn for all rows"
    return None


def draw_groups(
    model: Model, course: Course, judge: Judge, improver: OnPolicy, drawing: Settings, log: Log, *, seed: int, step: int
) -> list[Group]:
    """The judged samples of a step, a group a question; others are asked until enough groups are kept."""
    groups: list[Group] = []
    for draw in range(1 + improver.redraws):
        numbers = improver.choose(course, log, seed=seed, step=step, draw=draw).tolist()
        asked = [course.prompts[i] for i in numbers]
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), draw)
        samples = rollout(model.config, course.student, model.tokenizer, asked, drawing, key)
        scores = on_first(judge, samples)
        rewards = np.array([math.nan if score is None else score for score in scores], np.float64)
        G = drawing.samples
        groups += [
            Group(number, asked[i].tokens, samples[i * G : (i + 1) * G], rewards[i * G : (i + 1) * G])
            for i, number in enumerate(numbers)
        ]
        if sum(map(improver.keeps, groups)) >= improver.questions:
            break
    return groups


def learn(
    trainee: Trainee, shares: Shares, lesson: Lesson, improver: OnPolicy, *, rate: float, step: int, total: int
) -> tuple[Trainee, dict[str, float]]:
    """The updates of a step, and the means of what they tell."""
    config = shares.config
    own = parts(lesson.batch, lesson.rows or config.batch) if lesson.batch is not None else []
    worked = parts(lesson.worked, config.batch) if lesson.worked is not None else []
    own = own * improver.iterations
    most = 1 << 10  # numbers of rows are drawn from for dropout masks; no step has as many updates
    found: list[dict[str, float]] = []
    aside: list[dict[str, float]] = []
    for index, part in enumerate(own + worked):
        clock = time.perf_counter()
        arguments = map(np.float32, (rate, optim.ema_keep(config, step - 1), math.inf))
        batch = shares.put(part, step * most + index)
        state, sums = trainee.step(trainee.state, batch, *arguments, *trainee.beside)
        trainee, sums = trainee._replace(state=state), jax.device_get(sums)
        if made(sums, config.step, limit=math.inf, rate=rate, step=step, total=total):
            (found if index < len(own) else aside).append(metrics_of(sums, time.perf_counter() - clock))
    means = {name: float(np.mean([metrics[name] for metrics in found])) for name in (found[0] if found else ())}
    means = {"loss": 0.0, "targets": 0.0, "gradient_norm": 0.0, "skipped": 0, **means, "updates": len(found + aside)}
    return trainee, means | ({"worked_loss": float(np.mean([m["loss"] for m in aside]))} if aside else {})


def told_of(groups: Sequence[Group]) -> dict[str, float]:
    """What is told of the samples of a step."""
    rewards = np.concatenate([group.rewards for group in groups])
    samples = [sample for group in groups for sample in group.samples]
    judged = ~np.isnan(rewards)
    return {
        "reward": float(rewards[judged].mean()) if judged.any() else 0.0,
        "unjudged": int((~judged).sum()),
        "samples": len(samples),
        "completion_tokens": float(np.mean([len(sample.tokens) for sample in samples])),
        "truncated": float(np.mean([sample.reason == "length" for sample in samples])),
    }


def log_probabilities(
    model: ModelConfig, how: Compute, shares: Shares, params: Params, batch: Batch, rows: int = 0
) -> np.ndarray:
    """`Course.logps`: as many rows at a time as an update has."""
    found = [
        np.asarray(_token_logps(model, params, shares.put(part, 0), how))
        for part in parts(batch, rows or shares.config.batch)
    ]
    return np.concatenate(found)[: len(batch["tokens"])]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _token_logps(model: ModelConfig, params: Params, batch: dict[str, jax.Array], how: Compute) -> jax.Array:
    with activations_on(how.mesh):
        return everywhere(token_logps(model, params, batch, how))
