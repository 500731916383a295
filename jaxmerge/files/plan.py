r"""From a recipe and its open sources to a list of jobs: one a tensor to write, nothing left to decide."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.contract import check_compat
from jaxmerge.files import agree, companions, layers, operands, vocabulary
from jaxmerge.files.checkpoints import safetensors
from jaxmerge.files.checkpoints.beside import is_weights, write_companions
from jaxmerge.files.checkpoints.source import Source, Tensor, main_dtype
from jaxmerge.files.coefficients import Of
from jaxmerge.files.coefficients import coefficients as resolve
from jaxmerge.files.experts import layout
from jaxmerge.files.methods import COPY, Method
from jaxmerge.files.operands import Draft, Operand
from jaxmerge.files.recipe import Module, Recipe, Slice
from jaxmerge.files.statistics import Readings

ALLOW = ("missing", "unused", "shapes")


@dataclasses.dataclass(frozen=True)
class Input:
    """A tensor that goes into a job, and the model name its random masks are keyed by."""

    model: str
    tensor: Tensor


@dataclasses.dataclass(frozen=True)
class Job:
    """One tensor of the result: which rule makes it of which inputs.

    name: in the result. path: the leaf path random masks are keyed by. dtype: floating inputs are cast to it first
    (None: as stored). out_dtype, shape: of the result. coefficients: keywords of the rule, numbers all. stacked: the
    rule sees one index of the first axis at a time. statistics: of each input, where the rule takes them here.
    """

    name: str
    path: str
    method: Method
    inputs: tuple[Input, ...]
    base: Input | None
    coefficients: Mapping[str, Any]
    dtype: np.dtype | None
    out_dtype: np.dtype
    shape: tuple[int, ...]
    stacked: bool = False
    statistics: tuple[Input, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return math.prod(self.shape) * self.out_dtype.itemsize

    @property
    def read_bytes(self) -> int:
        """Bytes of all that is read."""
        return sum(i.tensor.size for i in self.reads)

    @property
    def operands(self) -> tuple[Input, ...]:
        """Inputs, and the base if there is one."""
        return self.inputs if self.base is None else (*self.inputs, self.base)

    @property
    def reads(self) -> tuple[Input, ...]:
        """Operands, and the statistics behind them."""
        return (*self.operands, *self.statistics)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Jobs in the order they are written; what is written beside them; what the user should know.

    files: config.json, tokenizer, chat template and generation config of the result, name → content. vocabulary: digest
    of which rows of the models its embeddings are made of, "" where they are merged by number.
    """

    jobs: tuple[Job, ...]
    files: Mapping[str, bytes]
    vocabulary: str
    notes: tuple[str, ...]

    def companions(self, folder: pathlib.Path) -> None:
        """Write what stands beside the weights into the folder of the result."""
        write_companions(folder, self.files)


def make(
    recipe: Recipe,
    sources: Mapping[str, Source],
    *,
    compat: str | None = None,
    allow: Sequence[str] = (),
    vocabulary: vocabulary.Vocabulary | None = None,
) -> Plan:
    """Resolve a recipe for open checkpoints.

    Args:
      recipe: a checked recipe.
      sources: every model of `recipe.sources`, open.
      compat: "mergekit" switches off where this differs from mergekit by default; see docs/merge.md.
      allow: "missing": a tensor that some models lack is merged from those that have it, copied from the base (else
        the first model) where too few do. "unused": tensors that the base (else the first model) lacks are left
        out. "shapes": of tensors of unlike shapes the base's (else the first model's) is copied.
      vocabulary: of the result; by default built where the recipe has `tokenizer`.

    Raises:
      ValueError: models do not match, or a parameter is missing; all tensors concerned are listed, to some number.
    """
    check_compat(compat)
    for word in allow:
        if word not in ALLOW:
            raise ValueError(f"allow={word!r}, wanted some of {', '.join(ALLOW)}")
    missing = [name for name in recipe.sources if name not in sources]
    if missing:
        raise ValueError(f"sources lack {', '.join(map(repr, missing))}, which the recipe names")
    sources = {name: sources[name] for name in recipe.sources}
    notes = [*recipe.notes, *(note for source in sources.values() for note in source.notes)]
    sources = {name: layout.unstacked(source, notes) for name, source in sources.items()}
    sources = operands.with_heads(sources, recipe.donor, notes, compat=compat)
    sources = agree.without_buffers(sources, notes)
    whole = all(module.whole for module in recipe.modules)
    notes += agree.config_notes(sources, recipe.donor, whole=whole, rows=recipe.tokenizer is None)
    if vocabulary is None and recipe.tokenizer is not None:
        vocabulary = _vocabulary(recipe, sources)
    if vocabulary is not None:
        notes += vocabulary.notes
    planner = _Planner(recipe, sources, vocabulary, compat, frozenset(allow), notes)
    jobs = planner.jobs()
    notes += planner.readings.notes()
    if not jobs:
        counts = ", ".join(f"{name!r} has {len(source.tensors)} tensors" for name, source in sources.items())
        raise ValueError(f"the recipe merges no tensor: {counts}; give models with weights")
    donor = sources[recipe.donor] if vocabulary is None else vocabulary.apply(sources[recipe.donor])
    config, more = companions.config(
        donor.config,
        planner.stacks,
        recipe,
        dtype=main_dtype((job.out_dtype, job.size) for job in jobs),
        rows=planner.matching.rows,
    )
    notes += more
    if vocabulary is None:
        notes += companions.tokenizer_notes(sources)
    template = companions.chat_template(recipe.chat_template, sources.values(), notes)
    files = companions.contents(donor, config, template)
    notes += [f"{name} is copied from {donor.name}, not merged" for name in files if is_weights(name)]
    return Plan(tuple(jobs), files, vocabulary.digest if vocabulary else "", tuple(dict.fromkeys(notes)))


