r"""Strategies of a coefficient search: which points of a space to measure next. `jaxmerge.tune` measures them.

A strategy is a generator function `strategy(space, **options)`: it yields an `Ask` of points, gets back one trial a
point, a dict with its "score" (higher is better; None: could not be judged), and may return notes. A point is the
flat tuple of all coefficients. Strategies are deterministic: the same trials give the same next points, so whoever
replays a journal of trials goes on where it ends.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxmerge import install

Point = tuple[float, ...]
Candidate = dict[str, Any]
Trial = dict[str, Any]


class Ask(NamedTuple):
    """What a strategy yields: points to measure, and the `kind` their trials are to carry."""

    kind: str
    points: list[Point]


Steps = Generator[Ask, list[Trial], list[str] | None]
"""A strategy at work: it asks for trials, is sent them, and returns notes."""
Strategy = Callable[..., Steps]


@dataclass(frozen=True)
class Float:
    """A coefficient in [low, high]; with `size` m a list of m, for a merge that takes a list over depth.

    `start` is where a search begins and what changes least; by default 0, or the bound nearest to it.
    """

    low: float
    high: float
    start: float | None = None
    size: int | None = None

    def __post_init__(self):
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ValueError(f"bounds ({self.low}, {self.high}); wanted two finite numbers, the lower one first")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size={self.size}; wanted at least 1, or None for a single number")
        start = min(max(0.0, self.low), self.high) if self.start is None else self.start
        if not self.low <= start <= self.high:
            raise ValueError(f"start={start} is outside the bounds ({self.low}, {self.high})")
        object.__setattr__(self, "start", float(start))


class Space:
    """Named coefficients with bounds: `Space({"alpha": (-0.5, 1.5), "t": Float(0, 1, start=0.5, size=4)})`."""

    def __init__(self, coefficients: Mapping[str, Float | tuple[float, float]] | Space):
        given = coefficients.floats if isinstance(coefficients, Space) else coefficients
        if not given:
            raise ValueError('the space is empty; wanted coefficients with bounds, as {"alpha": (0.0, 1.0)}')
        self.floats = {name: f if isinstance(f, Float) else Float(*f) for name, f in given.items()}
        each = [(name, f) for name, f in self.floats.items() for _ in range(f.size or 1)]
        self.names = tuple(name for name, _ in each)
        self.low: Point = tuple(float(f.low) for _, f in each)
        self.high: Point = tuple(float(f.high) for _, f in each)
        self.start: Point = tuple(float(f.start or 0.0) for _, f in each)
        self.widths: Point = tuple(b - a for a, b in zip(self.low, self.high, strict=True))

    def pack(self, point: Point) -> Candidate:
        """Name the entries of a point: {name: number, or list}."""
        entries = iter(float(x) for x in point)
        return {n: next(entries) if f.size is None else [next(entries) for _ in range(f.size)]
                for n, f in self.floats.items()}  # fmt: skip

    def flatten(self, candidate: Mapping[str, Any]) -> Point:
        """The inverse of `pack`; a number stands for a list of that number."""
        if set(candidate) != set(self.floats):
            raise KeyError(f"coefficients {sorted(candidate)}, wanted exactly {sorted(self.floats)}")
        point: list[float] = []
        for name, f in self.floats.items():
            value = np.asarray(candidate[name], np.float64)
            if value.shape not in ((), (f.size,)):
                raise ValueError(f"coefficient {name} has shape {value.shape}, wanted () or {(f.size or 1,)}")
            point += np.broadcast_to(value, (f.size or 1,)).tolist()
        return tuple(point)

    def contains(self, point: Point) -> bool:
        return all(a <= x <= b for a, x, b in zip(self.low, point, self.high, strict=True))

    def change(self, point: Point) -> float:
        """Distance from the start, in units of each coefficient's range."""
        return math.dist(*(self.to_unit(p) for p in (point, self.start)))

    def to_unit(self, point: Point) -> Point:
        return tuple((x - a) / (w or 1.0) for x, a, w in zip(point, self.low, self.widths, strict=True))

    def from_unit(self, unit: Iterable[float]) -> Point:
        inside = (min(max(float(u), 0.0), 1.0) for u in unit)
        return tuple(min(a + u * w, b) for u, a, w, b in zip(inside, self.low, self.widths, self.high, strict=True))


def gradient_in(space: Space, trial: Trial, strategy: str) -> np.ndarray | None:
    """The gradient of a trial in the shares of the ranges; None where it or the score is not finite."""
    if "gradient" not in trial:
        raise ValueError(f"strategy {strategy!r}: a trial without gradient; wanted descend(merge, loss, space)")
    found = np.array(space.flatten(trial["gradient"])) * space.widths
    return None if trial["score"] is None or not np.isfinite(found).all() else found


