r"""ExMe searched: extrapolate each of n checkpoints by its own α, merge them by β, all chosen on validation data.

$\theta = \sum_i \lambda_i (\theta_i + \alpha_i (\theta_i - \theta_b))$, for two checkpoints λ = (β, 1 − β).

Lin et al., "Extrapolation Merging", https://arxiv.org/abs/2503.04834
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxmerge import arithmetic
from jaxmerge.strategies import Ask, Candidate, Float, Space, Steps, Strategy, Trial, golden, named, within, worth
from jaxmerge.tree import PyTree, merged_leaves
from jaxmerge.tune import LINE, Result, judge_line, search_merge


def exme_space(count: int, *, alpha: tuple[float, float] = (-0.5, 1.5), size: int | None = None) -> Space:
    r"""The coefficients of ExMe for `count` models: alpha_1 … alpha_n, and n − 1 betas in [0, 1] (`exme_weights`).

    Args:
      alpha: bounds of every α. size: makes each α a list of that length over depth.
    """
    if count < 1:
        raise ValueError(f"exme_space: count={count} models; wanted at least 1")
    alphas = {f"alpha_{i + 1}": Float(*alpha, size=size) for i in range(count)}
    names = ["beta"] if count == 2 else [f"beta_{i + 1}" for i in range(count - 1)]
    return Space(alphas | {name: Float(0.0, 1.0, start=1 / (count - i)) for i, name in enumerate(names)})


def exme_weights(betas: Sequence[Any]) -> list[Any]:
    r"""Split 1 into weights: $\lambda_i = \beta_i \prod_{j<i} (1 - \beta_j)$, and what is left for the last.

    Example:
      >>> exme_weights([0.5, 0.5]), exme_weights([])
      ([0.5, 0.25, 0.25], [1.0])
    """
    weights, rest = [], 1.0
    for beta in betas:
        weights.append(rest * beta)
        rest = rest * (1.0 - beta)
    return [*weights, rest]


def exme_merge(models: Sequence[PyTree], base: PyTree, *, stacked: Sequence[str] = ()) -> Callable[..., PyTree]:
    """`merge(**coefficients of exme_space)`: `extrapolation_merge` of these models from this base."""

    def merge(**coefficients: Any) -> PyTree:
        alphas = [coefficients[f"alpha_{i + 1}"] for i in range(len(models))]
        betas = [coefficients[name] for name in exme_space(len(models)).floats if name.startswith("beta")]
        return arithmetic.extrapolation_merge(
            models, base=base, stacked=stacked, alphas=alphas, weights=exme_weights(betas)
        )

    return merge


def exme_safe(space: Space) -> list[Candidate]:
    """The candidates that extrapolate nothing: each checkpoint by itself, and all of them with the first weights."""
    count = _count(space)
    blend = {name: f.start if name.startswith("beta") else 0.0 for name, f in space.floats.items()}
    return [_alone(space, i) for i in range(count)] + [blend] * (count > 1)


def _count(space: Space) -> int:
    return sum(name.startswith("alpha_") for name in space.floats)


def _alone(space: Space, i: int, alpha: float = 0.0) -> Candidate:
    """Checkpoint i by itself, α beyond it: every β before it 0, its own 1."""
    betas = [name for name in space.floats if name.startswith("beta")]
    weights = {name: float(j == i) if j <= i else space.floats[name].start for j, name in enumerate(betas)}
    return {f"alpha_{j + 1}": alpha if j == i else 0.0 for j in range(_count(space))} | weights


def staged(space: Space, *, along: Strategy = golden) -> Steps:
    """The paper's order: each α with its checkpoint alone, then the betas with the alphas kept; by `along`."""
    chosen = {name: f.start for name, f in space.floats.items()}
    stages = [([f"alpha_{i + 1}"], _alone(space, i)) for i in range(_count(space))]
    if betas := [name for name in space.floats if name.startswith("beta")]:
        stages.append((betas, {}))
    for names, held in stages:
        free = {d: (space.low[d], space.high[d]) for d, name in enumerate(space.names) if name in names}
        point = space.flatten(chosen | held | {name: chosen[name] for name in names})
        best = space.pack((yield from within(along, space, free, point, "staged")))
        chosen |= {name: best[name] for name in names}


