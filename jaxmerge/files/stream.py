r"""Merge checkpoints on disk by a recipe, with the very functions that merge in memory.

Law: merging on disk equals loading the models, merging on the mesh and writing the result, random masks included: a
tensor `model.layers.0.mlp.up_proj.weight` is the leaf `model/layers/0/mlp/up_proj/weight`, and a model's name is its
string in the recipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import xxhash

from jaxmerge.files import card, disk, engine, kinds, vocabulary
from jaxmerge.files import recipe as recipes
from jaxmerge.files.adapters.merge import AdapterWork
from jaxmerge.files.checkpoints import safetensors
from jaxmerge.files.checkpoints.adapter import CONFIG, WEIGHTS
from jaxmerge.files.checkpoints.beside import companion_paths
from jaxmerge.files.checkpoints.handles import check_unchanged, stamps
from jaxmerge.files.checkpoints.open import find_adapter, open_source
from jaxmerge.files.checkpoints.source import Source
from jaxmerge.files.documents import parse_json, read_json
from jaxmerge.files.engine import Engine, Progress
from jaxmerge.files.experts.gates import States
from jaxmerge.files.forms import FORMS, Form, form_of
from jaxmerge.files.journal import Journal, Kept, stages_of, stamp, unfinished
from jaxmerge.files.kinds import AnyRecipe
from jaxmerge.files.plan import Plan
from jaxmerge.files.recipe import Recipe
from jaxmerge.files.statistics import files_of, told


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a recipe does not say: see `merge`."""

    compat: str | None
    allow: tuple[str, ...]
    max_shard_bytes: int
    device: Any
    seed: int | None
    form: Form
    dry_run: bool
    states: States | None


def merge(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    seed: int | None = None,
    compat: str | None = None,
    allow: Sequence[str] = (),
    max_shard_bytes: int = 5_000_000_000,
    device: str | None = None,
    format: str | Form = "safetensors",
    dry_run: bool = False,
    states: States | None = None,
) -> dict[str, Any]:
    """Merge the checkpoints of a recipe into a new folder; with the key `adapter` in the recipe, adapters into one.

    Killed and called again with the same arguments it goes on where it was, and ends with the same bytes; once `out` is
    whole, nothing is merged again.

    Args:
      recipe: a YAML file (see `jaxmerge.files.recipe`), or what it would hold: a dictionary, or a list of them for
        stages.
      out: folder to make; it appears under its name only when whole.
      progress: called after every piece with bytes read so far, bytes to read, and the tensor's name.
      seed: overrides the recipe's seed.
      compat: "mergekit" switches off what differs from mergekit by default; docs/merge.md lists it.
      allow: of "missing", "unused", "shapes": tensors that do not match, which are refused otherwise (`plan.make`).
      max_shard_bytes: size above which the result is split into shards.
      device: "cpu", "gpu" or "tpu", where the arithmetic runs; by default jax's.
      format: of the result, "safetensors", "orbax" or "fp8", or a `jaxmerge.files.forms.Form`; all but the first are
        made of a folder of safetensors beside `out`, which is there for a while.
      dry_run: check everything and return the plan, without reading a tensor or writing a file; of the hub's models the
        headers are fetched alone.
      states: runs a model on prompts, for recipes of experts with a `gate_mode` that needs it
        (`jaxmerge.files.experts.gates`); `jaxmerge merge` gives it where the extra `train` is installed.

    Returns:
      {"out", "merge_method", "tensors", "bytes_in", "bytes_out", "bytes_memory", "files", "seconds", "notes"}.
      bytes_memory: of buffers and the largest result together; what a rule needs on top is not known in advance.

    Raises:
      ValueError: one line that names what is wrong, where, and the way out.
    """
    start = time.perf_counter()
    out = pathlib.Path(out)
    form = form_of(format)
    settings = Settings(compat, tuple(allow), max_shard_bytes, _device(device), seed, form, dry_run, states)
    of = pathlib.Path(recipe) if isinstance(recipe, str | os.PathLike) else recipe
    documents = recipes.read(of, compat=compat)
    if dry_run and len(documents) > 1:
        raise ValueError("a dry run needs the models of every stage, which the stages before make; run it without")
    between = stages_of(out)
    work = _work(documents, between, settings, progress)
    if dry_run:
        report = work.plan(out)
    else:
        report = _earlier(out, work.digest)
        if report is None:
            disk.check_free(out)
            try:
                report = work.run(out)
            except (ValueError, KeyError, TypeError) as error:
                if not isinstance(error, Kept):  # an error of the inputs leaves nothing
                    shutil.rmtree(between, ignore_errors=True)
                raise
        shutil.rmtree(between, ignore_errors=True)
    return report | {"out": str(out), "seconds": time.perf_counter() - start}