def worth(trial: Trial) -> float:
    """The score, −∞ for a candidate that could not be judged."""
    return -math.inf if trial["score"] is None else trial["score"]


def listed(space: Space, *, points: Sequence[Point], kind: str = "listed") -> Steps:
    """Measure just these points."""
    yield Ask(kind, [tuple(float(x) for x in point) for point in points])


def grid(space: Space, *, points: int | Mapping[str, Sequence[float]] = 5) -> Steps:
    """Measure every combination of `points` values a coefficient, ends included, or of {name: values}."""
    if isinstance(points, Mapping):
        if set(points) != set(space.names):
            raise KeyError(f"grid: points for {sorted(points)}, wanted exactly {sorted(set(space.names))}")
        axes = [[float(x) for x in points[name]] for name in space.names]
    elif points < 2:
        raise ValueError(f"grid: points={points}; wanted at least 2 values a coefficient")
    else:
        shares = [i / (points - 1) for i in range(points)]
        axes = [[min(a + s * w, b) for s in shares]
                for a, w, b in zip(space.low, space.widths, space.high, strict=True)]  # fmt: skip
    if (count := math.prod(map(len, axes))) > 4096:
        raise ValueError(f"grid: {count} candidates; wanted at most 4096: fewer points, or strategy='coordinate'")
    candidates = list(itertools.product(*axes))
    if outside := [point for point in candidates if not space.contains(point)]:
        raise ValueError(f"grid: {space.pack(outside[0])} is outside the bounds {space.floats}")
    yield Ask("grid", candidates)


def coordinate(
    space: Space, *, points: int = 5, rounds: int = 1, shrink: float = 0.5, along: Strategy | None = None
) -> Steps:
    """One coefficient after the other, in the space's order, the others kept: `points` values each.

    Each further round looks at `shrink` times the range of the one before, around the best so far.
    """
    point = space.start
    for r in range(rounds):
        for d in range(len(point)):
            reach = 0.5 * space.widths[d] * shrink**r if r else math.inf
            low, high = max(space.low[d], point[d] - reach), min(space.high[d], point[d] + reach)
            line = along or functools.partial(grid, points=points)
            point = yield from within(line, space, {d: (low, high)}, point, "golden" if along else "coordinate")


def golden(space: Space, *, tolerance: float = 0.05, rounds: int = 1) -> Steps:
    """Golden section, coefficient after coefficient, until a bracket is `tolerance` of its range.

    Right where the score rises to one peak and falls; on a plateau it keeps to the side nearer the start.
    """
    line = functools.partial(_section, tolerance=tolerance)
    yield from coordinate(space, rounds=rounds, shrink=1.0, along=line)


def _section(space: Space, *, tolerance: float):
    if not 0 < tolerance < 1:
        raise ValueError(f"golden: tolerance={tolerance}; wanted a share of the range, in (0, 1)")
    (a,), (b,), (start,), (width,) = space.low, space.high, space.start, space.widths
    ratio = (math.sqrt(5) - 1) / 2
    x, y = b - ratio * (b - a), a + ratio * (b - a)
    at_x, at_y = map(worth, (yield Ask("golden", [(x,), (y,)])))
    while b - a > tolerance * width:
        if at_x > at_y or (at_x == at_y and abs(x - start) <= abs(y - start)):
            b, y, at_y = y, x, at_x
            x = b - ratio * (b - a)
            (at_x,) = map(worth, (yield Ask("golden", [(x,)])))
        else:
            a, x, at_x = x, y, at_y
            y = a + ratio * (b - a)
            (at_y,) = map(worth, (yield Ask("golden", [(y,)])))


def within(
    strategy: Strategy, space: Space, free: Mapping[int, tuple[float, float]], point: Point, kind: str
) -> Generator[Ask, list[Trial], Point]:
    """Run `strategy` over some dimensions {d: bounds}, the others held at `point`; return the best point."""
    inner = strategy(Space({str(d): Float(*bounds, start=point[d]) for d, bounds in free.items()}))
    known: dict[Point, Trial] = {}

    def whole(part: Point) -> Point:
        entries = dict(zip(free, part, strict=True))
        return tuple(entries.get(d, x) for d, x in enumerate(point))

    (known[point],) = yield Ask(kind, [point])  # so that the result is never worse
    try:
        asked = next(inner)
        while True:
            points = [whole(part) for part in asked.points]
            trials = yield Ask(kind, points)
            known.update(zip(points, trials, strict=True))
            asked = inner.send(trials)
    except StopIteration:
        return max(known, key=lambda p: (worth(known[p]), -space.change(p)))


