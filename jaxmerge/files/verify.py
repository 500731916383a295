r"""Say of a folder, tensor by tensor, whether it is what its recipe makes: `jaxmerge verify OUT`.

The recipe is replayed on a sample: of a rule that works element by element on runs of elements, of another on whole
tensors, the largest of them left out unless all are asked for. With r the reference (the base, else the first model),
w what the recipe gives and g what the folder has, the strength is the least-squares c of g − r ≈ c·(w − r):

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
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxmerge.files import engine, recipe
from jaxmerge.files import plan as planning
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import Source, Tensor, read
from jaxmerge.files.documents import parse_yaml, read_json, some
from jaxmerge.files.plan import Job
from jaxmerge.rules import RULES

RIGHT, WRONG, UNSURE, UNREADABLE = 0, 1, 2, 3  # exit codes
RUN, RUNS = 4096, 16  # elements of a run, runs of a tensor
WHOLE = 1 << 26  # elements of a tensor that is replayed whole unless all are asked for
ROUNDED = 4.0  # times the rounding of the result's dtype
CLOSE = 1e-3  # share of the change that may be the arithmetic's
SAME = 0.05  # how far from 1 a strength is another one
Progress = Callable[[int, int, str], None]


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


def verify(
    out: str | pathlib.Path,
    *,
    of: str | pathlib.Path | None = None,
    everything: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a folder with what its recipe makes of its inputs.

    Args:
      out: a folder of weights.
      of: a recipe, or a model string `base+adapter`; by default the recipe in `out`: merge.json's, or
        mergekit_config.yml.
      everything: replay every element of every tensor.
      progress: called with tensors done, tensors in all and a tensor's name.

    Returns:
      {"out", "tensors": {verdict: count}, "wrong": [Verdict, …], "skipped", "extra", "code"}; code is 0 where all is
      right, 1 where something is not, 2 where tensors had to be left out and the rest is right.

    Raises:
      Unsure: there is no recipe, or its inputs are not there.
      ValueError: `out` cannot be read.
    """
    folder = pathlib.Path(out)
    made = open_source(str(folder))
    jobs, seed, is_ours = _replayable(folder, of)
    verdicts: list[Verdict] = []
    skipped: list[str] = []
    for i, job in enumerate(jobs):
        if progress is not None:
            progress(i + 1, len(jobs), job.name)
        large = math.prod(job.shape) > WHOLE and not _is_sampled(job)
        if (large and not everything) or (not is_ours and RULES[job.method.rule].needs.key != "none"):
            skipped.append(job.name)
        else:
            verdicts.append(_judge(job, made, seed, everything))
    counts: dict[str, int] = {}
    for verdict in verdicts:
        counts[verdict.verdict] = counts.get(verdict.verdict, 0) + 1
    wrong = [verdict for verdict in verdicts if verdict.verdict != "right"]
    extra = sorted(set(made.tensors) - {job.name for job in jobs})
    code = WRONG if wrong or extra else UNSURE if skipped else RIGHT
    return {"out": str(out), "tensors": counts, "wrong": wrong, "skipped": skipped, "extra": extra, "code": code}


def _replayable(folder: pathlib.Path, of: str | pathlib.Path | None) -> tuple[tuple[Job, ...], int, bool]:
    """The jobs that made a folder, the seed of their random masks, and whether those are drawn as here."""
    is_ours = True
    record = read_json(folder / "merge.json")
    compat, allow, seed = record.get("compat"), record.get("allow", ()), record.get("seed")
    if of is None and record:
        recipes = [
            recipe.parse(document, compat=compat) for document in parse_yaml(record["recipe"], folder / "merge.json")
        ]
    elif of is None:
        given = folder / "mergekit_config.yml"
        if not given.is_file():
            raise Unsure(f"{folder} has neither merge.json nor mergekit_config.yml; give of=RECIPE or of=BASE+ADAPTER")
        recipes, compat, is_ours = recipe.read(given, compat="mergekit"), "mergekit", False
    elif pathlib.Path(of).suffix in (".yaml", ".yml"):
        recipes = recipe.read(pathlib.Path(of), compat=compat)
    else:
        recipes = [recipe.parse({"merge_method": "passthrough", "models": [{"model": str(of)}]})]
    if len(recipes) > 1:
        raise Unsure(f"the recipe has {len(recipes)} stages, whose results are gone; give of=RECIPE of the last one")
    try:
        sources = {name: open_source(name) for name in recipes[0].sources}
        made = planning.make(recipes[0], sources, compat=compat, allow=allow)
    except ValueError as error:
        raise Unsure(str(error)) from error
    return made.jobs, recipes[0].seed if seed is None else seed, is_ours


def _is_sampled(job: Job) -> bool:
    """Whether a run of elements can be replayed alone."""
    elementwise = engine.is_copy(job) or (RULES[job.method.rule].needs.elementwise and engine.is_float(job.out_dtype))
    return elementwise and all(operand.tensor.chunked for operand in job.operands)


