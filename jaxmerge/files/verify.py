r"""Say of a folder, tensor by tensor, whether it is what its recipe makes: `jaxmerge verify OUT`.

The recipe is replayed on a sample: of a rule that works element by element on runs of elements, of another on whole
tensors, the largest of them left out unless all are asked for. `verdict.py` says what is then told of a tensor.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxmerge.files import engine, kinds, recipe
from jaxmerge.files.adapters.verify import verify_adapter
from jaxmerge.files.card import has_our_masks
from jaxmerge.files.checkpoints import fp8
from jaxmerge.files.checkpoints.adapter import CONFIG
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import Source, Tensor, read, read_run
from jaxmerge.files.documents import parse_yaml, read_json
from jaxmerge.files.experts.gates import States
from jaxmerge.files.experts.layout import unstacked
from jaxmerge.files.plan import Job
from jaxmerge.files.verdict import Triple, Unsure, Verdict, elsewhere, judge, judge_shape, runs, summarise
from jaxmerge.rules import RULES

WHOLE = 1 << 26  # elements of a tensor that is replayed whole unless all are asked for
Progress = Callable[[int, int, str], None]


def verify(
    out: str | pathlib.Path,
    *,
    of: str | pathlib.Path | None = None,
    everything: bool = False,
    progress: Progress | None = None,
    states: States | None = None,
) -> dict[str, Any]:
    """Compare a folder with what its recipe makes of its inputs.

    Args:
      out: a folder of weights.
      of: a recipe, or a model string `base+adapter`; by default the recipe in `out`: merge.json's, or
        mergekit_config.yml.
      everything: replay every element of every tensor.
      progress: called with tensors done, tensors in all and a tensor's name.
      states: as `merge` was given.

    Returns:
      {"out", "tensors": {verdict: count}, "wrong": [Verdict, …], "skipped", "extra", "code"}; code is 0 where all is
      right, 1 where something is not, 2 where tensors had to be left out and the rest is right.

    Raises:
      Unsure: there is no recipe, or its inputs are not there.
      ValueError: `out` cannot be read.
    """
    folder = pathlib.Path(out)
    if (folder / CONFIG).exists():
        return verify_adapter(folder, of=of, progress=progress)
    form = str(read_json(folder / "merge.json").get("format"))
    if form.startswith("gguf"):
        raise Unsure(f"{folder} is written as GGUF, which is not replayed; merge as safetensors and verify that")
    made = unstacked(open_source(str(folder)), [])
    jobs, seed, is_ours = _replayable(folder, of, states)
    verdicts: list[Verdict] = []
    skipped: list[str] = []
    for i, job in enumerate(jobs):
        if progress is not None:
            progress(i + 1, len(jobs), job.name)
        large = math.prod(job.shape) > WHOLE and not _is_sampled(job)
        if (large and not everything) or (not is_ours and RULES[job.method.rule].needs.key != "none"):
            skipped.append(job.name)
        else:
            verdicts.append(_judge(job, made, seed, everything, form == "fp8"))
    return summarise(str(out), verdicts, skipped, sorted(set(made.tensors) - {job.name for job in jobs}))


def _replayable(
    folder: pathlib.Path, of: str | pathlib.Path | None, states: States | None
) -> tuple[tuple[Job, ...], int, bool]:
    """The jobs that made a folder, the seed of their random masks, and whether those are drawn as here."""
    record = read_json(folder / "merge.json")
    is_ours = has_our_masks(record)
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
    if recipes[0].adapter is not None:
        raise Unsure(f"what the recipe makes is an adapter, and {folder} is none")
    if len(recipes) > 1:
        raise Unsure(f"the recipe has {len(recipes)} stages, whose results are gone; give of=RECIPE of the last one")
    seed = recipes[0].seed if seed is None else seed
    try:
        sources = {name: open_source(name) for name in recipes[0].sources}
        made = kinds.make(recipes[0], sources, compat=compat, allow=allow, seed=seed, states=states)
    except ValueError as error:
        raise Unsure(str(error)) from error
    return made.jobs, seed, is_ours


def _is_sampled(job: Job) -> bool:
    """Whether a run of elements can be replayed alone."""
    elementwise = engine.is_copy(job) or (RULES[job.method.rule].needs.elementwise and engine.is_float(job.out_dtype))
    return elementwise and all(read.tensor.chunked for read in job.reads)


def _judge(job: Job, made: Source, seed: int, everything: bool, is_fp8: bool) -> Verdict:
    found = made.tensors.get(job.name)
    if found is None:
        return Verdict(job.name, "missing", detail=elsewhere(job.name, job.shape, made.tensors))

    has_scales = is_fp8 and fp8.is_stored(job.name, job.out_dtype, tuple(job.shape), made.config)

    def whole() -> Triple:
        got, wanted, reference = _whole(job, found, seed)
        return got, fp8.rounded(wanted) if has_scales else wanted, reference

    if tuple(found.shape) != tuple(job.shape):
        return judge_shape(job.name, found.shape, job.shape, found.dtype, whole)
    in_runs = _is_sampled(job) and not has_scales  # a scale is of a tile, which is no run
    sampled = _replay(job, found, seed, runs(math.prod(job.shape), everything)) if in_runs else [whole()]
    return judge(job.name, job.shape, found.dtype, sampled, whole)


def _replay(job: Job, found: Tensor, seed: int, places: Iterator[tuple[int, int]]) -> Iterator[Triple]:
    """What the folder has, what the recipe gives, and the reference, run by run."""
    reference = _reference(job)
    for start, count in places:
        wanted = _merged(job, [read_run(i.tensor, start, start + count) for i in job.reads], seed)
        yield read_run(found, start, start + count), wanted, _or_zeros(reference, wanted, start)


def _whole(job: Job, found: Tensor, seed: int) -> Triple:
    wanted = _merged(job, [read(i.tensor) for i in job.reads], seed)
    return read(found), wanted, _or_zeros(_reference(job), wanted, 0).reshape(wanted.shape)


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
    return np.zeros_like(like) if reference is None else read_run(reference, start, start + like.size)


def _merged(job: Job, arrays: list[np.ndarray], seed: int) -> np.ndarray:
    """What the rule makes of operands, in the dtype of the result."""
    if engine.is_copy(job) or not engine.is_float(job.out_dtype):
        return arrays[0].astype(job.out_dtype)
    with engine.precision(job), jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(engine.merge_arrays(job, list(arrays), seed))