def guarded(strategy: Strategy, *, questions: int | None = None, tolerance: float = 0.0) -> Strategy:
    """`strategy`, after a check of each checkpoint's line from the base: α ends at 0 where the score falls on it.

    See `judge_line` for `questions` and `tolerance`; what was found is in the notes.
    """

    def checked(space: Space):
        notes, floats = [], dict(space.floats)
        for i in range(_count(space)):
            # γ = 0 is the base on every line: asked for once.
            points = [space.flatten(_alone(space, i if g else 0, g - 1)) for g in LINE]
            verdict = judge_line(
                LINE, [worth(trial) for trial in (yield Ask("line", points))], questions=questions, tolerance=tolerance
            )
            name = f"alpha_{i + 1}"
            if verdict.holds:
                notes.append(f"checkpoint {i + 1}: {verdict.note}")
                continue
            notes.append(f"checkpoint {i + 1}: {verdict.note}; {name} was searched up to 0 only")
            f = floats[name]
            floats[name] = dataclasses.replace(f, high=0.0, start=min(f.start or 0.0, 0.0))
        return notes + ((yield from strategy(Space(floats))) or [])

    return checked


def search_exme(
    models: Sequence[PyTree],
    base: PyTree,
    evaluate: Callable[[PyTree], Any],
    *,
    space: Space | None = None,
    strategy: str | Strategy = staged,
    questions: int | None = None,
    tolerance: float = 0.0,
    trials: Sequence[Trial] = (),
    on_trial: Callable[[Trial], None] | None = None,
) -> Result:
    """Search ExMe of the best n checkpoints; `exme_merge(models, base)(**result.best)` is the merged model.

    First come the checkpoints by themselves and their plain merge: nothing worse is chosen. Then the lines from the
    base to each (`guarded`), then the strategy. Checkpoints on one line through the base are told in the notes.

    Args:
      models: the checkpoints, the best first, ranked on validation. One makes it ExPO.
      evaluate: params → score, higher is better, on validation data.
      space: by default `exme_space(len(models))`.
      strategy: `staged`, or any of STRATEGIES, all coefficients together.
      questions, tolerance: what counts as a fall, see `judge_line`.
      trials, on_trial: see `search_merge`.
    """
    space = exme_space(len(models)) if space is None else space
    if set(space.floats) != set(wanted := exme_space(len(models)).floats):
        raise KeyError(f"search_exme: space of {sorted(space.floats)}, wanted {sorted(wanted)}: see exme_space")
    for name, f in space.floats.items():
        if name.startswith("alpha_") and not f.low <= 0.0 <= f.high:
            raise ValueError(
                f"search_exme: {name} in ({f.low}, {f.high}); wanted bounds around 0, the checkpoint itself"
            )
    result = search_merge(
        exme_merge(models, base), evaluate, space,
        strategy=guarded(named(strategy), questions=questions, tolerance=tolerance),
        safe=exme_safe(space), trials=trials, on_trial=on_trial,
    )  # fmt: skip
    return dataclasses.replace(result, notes=_lines(models, base) + result.notes)


def _lines(models: Sequence[PyTree], base: PyTree) -> list[str]:
    trees = [merged_leaves(model) for model in (*models, base)]
    cosines = jax.jit(lambda models, base: arithmetic.collinear(models, base=base))(trees[:-1], trees[-1])
    return [
        f"the task vectors of checkpoints {i + 1} and {j + 1} have cosine {float(cosines[i, j]):.4f}: they lie on one "
        "line through the base, so merging these two is extrapolation by another name"
        for i, j in itertools.combinations(range(len(models)), 2)
        if abs(float(cosines[i, j])) > 0.999 or not float(cosines[i, i]) or not float(cosines[j, j])
    ]