def _work(documents: Sequence[AnyRecipe], between: pathlib.Path, settings: Settings, progress: Progress | None) -> Any:
    """Return what merges a recipe: a `_Work` for whole models, an `AdapterWork` for adapters."""
    if all(document.adapter is None for document in documents):
        return _Work(documents, between, settings, progress)
    last = documents[-1]
    if not isinstance(last, Recipe) or last.adapter is None or len(documents) > 1:
        raise ValueError("'adapter' stands in a recipe of one document; merge the adapters first, then name the result")
    if settings.form.write is not None:
        raise ValueError(f"format={settings.form.name!r} is for whole models; an adapter is written as PEFT reads it")
    return AdapterWork(
        last, last.adapter, seed=settings.seed, allow=settings.allow, device=settings.device, progress=progress,
        headers_only=settings.dry_run,
    )  # fmt: skip


def _device(name: str | None) -> Any:
    try:
        return jax.devices(name)[0]
    except RuntimeError:
        there = sorted({device.platform for device in jax.devices()})
        raise ValueError(f"device={name!r} is not here; there are {', '.join(there)}") from None


class _Work:
    """The documents of a recipe on their way to one result, and the models that none of them makes, open."""

    def __init__(
        self, recipes: Sequence[AnyRecipe], between: pathlib.Path, settings: Settings, progress: Progress | None
    ):
        self.recipes, self.between, self.settings, self.progress = recipes, between, settings, progress
        self.stages = {str(of.name): between / "stages" / str(of.name) for of in recipes[:-1]}
        named = dict.fromkeys(name for of in recipes for name in of.sources)
        self.models = {
            name: open_source(name, headers_only=settings.dry_run) for name in named if not self._is_stage(name)
        }
        self.later = [name for name in named if self._is_stage(name)]
        self.measured = {file for of in recipes for folder in of.statistics for file in files_of(folder)}
        read = {file for source in self.models.values() for file in _read_files(source)}
        self.before = stamps(read | self.measured | self._later_files())
        self.notes: list[str] = []  # of all plans so far: those of stages are the result's too

    def _is_stage(self, name: str) -> bool:
        return name.partition("+")[0] in self.stages

    def _later_files(self) -> set[pathlib.Path]:
        """The files of adapters that are applied to what a stage makes."""
        adapters = {(adapter, name) for name in self.later for adapter in name.split("+")[1:]}
        folders = {find_adapter(*of, headers_only=self.settings.dry_run).folder for of in adapters}
        return {file for folder in folders for name in (CONFIG, WEIGHTS) if (file := folder / name).exists()}

    def _open(self, name: str) -> Source:
        if not self._is_stage(name):
            return self.models[name]
        stage, plus, adapter = name.partition("+")
        return dataclasses.replace(open_source(f"{self.stages[stage]}{plus}{adapter}"), name=name)

    @functools.cached_property
    def digest(self) -> str:
        """Digest all that decides the result, known before any of it is made: recipe, settings, what is read."""
        files = {file for source in self.models.values() for file in source.files}
        files |= self.measured | self._later_files()
        beside = {name: (source.config, _digests(source.companions())) for name, source in self.models.items()}
        for name in (of.tokenizer.source for of in self.recipes if of.tokenizer is not None):
            if name not in ("union", "base") and name not in self.models and not self._is_stage(name):
                beside[name] = ({}, _digests(vocabulary.companions_at(name)))
        of, texts = self.settings, [document.text for document in self.recipes]
        said = [texts, of.compat, sorted(of.allow), of.max_shard_bytes, of.device.platform, of.seed, of.form.name]
        read = [[stamp(file) for file in sorted(files)], beside]
        return xxhash.xxh3_128_hexdigest(json.dumps([said, card.versions(), read], sort_keys=True).encode())

    def plan(self, out: pathlib.Path) -> dict[str, Any]:
        """Check everything and return the report of a dry run."""
        return self.merge(self.recipes[-1], out)

    def run(self, out: pathlib.Path) -> dict[str, Any]:
        """Merge stage by stage."""
        *before, last = self.recipes
        result = self.between / "result"  # before it gets its form
        notes: list[str] = []
        for stage in before:
            try:
                notes += self.merge(stage, self.stages[str(stage.name)])["notes"]
            except ValueError as error:
                kind = Kept if isinstance(error, Kept) else ValueError
                raise kind(f"stage {stage.name!r}: {error}") from None
        if self.settings.form.write is None:
            report = self.merge(last, out)
        else:
            report = self.merge(last, result)
            self.settings.form.write(result, out, self.settings.max_shard_bytes)
        return report | {"notes": list(dict.fromkeys(notes + report["notes"]))}

    def merge(self, of: AnyRecipe, out: pathlib.Path) -> dict[str, Any]:
        """Merge one document into a folder."""
        settings = self.settings
        sources = {name: self._open(name) for name in of.sources}
        seed = of.seed if settings.seed is None else settings.seed
        plan = kinds.make(
            of, sources, compat=settings.compat, allow=settings.allow, seed=seed, states=settings.states,
            dry_run=settings.dry_run,
        )  # fmt: skip
        tensors = {job.name: (job.out_dtype, job.shape) for job in plan.jobs}
        places = safetensors.plan(tensors, settings.max_shard_bytes)
        form = settings.form if of is self.recipes[-1] else FORMS["safetensors"]
        final, said = _formed(form, plan, tensors, settings.max_shard_bytes)
        limit = engine.buffer_bytes(plan.jobs)
        report = {
            "merge_method": of.merge_method, "tensors": len(plan.jobs), "files": list(final.sizes),
            "bytes_in": sum(job.read_bytes for job in plan.jobs), "bytes_out": final.total,
            "bytes_memory": limit + max(job.size for job in plan.jobs),
        }  # fmt: skip
        if settings.dry_run:
            return report | {"notes": [*plan.notes, *said]}
        self.notes = list(dict.fromkeys([*self.notes, *plan.notes, *said]))
        files = sorted(self.measured.union(*(source.files for source in sources.values())))
        digest = _digest(plan, of, seed, settings)
        record = card.provenance(
            of, sources, seed, self.notes, digest, map(stamp, files), settings.device, settings.form.name
        )
        if _is_done(out, record):
            return report | {"notes": self.notes}
        if out.is_relative_to(self.between) and out.exists():
            raise Kept(
                f"{out}, which is done, is of another recipe or other inputs; put these back to go on, or remove "
                f"{self.between} to begin again"
            )
        # a result that gets another form in the end is there twice for a while
        wanted = places.total + (final.total if form.write is not None else 0)
        with unfinished(out, record["plan"], record["files"], wanted) as journal:
            with contextlib.closing(safetensors.Writer(journal.result, places)) as writer:
                kept = engine.verified(plan.jobs, writer, journal)
                if kept:
                    journal.notes.append(f"{len(kept)} of {len(plan.jobs)} tensors were there already")
                rest = tuple(job for job in plan.jobs if job.name not in kept)
                Engine(writer, journal, seed=seed, limit=limit, device=settings.device).run(rest, self.progress)
                writer.finish()
            check_unchanged(self.before)
            plan.companions(journal.result)
            record |= {"statistics": told(of.statistics)} if of.statistics else {}
            record |= {"command": self.digest, "report": report, "compat": settings.compat, "allow": [*settings.allow]}
            card.write(journal.result, record, [journal.done[job.name] for job in plan.jobs], form.usage)
        return report | {"notes": [*self.notes, *journal.notes]}


