r"""What is told of a tensor that is compared with what a merge should have made of it.

With r the reference (the base, else the first model), w what is wanted and g what is found, the strength is the
least-squares c of g − r ≈ c·(w − r):

    right            ‖g − w‖ is no more than rounding
    not applied      g is r
    wrong strength   g − r is c·(w − r), but for rounding, and c is not 1
    transposed       g is wᵀ, or g − r is (w − r)ᵀ
    different        none of these
    missing          no tensor of that name; another name that it may have gone to is given
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge.files.documents import some
from jaxmerge.files.engine import is_float

RIGHT, WRONG, UNSURE, UNREADABLE = 0, 1, 2, 3  # exit codes
RUN, RUNS = 4096, 16  # elements of a run, runs of a tensor
ROUNDED = 4.0  # times the rounding of the result's dtype
CLOSE = 1e-3  # share of the change that may be the arithmetic's
SAME = 0.05  # how far from 1 a strength is another one
Triple = tuple[np.ndarray, np.ndarray, np.ndarray]
"""What is found, what is wanted, and the reference: of one tensor, or of a run of its elements."""


class Unsure(ValueError):
    """What a folder was made of is not known, or is no longer there."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a tensor. strength: c, where it can be told. error: ‖g − w‖/‖w − r‖. detail: what to look at."""

    tensor: str
    verdict: str
    strength: float | None = None
    error: float | None = None
    detail: str = ""


def judge(
    name: str, shape: Sequence[int], dtype: np.dtype, triples: Iterable[Triple], whole: Callable[[], Triple]
) -> Verdict:
    """Judge a tensor of the right shape by runs of its elements; `whole` is called where it may be transposed."""
    sums = Sums()
    for triple in triples:
        sums.add(*triple)
    verdict, strength = sums.verdict(dtype)
    if verdict == "different" and len(shape) == 2 and shape[0] == shape[1]:
        got, wanted, reference = (np.asarray(a).astype(np.float64) for a in whole())
        for turned in (wanted.T, reference + (wanted - reference).T):  # all of it, or the change alone
            other = Sums()
            other.add(got, turned, reference)
            if other.is_right(dtype):
                return Verdict(name, "transposed", error=sums.error)
    return Verdict(name, verdict, strength, sums.error)


def judge_shape(
    name: str, found: Sequence[int], wanted: Sequence[int], dtype: np.dtype, whole: Callable[[], Triple]
) -> Verdict:
    """Judge a tensor of another shape than is wanted: it may be the transpose."""
    if len(wanted) != 2 or tuple(found) != tuple(wanted[::-1]):
        return Verdict(name, "different", detail=f"shape {list(found)}, wanted {list(wanted)}")
    sums = Sums()
    got, right, reference = whole()
    sums.add(got.T, right, reference)
    return Verdict(name, "transposed" if sums.is_right(dtype) else "different", error=sums.error)


def elsewhere(name: str, shape: Sequence[int], tensors: Mapping[str, Any]) -> str:
    """Name a tensor that ends alike: the same module, with other words in front."""
    end = ".".join(name.split(".")[-4:])
    alike = [other for other in tensors if other.endswith(end) and tuple(tensors[other].shape) == tuple(shape)]
    return f"the folder has {alike[0]} instead" if alike else "nothing in the folder has a name like it"


def runs(count: int, everything: bool) -> Iterator[tuple[int, int]]:
    """First element and count of each run: all of a small tensor, of a large one as many runs from end to end."""
    if everything or count <= RUN * RUNS:
        yield from ((start, min(RUN, count - start)) for start in range(0, count, RUN))
        return
    yield from ((round(i * (count - RUN) / (RUNS - 1)), RUN) for i in range(RUNS))


def summarise(out: str, verdicts: Sequence[Verdict], skipped: Sequence[str], extra: Sequence[str]) -> dict[str, Any]:
    """Return a report: the verdicts counted, those that are not right, and the exit code."""
    counts: dict[str, int] = {}
    for verdict in verdicts:
        counts[verdict.verdict] = counts.get(verdict.verdict, 0) + 1
    wrong = [verdict for verdict in verdicts if verdict.verdict != "right"]
    code = WRONG if wrong or extra else UNSURE if skipped else RIGHT
    return {"out": out, "tensors": counts, "wrong": wrong, "skipped": skipped, "extra": extra, "code": code}


class Sums:
    """Squares and products of what is compared, over all runs of a tensor."""

    def __init__(self) -> None:
        self.off = self.moved = self.change = self.along = self.size = 0.0

    def add(self, got: np.ndarray, wanted: np.ndarray, reference: np.ndarray) -> None:
        g, w, r = (np.asarray(array).astype(np.float64).reshape(-1) for array in (got, wanted, reference))
        self.off += float(np.sum((g - w) ** 2))
        self.moved += float(np.sum((g - r) ** 2))
        self.change += float(np.sum((w - r) ** 2))
        self.along += float(np.sum((g - r) * (w - r)))
        self.size += float(np.sum(w**2))

    @property
    def error(self) -> float | None:
        return math.sqrt(self.off / self.change) if self.change else None

    def _allowed(self, dtype: np.dtype) -> float:
        """The largest ‖g − w‖ that is rounding: of the result's dtype, and of another order of sums."""
        ulp = float(jax.numpy.finfo(dtype).eps) if is_float(dtype) else 0.0
        return ROUNDED * ulp * math.sqrt(self.size) + CLOSE * math.sqrt(self.change)

    def is_right(self, dtype: np.dtype) -> bool:
        return math.sqrt(self.off) <= self._allowed(dtype)

    def verdict(self, dtype: np.dtype) -> tuple[str, float | None]:
        allowed = self._allowed(dtype)
        strength = self.along / self.change if self.change else None
        noticeable = math.sqrt(self.change) > 4 * allowed
        if noticeable and math.sqrt(self.moved) <= allowed:
            return "not applied", 0.0
        if math.sqrt(self.off) <= allowed:
            return "right", strength
        # What is left of g − r beyond its part along w − r.
        across = math.sqrt(max(self.moved - self.along**2 / self.change, 0.0)) if self.change else math.inf
        if noticeable and strength is not None and across <= allowed and abs(strength - 1) > SAME:
            return "wrong strength", strength
        return "different", strength


def table(report: Mapping[str, Any]) -> str:
    """Write a report for a terminal: the counts, and a line for each tensor that is not right."""
    counts = ", ".join(f"{count} {name}" for name, count in report["tensors"].items()) or "no tensor compared"
    lines = [f"{report['out']}: {counts}"]
    for verdict in report["wrong"]:
        facts = [verdict.detail] if verdict.detail else []
        if verdict.verdict == "wrong strength":
            facts.append(f"strength {verdict.strength:.3g}")
        if verdict.error is not None:
            facts.append(f"off by {verdict.error:.3g} of the change")
        lines.append(f"  {verdict.verdict}: {verdict.tensor}" + (f" ({'; '.join(facts)})" if facts else ""))
    for name, tensors in (
        ("not in the recipe", report["extra"]),
        ("not replayed (too large, or random elsewhere)", report["skipped"]),
    ):
        lines += [f"  {name}: {some(tensors, 4)}"] if tensors else []
    return "\n".join(lines)


def as_json(report: Mapping[str, Any]) -> str:
    """Write a report as JSON."""
    return json.dumps(report, indent=1, default=dataclasses.asdict)
