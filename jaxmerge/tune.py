r"""Coefficient search: which α, β, … of a merge score best, every candidate made by one compiled program.

    merge = functools.partial(jaxmerge.extrapolate, [tuned], base=base)
    result = search_merge(merge, accuracy, {"alpha": (-0.5, 1.5)}, strategy="golden", safe=[{"alpha": 0.0}])

A search is a function of (space, strategy, safe, trials so far): give it the trials of a journal and it goes on as if
never interrupted, measuring nothing twice. A trial is a dict that survives JSON:

    {"number": 0, "kind": "golden", "coefficients": {"alpha": 0.26}, "score": 0.41, "seconds": 2.0}

`score` is None where the candidate could not be judged (None, NaN or infinite from `evaluate`): never chosen. `kind`
says who asked: a strategy, "safe" (merges that extrapolate nothing) or "line" (the check of `monotone`). Higher is
better; a tie goes to a safe candidate, then to the smaller change, then to the earlier. `evaluate` is all that a
search sees: give it validation data, and keep the test for `result.best`, once.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import eval_jaxpr

from jaxmerge.strategies import Ask, Candidate, Float, Point, Space, Strategy, Trial, listed, named, worth
from jaxmerge.tree import PyTree, is_array


@dataclass(frozen=True)
class Result:
    """The chosen coefficients and their score, every trial, what the search cost, and what is to be said of it."""

    best: Candidate
    score: float
    trials: list[Trial]
    evaluations: int
    seconds: float
    notes: list[str]


class Search:
    """A search under way, for callers who measure by themselves: take `candidates`, `tell`, until there are none.

    Args:
      strategy: a name of STRATEGIES, or a strategy: `functools.partial(grid, points=9)`.
      safe: candidates that extrapolate nothing, measured first; the choice is never worse than the best of them.
      trials: of the same search, from its journal: they are taken as told.
    """

    def __init__(
        self,
        space: Any,
        strategy: str | Strategy,
        *,
        safe: Sequence[Candidate] = (),
        trials: Sequence[Trial] = (),
    ):
        self.space = Space(space)
        self.trials: list[Trial] = []
        self.notes: list[str] = []
        self._known: dict[Point, Trial] = {}
        self._generator = self._all(named(strategy), safe)
        self._asked: Ask | None = next(self._generator)
        self._advance()
        for trial in trials:
            self.tell(trial["score"], trial["seconds"], recorded=trial)

    def _all(self, strategy: Strategy, safe: Sequence[Candidate]):
        yield Ask("safe", [self.space.flatten(candidate) for candidate in safe])
        self.notes += (yield from strategy(self.space)) or []

    def _new(self) -> list[Point]:
        points = self._asked.points if self._asked else []
        return [point for point in dict.fromkeys(points) if point not in self._known]

    def _advance(self) -> None:
        while self._asked is not None and not self._new():
            try:
                self._asked = self._generator.send([self._known[point] for point in self._asked.points])
            except StopIteration:
                self._asked = None

    @property
    def candidates(self) -> list[Candidate]:
        """The coefficients to measure now, to be told in this order; none when the search is over."""
        return [self.space.pack(point) for point in self._new()]

    def tell(
        self, score: Any, seconds: float, *, gradient: Candidate | None = None, recorded: Trial | None = None
    ) -> Trial:
        """Enter the measurement of `candidates[0]`, higher is better; return its trial. `recorded`: of a journal."""
        number, new = len(self.trials), self._new()
        if recorded is not None:
            found = self.space.flatten(recorded["coefficients"])
            if not new or not np.allclose(self.space.to_unit(found), self.space.to_unit(new[0]), rtol=0, atol=1e-6):
                wanted = f"asks for {self.space.pack(new[0])} there" if new else "was over before"
                raise ValueError(
                    f"trial {number} of the journal is {recorded['coefficients']}, but this search {wanted}: it was "
                    "written with another space, strategy, option or seed; take those, or begin a new journal"
                )
        if not new or self._asked is None:
            raise ValueError("the search is over, there is nothing to tell: `candidates` is empty")
        score = None if score is None or not math.isfinite(score) else float(score)
        trial = {"number": number, "kind": self._asked.kind, "coefficients": self.space.pack(new[0])}
        trial |= {"score": score, "seconds": float(seconds)} | ({} if gradient is None else {"gradient": gradient})
        self._known[new[0]] = trial = recorded | {"number": number} if recorded is not None else trial
        self.trials.append(trial)
        self._advance()
        return trial

    def result(self) -> Result:
        """The best so far; a candidate that merely equals the best safe one is not chosen."""

        def order(entry: tuple[Point, Trial]):
            return worth(entry[1]), entry[1]["kind"] == "safe", -self.space.change(entry[0]), -entry[1]["number"]

        judged = [(point, trial) for point, trial in self._known.items() if trial["score"] is not None]
        safe = [entry for entry in judged if entry[1]["kind"] == "safe"]
        free = [entry for entry in judged if entry[1]["kind"] != "safe" and self.space.contains(entry[0])]
        if not safe and not free:
            raise ValueError(f"none of {len(self.trials)} candidates has a score; see that evaluate returns a number")
        best, notes = max(safe + free, key=order)[1], list(self.notes)
        if safe and free and best["kind"] == "safe":
            other = max(free, key=order)[1]
            verb = "hurts" if worth(other) < worth(best) else "gains nothing"
            notes.append(
                f"not chosen: the best searched candidate {other['coefficients']} {verb}, score {worth(other):.6g} "
                f"against {worth(best):.6g} of the safe {best['coefficients']}"
            )
        if lost := len(self.trials) - len(judged):
            notes.append(f"{lost} of {len(self.trials)} candidates could not be judged and count as the worst")
        seconds = sum(trial["seconds"] for trial in self.trials)
        return Result(best["coefficients"], worth(best), list(self.trials), len(self.trials), seconds, notes)


class Compiled:
    """`merge(**coefficients)` as one compiled program for all coefficients of a space.

    It is traced once, with the coefficients as float32 arguments; every array that `merge` closes over (models, base)
    becomes an argument too, where `jax.jit` alone would write it into the program as a constant. So a candidate costs
    no compilation, and memory holds the models and the candidates somebody still refers to: `search_merge` lets go of
    each before it makes the next. Leaves that are no arrays are handed through. Arrays must be on their devices
    (`jaxmerge.onload`).
    """

    def __init__(self, merge: Callable[..., PyTree], space: Any):
        self.merge, self.space = merge, Space(space)
        self._run: Callable[..., Any] | None = None
        self._held: list[jax.Array] = []

    def __call__(self, **coefficients: Any) -> PyTree:
        named = self.space.pack(self.space.flatten(coefficients))
        dtype = np.float64 if jax.config.jax_enable_x64 else np.float32  # type: ignore[attr-defined]
        arguments = {name: np.asarray(value, dtype) for name, value in named.items()}
        run = self._run = self._run or self._trace(arguments)
        return run(arguments)

    def _trace(self, arguments: dict[str, np.ndarray]) -> Callable[[dict[str, np.ndarray]], PyTree]:
        leaves: list[Any] = []
        treedef: Any = None

        def arrays(arguments):
            nonlocal leaves, treedef
            leaves, treedef = jax.tree.flatten(self.merge(**arguments))
            found = [leaf for leaf in leaves if is_array(leaf)]
            leaves = [None if is_array(leaf) else leaf for leaf in leaves]
            return found

        closed = jax.make_jaxpr(arrays)(arguments)
        program = jax.jit(lambda constants, flat: eval_jaxpr(closed.jaxpr, constants, *flat))
        # Models kept as NumPy arrays are brought to the device here, not once a candidate.
        self._held = [c if isinstance(c, jax.Array) else jax.device_put(c) for c in closed.consts]

        def run(arguments):
            made = iter(program(self._held, jax.tree.leaves(arguments)))
            return jax.tree.unflatten(treedef, [next(made) if leaf is None else leaf for leaf in leaves])

        return run


def search_merge(
    merge: Callable[..., PyTree],
    evaluate: Callable[[PyTree], Any],
    space: Any,
    *,
    strategy: str | Strategy = "coordinate",
    safe: Sequence[Candidate] = (),
    trials: Sequence[Trial] = (),
    on_trial: Callable[[Trial], None] | None = None,
) -> Result:
    """Search the coefficients of `merge` that score best: `evaluate(merge(**coefficients))` is a number or None.

    Args:
      merge: `merge(**coefficients) -> params`, traceable; or a `Compiled`, to share its program.
      evaluate: params → score, higher is better, on validation data.
      space: {name: (low, high) or Float}.
      strategy: a name of STRATEGIES, or `functools.partial(golden, tolerance=0.02)`.
      safe: see `Search`. For ExPO [{"alpha": 0.0}].
      trials: of this search, from its journal; they are not measured again.
      on_trial: called with every new trial, as soon as it is measured: where a journal writes.

    Example:
      >>> merge = lambda alpha: {"w": 1.0 + alpha * (1.0 - 0.0)}
      >>> search_merge(merge, lambda params: -abs(params["w"] - 1.5), {"alpha": (0.0, 1.0)}, strategy="grid").best
      {'alpha': 0.5}
    """
    program = merge if isinstance(merge, Compiled) else Compiled(merge, space)

    def judge(candidate: Candidate) -> dict[str, Any]:
        return {"score": _number(evaluate(program(**candidate)))}

    return _drive(Search(space, strategy, safe=safe, trials=trials), judge, on_trial)


def descend(
    merge: Callable[..., PyTree],
    loss: Callable[[PyTree], Any],
    space: Any,
    *,
    strategy: str | Strategy = "gradient",
    safe: Sequence[Candidate] = (),
    trials: Sequence[Trial] = (),
    on_trial: Callable[[Trial], None] | None = None,
) -> Result:
    r"""Search by $\partial L(\mathrm{merge}(c)) / \partial c$, `jax.grad` through merge and loss, one program.

    Scores are −loss; trials carry the "gradient" of the score. Memory holds the models, a candidate, and its gradient.

    Args:
      merge, space, safe, trials, on_trial: as in `search_merge`.
      loss: params → scalar, differentiable, on validation data. The arrays it closes over become arguments.
      strategy: a name of STRATEGIES whose trials use the gradient, or such a strategy.
    """
    inner = merge.merge if isinstance(merge, Compiled) else merge
    program = Compiled(lambda **c: jax.value_and_grad(lambda c: loss(inner(**c)))(c), space)

    def judge(candidate: Candidate) -> dict[str, Any]:
        value, slope = jax.device_get(program(**candidate))
        return {"score": -_number(value), "gradient": {name: (-g).tolist() for name, g in slope.items()}}

    return _drive(Search(space, strategy, safe=safe, trials=trials), judge, on_trial)


def _drive(search: Search, judge: Callable[[Candidate], dict[str, Any]], on_trial) -> Result:
    while candidates := search.candidates:
        start = time.perf_counter()
        measured = judge(candidates[0])
        trial = search.tell(seconds=time.perf_counter() - start, **measured)
        if on_trial is not None:
            on_trial(trial)
    return search.result()


def _number(score: Any) -> Any:
    if score is None:
        return None
    if np.ndim(score) != 0:
        raise TypeError(f"evaluate returned an array of shape {np.shape(score)}; wanted one number, or None")
    return float(score)


@dataclass(frozen=True)
class Monotone:
    """Whether a score never falls along a line by more than noise, and the numbers behind it."""

    holds: bool
    points: tuple[float, ...]
    scores: tuple[float, ...]
    note: str


LINE = (0.0, 0.25, 0.5, 0.75, 1.0)


def judge_line(
    points: Sequence[float], scores: Sequence[float], *, questions: int | None = None, tolerance: float = 0.0
) -> Monotone:
    r"""Say whether scores never fall: $s_j \ge s_i - \epsilon_{ij}$ for all i < j, not of neighbours alone.

    ε is `tolerance`; or with `questions` n, for accuracies, 1.64 standard errors of the difference of two binomials,
    $1.64 \sqrt{(p_i(1-p_i) + p_j(1-p_j)) / n}$ with p = (n s + 1) / (n + 2): a fall that equal models show in one
    case of twenty is no evidence. The same questions at every point make the true error smaller: ε is generous.
    """
    if questions is not None and not all(0 <= s <= 1 for s in scores if math.isfinite(s)):
        raise ValueError(f"scores {list(scores)} with questions={questions}; wanted accuracies in [0, 1]")

    def error(s: float) -> float:
        p = (questions * max(s, 0.0) + 1) / (questions + 2) if questions else 0.0
        return p * (1 - p) / questions if questions else 0.0

    falls = [
        (scores[i] - scores[j] - epsilon, epsilon, i, j)
        for j in range(len(scores))
        for i in range(j)
        for epsilon in [1.64 * math.sqrt(error(scores[i]) + error(scores[j])) if questions else tolerance]
        if scores[i] > -math.inf
    ]
    excess, epsilon, i, j = max(falls, default=(0.0, tolerance, 0, 0))
    shown = ", ".join(f"{g:g}: {s:.4g}" for g, s in zip(points, scores, strict=True))
    if excess <= 0:
        fall = max((excess + epsilon for excess, epsilon, *_ in falls), default=0.0)
        how = "is monotone" if fall <= 1e-12 else f"falls by {fall:.2g} at most, no more than is allowed for,"
        note = f"the score {how} along the line ({shown})"
    else:
        note = (
            f"the score falls from {scores[i]:.4g} at {points[i]:g} to {scores[j]:.4g} at {points[j]:g}, more than "
            f"{epsilon:.2g}, along the line ({shown}): going beyond 1 is not to be trusted"
        )
    return Monotone(excess <= 0, tuple(points), tuple(scores), note)


def monotone(
    merge: Callable[..., PyTree],
    evaluate: Callable[[PyTree], Any],
    line: Callable[[float], Candidate],
    *,
    points: Sequence[float] = LINE,
    questions: int | None = None,
    tolerance: float = 0.0,
    trials: Sequence[Trial] = (),
    on_trial: Callable[[Trial], None] | None = None,
) -> Monotone:
    """Check that interpolation from the base to the tuned model never hurts, before extrapolation is trusted.

    Args:
      merge, evaluate, trials, on_trial: as in `search_merge`; a `Compiled` shares its program with the search, whose
        bounds need not hold the line.
      line: γ → coefficients; for ExPO `lambda g: {"alpha": g - 1}`: γ = 0 is the base, 1 the tuned model.
      questions, tolerance: see `judge_line`.
    """
    ends = [line(g) for g in points]
    # The line's own bounds: those of a `Compiled` are of its search, which may begin beyond the line.
    sizes = {name: f.size for name, f in merge.space.floats.items()} if isinstance(merge, Compiled) else {}
    at = {name: [end[name] for end in ends] for name in ends[0]}
    space = Space({name: Float(np.min(x), np.max(x), size=sizes.get(name)) for name, x in at.items()})
    on_line = [space.flatten(end) for end in ends]
    found = search_merge(
        merge if isinstance(merge, Compiled) else Compiled(merge, space), evaluate, space,
        strategy=functools.partial(listed, points=on_line, kind="line"), trials=trials, on_trial=on_trial,
    )  # fmt: skip
    known = {space.flatten(trial["coefficients"]): worth(trial) for trial in found.trials}
    return judge_line(points, [known[p] for p in on_line], questions=questions, tolerance=tolerance)
