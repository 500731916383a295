r"""The merge of a recipe with its models held in memory, for one choice of its coefficients after another.

held = Held(document)                      # the models are read once
tensors = held({"parameters.t": 0.25})     # as `merge` would write them, on the device
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxmerge.files import engine, vocabulary
from jaxmerge.files import plan as planning
from jaxmerge.files import recipe as recipes
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read
from jaxmerge.files.plan import Job, Plan
from jaxmerge.files.ranges import filled, ranges
from jaxmerge.files.statistics import files_of
from jaxmerge.strategies import Candidate, Space
from jaxmerge.tree import PyTree

Put = Callable[[str, np.ndarray], jax.Array]


class Held:
    """A recipe with ranges, its models in memory.

    Law: `held(candidate)` has the numbers that `merge` writes of the recipe with the candidate's numbers in it, bit for
    bit, before the last cast where `out_dtype` asks for one: the same rules are called with the same operands.

    Args:
      document: a recipe of one document, with ranges (`jaxmerge.files.ranges`) among its parameters.
      seed, compat, allow: as for `jaxmerge.files.merge`.
      put: (leaf path, tensor in host memory) → where it is held; by default jax's device.

    Raises:
      ValueError: the recipe is refused, has no range, or one for what is no number.
    """

    def __init__(
        self,
        document: Mapping[str, Any],
        *,
        seed: int | None = None,
        compat: str | None = None,
        allow: tuple[str, ...] = (),
        put: Put = lambda path, array: jax.device_put(array),
    ):
        self.document, self.compat, self.allow = document, compat, allow
        found = ranges(document)
        if not found:
            raise ValueError("the recipe has no range to search; write one, as density: {search: [0.1, 0.9]}")
        self.space = Space(found)
        self.start: Candidate = self.space.pack(self.space.start)
        recipe = self.recipe(self.start)
        if recipe.adapter is not None:
            raise ValueError(
                "the recipe makes an adapter, and what is searched is a whole model; name the models as base+adapter "
                "and leave 'adapter' out, then use its numbers in a recipe with it"
            )
        self.seed = recipe.seed if seed is None else seed
        self.sources = {name: open_source(name) for name in recipe.sources}
        words = recipe.tokenizer
        self.vocabulary = words and vocabulary.build(words, self.sources, recipe.base, dtype=recipe.dtype)
        self.plan = self.plan_of(self.start)
        assert self.slopes, "every range has been looked at"
        arrays: dict[int, jax.Array] = {}
        for job in self.plan.jobs:
            for operand in job.reads:
                if id(operand.tensor) not in arrays:
                    arrays[id(operand.tensor)] = put(job.path, read(operand.tensor))
        self.operands = {job.name: [arrays[id(i.tensor)] for i in job.reads] for job in self.plan.jobs}

    @property
    def files(self) -> list[pathlib.Path]:
        """Every file of weights and of statistics that was read."""
        measured = [file for folder in self.recipe(self.start).statistics for file in files_of(folder)]
        return [*(file for source in self.sources.values() for file in source.files), *measured]

    def recipe(self, candidate: Candidate) -> recipes.Recipe:
        """The checked recipe of a candidate."""
        recipe = recipes.parse(filled(self.document, candidate), compat=self.compat)
        if not isinstance(recipe, recipes.Recipe):
            raise ValueError("a recipe of experts has no parameters to search; give a recipe with merge_method")
        return recipe

    def plan_of(self, candidate: Candidate) -> Plan:
        """The jobs of a candidate; but for their coefficients they are the same for every one."""
        recipe = self.recipe(candidate)
        return planning.make(
            recipe, self.sources, compat=self.compat, allow=self.allow, vocabulary=self.vocabulary or None
        )

    def __call__(self, candidate: Candidate) -> dict[str, jax.Array]:
        """Merge: tensors by their names."""
        return {job.name: self._merged(job, self.operands[job.name]) for job in self.plan_of(candidate).jobs}

    def _merged(self, job: Job, arrays: list[jax.Array]) -> jax.Array:
        if not engine.is_float(job.out_dtype):
            return arrays[-1 if job.base is not None else 0]
        if engine.is_copy(job):
            return arrays[0].astype(job.out_dtype)
        with engine.precision(job):
            return engine.merge_arrays(job, arrays, self.seed)

    # --- coefficients as arrays, for a gradient ---

    def coefficients(self, candidate: Candidate) -> dict[str, dict[str, np.ndarray]]:
        """The searched coefficients of every tensor, float32, by tensor and keyword of its rule."""
        return {
            job.name: {key: np.asarray(job.coefficients[key], np.float32) for key in keys}
            for job in self.plan_of(candidate).jobs
            if (keys := self.searched.get(job.name))
        }

    def traced(self, given: Mapping[str, Mapping[str, Any]]) -> PyTree:
        """Merge with coefficients that may be traced: tensors by their names."""
        return {
            job.name: self._merged(
                dataclasses.replace(job, coefficients={**job.coefficients, **given.get(job.name, {})}),
                list(self.operands[job.name]),
            )
            for job in self.plan.jobs
        }

    @functools.cached_property
    def searched(self) -> dict[str, tuple[str, ...]]:
        """By tensor, the keywords of its rule that depend on a range."""
        found: dict[str, dict[str, None]] = {}
        for slopes in self.slopes.values():
            for tensor, keys in slopes.items():
                found.setdefault(tensor, {}).update(dict.fromkeys(keys))
        return {tensor: tuple(keys) for tensor, keys in found.items()}

    @functools.cached_property
    def slopes(self) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        """By range, tensor and keyword: the derivative of a coefficient, which is linear in what a recipe says.

        Raises:
          ValueError: a range is for a switch or a count, or no tensor's coefficients depend on it.
        """
        at_start = {job.name: job.coefficients for job in self.plan.jobs}
        options = {keyword for keyword, _ in self.recipe(self.start).method.options.values()}
        slopes: dict[str, dict[str, dict[str, np.ndarray]]] = {}
        for name, span in self.space.floats.items():
            begin = self.start[name]
            # Half of the way to the end that is farther: at an end itself weights may sum to zero.
            value = (begin + (span.high if span.high - begin >= begin - span.low else span.low)) / 2
            slopes[name] = {}
            for job in self.plan_of(self.start | {name: value}).jobs:
                keys = [key for key, found in job.coefficients.items() if found != at_start[job.name][key]]
                if wrong := [key for key in keys if key in options]:
                    raise ValueError(
                        f"{name}: {wrong[0]} is a switch or a count, which is not searched; give one value"
                    )
                if keys:
                    slopes[name][job.name] = {
                        key: (np.asarray(job.coefficients[key], np.float64) - np.asarray(at_start[job.name][key]))
                        / (value - begin)
                        for key in keys
                    }
            if not slopes[name]:
                raise ValueError(
                    f"{name}: no tensor's coefficients depend on this range, {[span.low, span.high]}; see that its "
                    "filter matches a tensor and that the range holds more than one number"
                )
        return slopes