def _formed(
    form: Form, plan: Plan, tensors: Mapping[str, Any], max_shard_bytes: int
) -> tuple[safetensors.Plan, list[str]]:
    """Check that a form is for the result; its files as far as they are known, and notes."""
    notes: list[str] = []
    if form.check is not None:
        with tempfile.TemporaryDirectory() as folder:
            plan.companions(pathlib.Path(folder))
            notes = form.check(pathlib.Path(folder), tensors)
    config = parse_json(plan.files["config.json"], "config.json") if "config.json" in plan.files else {}
    return safetensors.plan(form.layout(tensors, config), max_shard_bytes), notes


def _read_files(source: Source) -> list[pathlib.Path]:
    """All that a merge reads of a model: weights, and what lies beside them."""
    beside = [source.folder / "config.json", *companion_paths(source.folder).values()]
    return [*source.files, *(file for file in beside if file.is_file())]


def _digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: xxhash.xxh3_128_hexdigest(data) for name, data in files.items()}


def _digest(plan: Plan, of: AnyRecipe, seed: int, settings: Settings) -> str:
    """Digest all that decides the bytes of the result but the inputs' own."""
    jobs = [
        [
            job.name, job.method.rule, str(job.dtype), str(job.out_dtype), job.shape, job.stacked,
            [(i.model, i.tensor.name, str(i.tensor.dtype), i.tensor.shape) for i in job.reads],
            sorted((name, repr(value)) for name, value in job.coefficients.items()),
        ]
        for job in plan.jobs
    ]  # fmt: skip
    rest = [of.text, seed, settings.compat, settings.max_shard_bytes, settings.device.platform, card.versions()]
    beside = [plan.vocabulary, _digests(plan.files)]  # what was taken from files that no time is kept of
    return xxhash.xxh3_128_hexdigest(json.dumps([jobs, rest, beside]).encode())


def _earlier(out: pathlib.Path, digest: str) -> dict[str, Any] | None:
    """Return the report of the call that made `out`, if it was this very one, and remove what else it left."""
    found = read_json(out / "merge.json")
    if found.get("command") != digest:
        return None
    Journal(out, "", {}).remove()  # killed after the last rename
    return found["report"] | {"notes": [*found["notes"], f"{out} is there already, merged from the same files"]}


def _is_done(out: pathlib.Path, record: Mapping[str, Any]) -> bool:
    """Whether `out` is the result of this very merge: a stage that is done."""
    found = read_json(out / "merge.json")
    return all(found.get(key) == record[key] for key in ("plan", "files"))