def _judge(job: Job, made: Source, seed: int, everything: bool) -> Verdict:
    found = made.tensors.get(job.name)
    if found is None:
        return Verdict(job.name, "missing", detail=_elsewhere(job, made))
    if tuple(found.shape) != tuple(job.shape):
        turned = len(job.shape) == 2 and tuple(found.shape) == tuple(job.shape[::-1])
        if not turned:
            return Verdict(job.name, "different", detail=f"shape {list(found.shape)}, wanted {list(job.shape)}")
        sums = _Sums()
        sums.add(*_whole(job, found, seed, turned=True))
        return Verdict(job.name, "transposed" if sums.is_right(found.dtype) else "different", error=sums.error)
    sums = _Sums()
    runs = _runs(job, everything) if _is_sampled(job) else None
    for got, wanted, reference in [_whole(job, found, seed)] if runs is None else _replay(job, found, seed, runs):
        sums.add(got, wanted, reference)
    name, strength = sums.verdict(found.dtype)
    if name == "different" and len(job.shape) == 2 and job.shape[0] == job.shape[1]:
        got, wanted, reference = (np.asarray(a).astype(np.float64) for a in _whole(job, found, seed))
        for turned in (wanted.T, reference + (wanted - reference).T):  # all of it, or the change alone
            whole = _Sums()
            whole.add(got, turned, reference)
            if whole.is_right(found.dtype):
                return Verdict(job.name, "transposed", error=sums.error)
    return Verdict(job.name, name, strength, sums.error)


def _elsewhere(job: Job, made: Source) -> str:
    """Name tensors that end alike: the same module, with other words in front."""
    end = ".".join(job.name.split(".")[-4:])
    alike = [name for name in made.tensors if name.endswith(end) and tuple(made.tensors[name].shape) == job.shape]
    return f"the folder has {alike[0]} instead" if alike else "nothing in the folder has a name like it"


def _runs(job: Job, everything: bool) -> Iterator[tuple[int, int]]:
    """First element and count of each run: all of a small tensor, of a large one as many runs from end to end."""
    count = math.prod(job.shape)
    if everything or count <= RUN * RUNS:
        yield from ((start, min(RUN, count - start)) for start in range(0, count, RUN))
        return
    yield from ((round(i * (count - RUN) / (RUNS - 1)), RUN) for i in range(RUNS))


Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


def _replay(job: Job, found: Tensor, seed: int, runs: Iterator[tuple[int, int]]) -> Iterator[Triple]:
    """What the folder has, what the recipe gives, and the reference, run by run."""
    reference = _reference(job)
    for start, count in runs:
        wanted = _merged(job, [_run_of(i.tensor, start, count) for i in job.operands], seed)
        yield _run_of(found, start, count), wanted, _or_zeros(reference, wanted, start)


def _whole(job: Job, found: Tensor, seed: int, *, turned: bool = False) -> Triple:
    got = read(found)
    wanted = _merged(job, [read(i.tensor) for i in job.operands], seed)
    reference = _or_zeros(_reference(job), wanted, 0).reshape(wanted.shape)
    return (got.T if turned else got), wanted, reference


def _reference(job: Job) -> Tensor | None:
    """What a change is counted from: the base, the first model, what an adapter is applied to; None: from zero."""
    if job.base is not None:
        return job.base.tensor
    tensor = job.inputs[0].tensor
    if len(job.inputs) > 1:
        return tensor
    base = getattr(tensor, "base", None)
    return base if base is not None and tuple(base.shape) == tuple(tensor.shape) else None


def _or_zeros(reference: Tensor | None, like: np.ndarray, start: int) -> np.ndarray:
    return np.zeros_like(like) if reference is None else _run_of(reference, start, like.size)


def _merged(job: Job, arrays: list[np.ndarray], seed: int) -> np.ndarray:
    """What the rule makes of operands, in the dtype of the result."""
    if engine.is_copy(job) or not engine.is_float(job.out_dtype):
        return arrays[0].astype(job.out_dtype)
    with engine.precision(job), jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(engine.merge_arrays(job, list(arrays), seed))


def _run_of(tensor: Tensor, start: int, count: int) -> np.ndarray:
    buffer = np.empty(count * tensor.dtype.itemsize, np.uint8)
    tensor.read_into(buffer, start * tensor.dtype.itemsize)
    return buffer.view(tensor.dtype)


class _Sums:
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
        ulp = float(jax.numpy.finfo(dtype).eps) if engine.is_float(dtype) else 0.0
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
    """Write a result of `verify` for a terminal: the counts, and a line for each tensor that is not right."""
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
    """Write a result of `verify` as JSON."""
    return json.dumps({**report, "wrong": [dataclasses.asdict(verdict) for verdict in report["wrong"]]}, indent=1)
