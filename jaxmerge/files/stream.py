r"""Merge checkpoints on disk by a recipe, with the very functions that merge in memory.

Law: merging on disk equals loading the models, merging on the mesh and writing the result, random masks included: a
tensor `model.layers.0.mlp.up_proj.weight` is the leaf `model/layers/0/mlp/up_proj/weight`, and a model's name is its
string in the recipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import xxhash

from jaxmerge.files import card, engine, orbax, recipe, safetensors
from jaxmerge.files import plan as planning
from jaxmerge.files.engine import Engine, Progress
from jaxmerge.files.journal import stamp, unfinished
from jaxmerge.files.plan import Plan
from jaxmerge.files.recipe import Recipe
from jaxmerge.files.source import Source, open_source, read_json

FORMATS = ("safetensors", "orbax")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a recipe does not say: see `merge`."""

    compat: str | None
    allow: tuple[str, ...]
    max_shard_bytes: int
    device: Any
    seed: int | None
    dry_run: bool


def merge(
    recipe_path: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    progress: Progress | None = None,
    seed: int | None = None,
    compat: str | None = None,
    allow: Sequence[str] = (),
    max_shard_bytes: int = 5_000_000_000,
    device: str | None = None,
    format: str = "safetensors",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Merge the checkpoints of a recipe into a new folder.

    Killed and called again with the same arguments it goes on where it was, and ends with the same bytes.

    Args:
      recipe_path: a YAML recipe (see `jaxmerge.files.recipe`), of one document or of stages.
      out: folder to make; it appears under its name only when whole.
      progress: called after every piece with bytes read so far, bytes to read, and the tensor's name.
      seed: overrides the recipe's seed.
      compat: "mergekit" switches off what differs from mergekit by default; docs/merge.md lists it.
      allow: of "missing", "unused", "shapes": tensors that do not match, which are refused otherwise (`plan.make`).
      max_shard_bytes: size above which the result is split into shards.
      device: "cpu", "gpu" or "tpu", where the arithmetic runs; by default jax's.
      format: of the result, "safetensors" or "orbax".
      dry_run: check everything and return the plan, without reading a tensor or writing a file.

    Returns:
      {"out", "merge_method", "tensors", "bytes_in", "bytes_out", "bytes_memory", "files", "seconds", "notes"}.
      bytes_memory: of buffers and the largest result together; what a rule needs on top is not known in advance.

    Raises:
      ValueError: one line that names what is wrong, where, and the way out.
    """
    start = time.perf_counter()
    out = pathlib.Path(out)
    if format not in FORMATS:
        raise ValueError(f"format={format!r}, wanted one of {', '.join(FORMATS)}")
    settings = Settings(compat, tuple(allow), max_shard_bytes, _device(device), seed, dry_run)
    *before, last = recipe.read(pathlib.Path(recipe_path), compat=compat)
    if dry_run and before:
        raise ValueError("a dry run needs the models of every stage, which the stages before make; run it without")
    between = out.absolute().parent / f".{out.name}.stages"
    stages: dict[str, pathlib.Path] = {}
    notes: list[str] = []
    for stage in before:
        assert stage.name is not None
        try:
            notes += _merge(stage, between / stage.name, stages, settings, progress)["notes"]
        except ValueError as error:
            raise ValueError(f"stage {stage.name!r}: {error}") from None
        stages[stage.name] = between / stage.name
    if format == "orbax" and not dry_run:
        report = _merge(last, between / "result", stages, settings, progress)
        orbax.write(between / "result", out)
    else:
        report = _merge(last, out, stages, settings, progress)
    shutil.rmtree(between, ignore_errors=True)
    return report | {
        "out": str(out), "notes": list(dict.fromkeys(notes + report["notes"])), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _device(name: str | None) -> Any:
    try:
        return jax.devices(name)[0]
    except RuntimeError:
        there = sorted({device.platform for device in jax.devices()})
        raise ValueError(f"device={name!r} is not here; there are {', '.join(there)}") from None


def _merge(
    of: Recipe, out: pathlib.Path, stages: Mapping[str, pathlib.Path], settings: Settings, progress: Progress | None
) -> dict[str, Any]:
    """Merge one document of a recipe."""
    sources = {name: _open(name, stages) for name in of.sources}
    plan = planning.make(of, sources, compat=settings.compat, allow=settings.allow)
    seed = of.seed if settings.seed is None else settings.seed
    places = safetensors.plan({job.name: (job.out_dtype, job.shape) for job in plan.jobs}, settings.max_shard_bytes)
    limit = engine.buffer_bytes(plan.jobs)
    report = {
        "merge_method": of.merge_method, "tensors": len(plan.jobs), "files": list(places.sizes),
        "bytes_in": sum(job.read_bytes for job in plan.jobs), "bytes_out": places.total,
        "bytes_memory": limit + max(job.size for job in plan.jobs), "notes": list(plan.notes),
    }  # fmt: skip
    if settings.dry_run:
        return report
    files = sorted({file for source in sources.values() for file in source.files})
    digest = _digest(plan, of, seed, settings)
    record = card.provenance(of, sources, seed, plan.notes, digest, map(stamp, files), settings.device)
    if _is_done(out, record):
        return report | {"notes": [*report["notes"], f"{out} is there already, merged from the same files"]}
    with unfinished(out, record["plan"], record["files"], places.total) as journal:
        with contextlib.closing(safetensors.Writer(journal.result, places)) as writer:
            kept = engine.verified(plan.jobs, writer, journal)
            if kept:
                journal.notes.append(f"{len(kept)} of {len(plan.jobs)} tensors were there already")
            rest = tuple(job for job in plan.jobs if job.name not in kept)
            Engine(writer, journal, seed=seed, limit=limit, device=settings.device).run(rest, progress)
            writer.finish()
        plan.companions(journal.result)
        card.write(journal.result, record, [journal.done[job.name] for job in plan.jobs])
    return report | {"notes": [*report["notes"], *journal.notes]}


def _open(name: str, stages: Mapping[str, pathlib.Path]) -> Source:
    stage, plus, adapter = name.partition("+")
    if stage not in stages:
        return open_source(name)
    return dataclasses.replace(open_source(f"{stages[stage]}{plus}{adapter}"), name=name)


def _digest(plan: Plan, of: Recipe, seed: int, settings: Settings) -> str:
    """Digest all that decides the bytes of the result but the inputs' own."""
    jobs = [
        [
            job.name, job.method.rule, str(job.dtype), str(job.out_dtype), job.shape,
            [(i.model, i.tensor.name, str(i.tensor.dtype), i.tensor.shape) for i in job.operands],
            sorted((name, repr(value)) for name, value in job.coefficients.items()),
        ]
        for job in plan.jobs
    ]  # fmt: skip
    rest = [of.text, seed, settings.compat, settings.max_shard_bytes, settings.device.platform, card.versions()]
    return xxhash.xxh3_128_hexdigest(json.dumps([jobs, rest]).encode())


def _is_done(out: pathlib.Path, record: Mapping[str, Any]) -> bool:
    """Whether `out` is the result of this very merge: killed between the last rename and its end, say."""
    found = read_json(out / "merge.json")
    return all(found.get(key) == record[key] for key in ("plan", "files"))