def cma_es(
    space: Space, *, seed: int = 0, generations: int = 10, population: int | None = None, sigma: float = 0.3
) -> Steps:
    """CMA-ES, by the library cmaes; `sigma`, its first step, is a share of each coefficient's range."""
    try:
        from cmaes import CMA  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError:
        raise ImportError(
            f"strategy 'cma_es' needs the package cmaes, which is not here: {install.extra('search')}"
        ) from None
    d = len(space.start)
    mean, cube = np.array(space.to_unit(space.start)), np.array([[0.0, 1.0]] * d)
    optimizer = CMA(mean=mean, sigma=sigma, bounds=cube, seed=seed, population_size=population)
    for _ in range(generations):
        units = [optimizer.ask() for _ in range(optimizer.population_size)]
        scores = [worth(trial) for trial in (yield Ask("cma_es", [space.from_unit(unit) for unit in units]))]
        # The library takes differences of losses: what could not be judged is finite, and the worst.
        worst = min((score for score in scores if score > -math.inf), default=0.0) - 1.0
        optimizer.tell([(unit, -max(score, worst)) for unit, score in zip(units, scores, strict=True)])
        if optimizer.should_stop():
            return


def gradient(space: Space, *, steps: int = 50, rate: float = 0.1) -> Steps:
    """Climb the gradient by Adam, projected onto the bounds; for `descend`, whose trials carry a "gradient".

    With every range scaled to 1 and g the gradient there: u ← clip(u + r·m̂/√v̂, 0, 1), r from `rate` to 0 on a cosine.
    The memories are short, 0.5 and 0.95: the loss is the same validation data at every step, so there is no noise to
    average, and few coefficients.
    """
    unit, m, v = np.array(space.to_unit(space.start)), 0.0, 0.0
    for k in range(steps):
        (trial,) = yield Ask("gradient", [space.from_unit(unit)])
        if (g := gradient_in(space, trial, "gradient")) is None:
            return [f"gradient: step {k} at {trial['coefficients']} is not finite, and the search ends there"]
        m, v = 0.5 * m + 0.5 * g, 0.95 * v + 0.05 * g * g
        step = m / (1 - 0.5 ** (k + 1)) / (np.sqrt(v / (1 - 0.95 ** (k + 1))) + 1e-12)
        unit = np.clip(unit + 0.5 * rate * (1 + math.cos(math.pi * k / steps)) * step, 0.0, 1.0)
    return None


def frank_wolfe(space: Space, *, steps: int = 20, rate: float = 1.0) -> Steps:
    r"""Go a part of the way to the one model that helps most, again and again (Frank-Wolfe merging); for `descend`.

    The coefficients are weights of models, and u, their shares of the ranges, a mix: $u_i \ge 0$, $\sum_i u_i \le 1$.
    With g the gradient in u, v has all on the largest $g_i$, or nothing where none is positive (the base); then
    $u \leftarrow u + \frac{2r}{k+2}(v - u)$ with r `rate`. Where the score is concave, no mix gains more than
    $\langle g, v - u\rangle$, which the last note says. Lists over depth are a mix for each entry. A start beyond the
    mixes is shortened to one. (fusion-bench chooses by the sum of the tensors' cosines in place of g, and takes
    `rate` 0.1.)

    References:
      Chen et al., "FW-Merging", https://arxiv.org/abs/2503.12649
    """
    entries = [i if f.size else None for f in space.floats.values() for i in range(f.size or 1)]
    groups = [np.array([entry == of for entry in entries]) for of in dict.fromkeys(entries)]
    unit, best, bound = np.array(space.to_unit(space.start)), -math.inf, math.inf
    for group in groups:
        unit[group] /= max(1.0, unit[group].sum())
    for k in range(steps):
        (trial,) = yield Ask("frank_wolfe", [space.from_unit(unit)])
        if (g := gradient_in(space, trial, "frank_wolfe")) is None:
            return [f"frank_wolfe: step {k} at {trial['coefficients']} is not finite, and the search ends there"]
        corner = np.zeros_like(unit)
        for group in groups:
            chosen = np.flatnonzero(group)[np.argmax(g[group])]
            corner[chosen] = float(g[chosen] > 0)
        gap = float(g @ (corner - unit))
        best, bound = max(best, trial["score"]), min(bound, trial["score"] + gap)
        if gap <= 0:
            break
        unit = unit + min(1.0, 2 * rate / (k + 2)) * (corner - unit)
    return [f"frank_wolfe: if the score is concave in the weights, no mix gains more than {bound - best:.3g}"]


STRATEGIES: dict[str, Strategy] = {
    "grid": grid,
    "coordinate": coordinate,
    "golden": golden,
    "cma_es": cma_es,
    "gradient": gradient,
    "frank_wolfe": frank_wolfe,
}
CLIMBING = ("gradient", "frank_wolfe")
"""Strategies whose trials need a "gradient"."""


def named(strategy: str | Strategy) -> Strategy:
    """Return the strategy of that name; a strategy is returned as it is."""
    if not isinstance(strategy, str):
        return strategy
    if strategy not in STRATEGIES:
        raise KeyError(f"no strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
    return STRATEGIES[strategy]