def _vocabulary(recipe: Recipe, sources: Mapping[str, Source]) -> vocabulary.Vocabulary:
    assert recipe.tokenizer is not None
    return vocabulary.build(recipe.tokenizer, sources, recipe.base, dtype=recipe.dtype)


class _Planner:
    """One recipe on its way to jobs. `stacks` says, by container of sliced layers, where each of them is from."""

    def __init__(self, recipe, sources, vocabulary, compat, allow, notes):
        self.recipe: Recipe = recipe
        self.sources: Mapping[str, Source] = sources
        self.vocabulary: vocabulary.Vocabulary | None = vocabulary
        self.compat: str | None = compat
        self.stacks: dict[str, companions.Stack] = {}
        self.matching = operands.Matching(allow, compat, notes)
        self.notes: list[str] = notes
        self.readings = Readings(recipe, sources, frozenset(allow))

    def jobs(self) -> list[Job]:
        modules = self.recipe.modules
        layers.check_modules(modules, {name: source.tensors for name, source in self.sources.items()})
        for model, source in self.sources.items():
            self.matching.unclaimed(model, [n for n in source.tensors if layers.module_of(n, modules) is None])
        drafts = [draft for module in modules for draft in (self._whole if module.whole else self._sliced)(module)]
        matched = [self.matching.matched(draft, self.recipe.method) for draft in drafts]
        self.matching.check()
        return [self._job(draft) for draft in matched if draft is not None]

    def _tensors(self, part: Slice, module: Module) -> list[dict[str, Tensor]]:
        """For each source of a slice, its tensors of a module; embeddings in the vocabulary of the result."""
        names = [entry.model for entry in part.sources]
        opened = [self.sources[name] for name in names]
        if self.vocabulary is not None and part in (module.slices[0], module.slices[-1]):
            # Rows that a model lacks come from the models it is merged with, not from those of another slice.
            words = dataclasses.replace(self.vocabulary, base=part.base)
            opened = [words.apply(source, among=dict.fromkeys(names)) for source in opened]
        claim = functools.cache(lambda name: layers.module_of(name, self.recipe.modules) == module.name)
        return [{name: tensor for name, tensor in source.tensors.items() if claim(name)} for source in opened]

    def _whole(self, module: Module) -> Iterator[Draft]:
        (part,) = module.slices
        tensors = self._tensors(part, module)
        first = operands.reference(part)
        depth = layers.depths(tensors[first])
        self.matching.unused(part, [list(names) for names in tensors])
        for name in tensors[first]:
            found = [Operand(e, name, t.get(name)) for e, t in zip(part.sources, tensors, strict=True)]
            yield Draft(name, depth[name], module, part, found)

    def _sliced(self, module: Module) -> Iterator[Draft]:
        parts = module.slices
        tensors = [self._tensors(part, module) for part in parts]
        first = operands.reference(parts[0])
        container = layers.container_of(tensors[0][first], module.name, parts[0].sources[first].model)
        yield from self._outside(module, parts[0], tensors[0], before=True)
        stack: list[tuple[str, int]] = []
        for part, found in zip(parts, tensors, strict=True):
            elsewhere = [[n for n in names if layers.container(n) not in (None, container)] for names in found]
            self.matching.unused(part, elsewhere)
            yield from self._slice(module, part, found, container, stack)
        yield from self._outside(module, parts[-1], tensors[-1], before=False)
        source = self.sources[self.recipe.donor]
        had = layers.layer_counts(source.tensors).get(container, 0)
        self.stacks[container] = companions.Stack(module.name, had, tuple(stack), self.sources)

    def _outside(self, module: Module, part: Slice, tensors: list[dict[str, Tensor]], before: bool) -> Iterator[Draft]:
        """Tensors outside the layers: from the first slice or the last, at t = 0."""
        sources = part.sources
        if self.compat and not before:
            # mergekit takes as many sources of the last slice as the first slice has.
            sources = sources[: len(module.slices[0].sources)]
        wanted = [[n for n in names if layers.split(n) is None and layers.is_before(n) == before] for names in tensors]
        self.matching.unused(part, wanted)
        for name in wanted[operands.reference(part)]:
            found = [Operand(e, name, t.get(name)) for e, t in zip(sources, tensors, strict=False)]
            yield Draft(name, 0.0, module, part, found)

    def _slice(
        self, module: Module, part: Slice, tensors: list[dict[str, Tensor]], container: str, stack: list
    ) -> Iterator[Draft]:
        by_layer = [layers.by_layer(names, container) for names in tensors]
        first = operands.reference(part)
        for entry, found in zip(part.sources, by_layer, strict=True):
            assert entry.layers is not None
            count = max(found, default=-1) + 1
            if entry.layers[1] > count:
                raise ValueError(
                    f"layer_range {list(entry.layers)} of {entry.model!r} ends after its {count} layers "
                    f"({container}.0 to {container}.{count - 1}); wanted an end of at most {count}"
                )
        for i in range(part.length):
            at = [entry.layers[0] + i for entry in part.sources if entry.layers is not None]
            named = [found.get(layer, {}) for found, layer in zip(by_layer, at, strict=True)]
            self.matching.unused(part, [list(names) for names in named], prefixes=[f"{container}.{l}." for l in at])
            t = i / (part.length - 1) if part.length > 1 else 1.0
            for rest in named[first]:
                found = [
                    Operand(entry, name := f"{container}.{layer}.{rest}", names.get(name))
                    for entry, layer, names in zip(part.sources, at, tensors, strict=True)
                ]
                yield Draft(f"{container}.{len(stack)}.{rest}", t, module, part, found)
            stack.append((part.sources[first].model, at[first]))

    def _job(self, draft: Draft) -> Job:
        """Turn a draft whose operands are all there and alike into a job."""
        recipe = self.recipe
        inputs, base = draft.roles(recipe.method)
        labels = draft.labels()
        is_float = jnp.issubdtype(draft.first.stored.dtype, jnp.floating)
        if draft.copied or not inputs or not is_float:
            inputs, base, method = [draft.first], None, COPY
            coefficients: dict[str, Any] = {"scale": 1.0}
            statistics: list[tuple[str, Tensor]] = []
        else:
            method = recipe.method
            outer = (draft.part.parameters, draft.module.parameters, recipe.parameters)
            of = [Of(o.entry.model, o.name, o.entry.parameters) for o in inputs]
            coefficients = resolve(recipe, draft.name, draft.t, of, outer, compat=self.compat)
            statistics = self.readings.of(draft.name, inputs)
        first = inputs[0]
        stored = self.sources[first.entry.model].natural.get(first.name, first.stored.dtype)
        out = recipe.out_dtype or recipe.dtype or (self._promoted(draft) if self.compat else stored)
        dtype = np.dtype(out) if is_float else stored
        safetensors.check_dtype(dtype, draft.name, first.stored.where)
        return Job(
            draft.name, draft.name.replace(".", "/"), method,
            tuple(Input(labels[id(operand)], operand.stored) for operand in inputs),
            None if base is None else Input(labels[id(base)], base.stored), coefficients,
            recipe.dtype if is_float else None, dtype, tuple(draft.first.stored.shape),
            self.compat is None and layout.is_stacked(draft.name, draft.first.stored.shape),
            tuple(Input(folder, tensor) for folder, tensor in statistics),
        )  # fmt: skip

    def _promoted(self, draft: Draft) -> np.dtype:
        with jax.numpy_dtype_promotion("standard"):
            return np.dtype(functools.reduce(jnp.promote_types, (o.stored.dtype for o in draft.operands)))
