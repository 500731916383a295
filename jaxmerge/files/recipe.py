r"""Recipes: mergekit's YAML grammar, our methods in the same one, typed and refused where not understood.

    merge_method: task_arithmetic          # a name of METHODS
    base_model: path/of/base               # where the method takes one
    models:                                # or slices, or modules: exactly one of the three
      - model: path/of/one
        statistics: path/of/folder         # where the method reads them: fisher, regmean
        parameters: {weight: 0.5}          # number | [gradient over depth] | [{filter: substring, value: …}, …]
      - model: path/of/two+path/of/adapter
        parameters: {weight: [0.2, 0.8]}
    parameters: {lambda: 0.9}              # for all models, where the model, slice and module say nothing
    dtype: float32                         # inputs are cast to this first; by default as stored
    out_dtype: bfloat16                    # the result's; by default dtype, else as the first model stores it
    tokenizer: {source: union}             # or tokenizer_source: union
    chat_template: auto
    seed: 0                                # ours: of the random methods
    adapter: core                          # ours: the models are adapters of one base, and so is the result

    slices:                                # layers, stacked one slice upon the other
      - sources:
          - {model: path/of/one, layer_range: [0, 16], parameters: …}
        base_model: path/of/base           # of this slice
        parameters: …
    modules:                               # parts of a model by prefix of the tensors' names, `default` the rest
      default: {models: …}                 # or slices; and parameters

Several documents with a `name` each are stages: a name stands for its result wherever a model may stand. A document
with the key `experts` is a recipe of mergekit-moe (`jaxmerge.files.experts.recipe`).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from jaxmerge.files.adapters import options as adapters
from jaxmerge.files.chat import check_template
from jaxmerge.files.documents import parse_yaml, read_text, written
from jaxmerge.files.experts import recipe as experts
from jaxmerge.files.experts.recipe import Experts
from jaxmerge.files.grammar import (
    KEYS,
    MODEL_KEYS,
    MODULE_KEYS,
    SLICE_KEYS,
    SOURCE_KEYS,
    floating_dtype,
    idle,
    layer_range,
    listed,
    model_name,
    read_seed,
)
from jaxmerge.files.methods import IGNORED, METHODS, REQUIRED, Method, Scope, check, known, methods
from jaxmerge.files.tokens import Options
from jaxmerge.files.tokens import parse as parse_tokenizer
from jaxmerge.rules import RULES

__all__ = ["IGNORED", "METHODS", "REQUIRED", "Entry", "Method", "Module", "Recipe", "Slice", "parse", "read"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One source: a model, or `layers` [a, b) of it, and its own parameters; the folder of its statistics."""

    model: str
    parameters: Scope
    layers: tuple[int, int] | None = None
    statistics: str | None = None


@dataclasses.dataclass(frozen=True)
class Slice:
    """Sources that are merged layer by layer into one run of layers; `base` is the base_model in force."""

    sources: tuple[Entry, ...]
    base: str | None
    parameters: Scope

    @property
    def length(self) -> int:
        """Layers of the slice; 0 where whole models are merged."""
        layers = self.sources[0].layers or (0, 0)
        return layers[1] - layers[0]

    def roles(self, method: Method) -> tuple[list[Entry], Entry | None]:
        """Return the inputs of the rule in its order, and the base it takes deltas from, if it does."""
        own = next((entry for entry in self.sources if entry.model == self.base), None)
        if own is None or (method.base_is_input and not method.base_first):
            return list(self.sources), None
        others = [entry for entry in self.sources if entry is not own]
        return ([own, *others], None) if method.base_is_input else (others, own)


@dataclasses.dataclass(frozen=True)
class Module:
    """A part of a model: tensors under the prefix `name`, or with the name `default` all that no other claims."""

    name: str
    slices: tuple[Slice, ...]
    parameters: Scope

    @property
    def whole(self) -> bool:
        """Whether whole models are merged, not layers of them."""
        return self.slices[0].sources[0].layers is None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe. `models` and `slices` in the file are one module `default` here."""

    merge_method: str
    modules: tuple[Module, ...]
    base: str | None
    parameters: Scope
    dtype: np.dtype | None
    out_dtype: np.dtype | None
    seed: int
    tokenizer: Options | None
    chat_template: str | None
    name: str | None
    text: str
    notes: tuple[str, ...] = ()
    adapter: adapters.Options | None = None

    @functools.cached_property
    def method(self) -> Method:
        return methods()[self.merge_method]

    @property
    def sources(self) -> list[str]:
        """Every model to open, once: in the order of the recipe."""
        entries = [entry.model for module in self.modules for s in module.slices for entry in s.sources]
        if self.adapter is not None:
            return entries  # nothing of the base is read
        return list(dict.fromkeys(entries if self.base is None else [*entries, self.base]))

    @property
    def statistics(self) -> list[str]:
        """Every folder of statistics that the method reads, once."""
        entries = [entry for module in self.modules for part in module.slices for entry in part.sources]
        return list(dict.fromkeys(entry.statistics for entry in entries if entry.statistics is not None))

    @property
    def donor(self) -> str:
        """The model whose config and tokenizer the result takes: the base, else the first."""
        return self.base or self.sources[0]


def read(
    source: pathlib.Path | Mapping[str, Any] | Sequence[Mapping[str, Any]], *, compat: str | None = None
) -> list[Recipe | Experts]:
    """Read and check a recipe.

    Relative paths of models are relative to the current folder.

    Args:
      source: the YAML file, or what it would hold: a dictionary, or a list of them for stages.
      compat: "mergekit" takes what mergekit takes: what it ignores in silence becomes a note, not an error.

    Returns:
      One recipe, or the stages of several documents in the order to run them; the last is the result.
    """
    text = read_text(source) if isinstance(source, pathlib.Path) else written(source)
    documents = parse_yaml(text, source if isinstance(source, pathlib.Path) else "the recipe")
    try:
        if len(documents) == 1:
            return [parse(documents[0], text, compat=compat)]
        *before, last = _in_order([parse(document, compat=compat) for document in documents])
        return [*before, dataclasses.replace(last, text=text)]  # it is the recipe of the result
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if isinstance(source, pathlib.Path) else str(error)) from None


def parse(document: Any, text: str = "", *, compat: str | None = None) -> Recipe | Experts:
    """Check a recipe given as plain data."""
    if not isinstance(document, Mapping):
        raise ValueError(f"a recipe is a mapping with merge_method and models, found {type(document).__name__}")
    text = text or yaml.safe_dump(dict(document), sort_keys=False)
    if "experts" in document:
        return experts.parse(document, text, compat=compat)
    return _Parser(document, compat).recipe(text)


def _in_order(recipes: list[Recipe | Experts]) -> list[Recipe | Experts]:
    """Sort stages so that each comes after those it uses; the nameless one, else the last, is the result."""
    if not recipes:
        raise ValueError("the recipe is empty; write merge_method and models")
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            what = "no 'name'" if name is None else f"the name {name!r}"
            raise ValueError(f"{names.count(name)} documents have {what}; give each stage a name of its own")
    by_name = dict(zip(names, recipes, strict=True))
    result = by_name.get(None, recipes[-1])
    order: list[Recipe | Experts] = []

    def visit(recipe: Recipe | Experts, path: tuple[str | None, ...]) -> None:
        if recipe.name in path:
            circle = " → ".join(str(name) for name in (*path[path.index(recipe.name) :], recipe.name))
            raise ValueError(f"the stages go in a circle: {circle}; a stage uses those that are made before it")
        for source in recipe.sources:
            stage = by_name.get(source.split("+")[0])
            if stage is not None:
                visit(stage, (*path, recipe.name))
        if recipe not in order:
            order.append(recipe)

    visit(result, ())
    idle = [recipe.name for recipe in recipes if recipe not in order]
    if idle:
        raise ValueError(f"stage {idle[0]!r} is used by none that leads to the result; remove it, or run it by itself")
    for name in (str(recipe.name) for recipe in order[:-1]):
        if name.startswith(".") or "/" in name or "\0" in name:
            raise ValueError(f"the stage name {name!r} is no name of a folder; leave out '/', and '.' at the start")
    return order


class _Parser:
    """One document on its way to a Recipe: the method in force and the notes on what was ignored."""

    def __init__(self, document: Mapping[str, Any], compat: str | None):
        self.document, self.lenient, self.notes = document, compat == "mergekit", []
        for key in document:
            self.known(key, KEYS, "key")
        if document.get("merge_method") is None:
            raise ValueError(f"no 'merge_method'; there are {', '.join(methods())}")
        self.name: str = document["merge_method"]
        there = methods()
        known(self.name, there, "merge_method")
        self.method = there[self.name]
        base = document.get("base_model")
        self.base = None if base is None else model_name(base, "base_model")
        self.needs = RULES[self.method.rule].needs
        self.adapter = adapters.parse(document.get("adapter"), document, self.name, self.method)

    def known(self, word: Any, words: Any, what: str) -> bool:
        """Say whether `word` counts here; one that has no effect is noted, one that is no word is refused.

        Under compat="mergekit" that is noted too.
        """
        try:
            known(word, words, what)
        except ValueError as error:
            if (note := idle(word, what)) is not None:
                self.notes.append(note)
                return False
            if not self.lenient:
                raise
            self.notes.append(f"{error}; ignored, as mergekit does")
            return False
        return True

    def recipe(self, text: str) -> Recipe:
        document = self.document
        modules = self.modules()
        for key in ("name", "chat_template"):
            if document.get(key) is not None and not isinstance(document[key], str):
                raise ValueError(f"{key} is {document[key]!r}, wanted text")
        if document.get("chat_template"):
            check_template(document["chat_template"])
        given = [document[key] for key in ("tokenizer", "tokenizer_source") if document.get(key) is not None]
        if len(given) > 1:
            raise ValueError("'tokenizer' and 'tokenizer_source' are both given; keep tokenizer: {source: …}")
        tokenizer = parse_tokenizer(given[0]) if given else None
        return Recipe(
            self.name, modules, self.base, self.parameters(document.get("parameters")),
            floating_dtype(document.get("dtype"), "dtype"), floating_dtype(document.get("out_dtype"), "out_dtype"),
            read_seed(document), tokenizer, document.get("chat_template"), document.get("name"), text,
            tuple(self.notes), self.adapter,
        )  # fmt: skip

    def modules(self) -> tuple[Module, ...]:
        given = [key for key in ("models", "slices", "modules") if self.document.get(key) is not None]
        if len(given) != 1:
            found = " and ".join(map(repr, given)) or "none"
            raise ValueError(f"exactly one of 'models', 'slices' and 'modules' is wanted, found {found}")
        if given != ["modules"]:
            return (self.module("default", {given[0]: self.document[given[0]]}),)
        modules = self.document["modules"]
        if not isinstance(modules, Mapping) or not modules:
            raise ValueError(f"'modules' must be a mapping of names to {{models or slices}}, found {modules!r}")
        return tuple(self.module(str(name), value) for name, value in modules.items())

    def module(self, name: str, value: Any) -> Module:
        if not isinstance(value, Mapping) or ("models" in value) == ("slices" in value):
            raise ValueError(f"module {name!r} must have either models or slices, found {value!r}")
        for key in value:
            self.known(key, MODULE_KEYS, f"key of module {name!r}")
        own = self.parameters(value.get("parameters"))
        if "slices" in value:
            slices = [self.slice(s, i) for i, s in enumerate(listed(value["slices"], "slices", "sources: […]"))]
            return Module(name, tuple(slices), own)
        entries = [self.entry(e, sliced=False) for e in listed(value["models"], "models", "model: path")]
        if self.adapter is None and self.base is not None and self.base not in [entry.model for entry in entries]:
            # In mergekit the base is always one of the models: for linear and its like, one more to merge.
            entries.append(Entry(self.base, {}))
            if self.method.base_is_input and not self.method.base_first:
                self.notes.append(
                    f"base_model {self.base!r} is not among the models: one more to merge, as in mergekit"
                )
        return Module(name, (self.checked(Slice(tuple(entries), self.base, {}), "models"),), own)

    def slice(self, value: Any, index: int) -> Slice:
        if not isinstance(value, Mapping):
            raise ValueError(f"an entry of 'slices' is {{sources: […]}}, found {value!r}")
        for key in value:
            self.known(key, SLICE_KEYS, "key of a slice")
        if "residual_weight" in value:
            self.notes.append("'residual_weight' of a slice has no effect, in mergekit neither")
        entries = [self.entry(e, sliced=True) for e in listed(value.get("sources"), "sources", "model, layer_range")]
        own = value.get("base_model")
        base = self.base if own is None else model_name(own, "base_model")
        ranges = [entry.layers for entry in entries if entry.layers is not None]
        if len({b - a for a, b in ranges}) > 1:
            raise ValueError(f"sources of slice {index} have layer_ranges of unlike length {[list(r) for r in ranges]}")
        parameters = self.parameters(value.get("parameters"))
        return self.checked(Slice(tuple(entries), base, parameters), f"slice {index}")

    def checked(self, part: Slice, what: str) -> Slice:
        """Raise unless the sources are what the method takes."""
        names = [entry.model for entry in part.sources]
        seen = [(entry.model, entry.layers) for entry in part.sources]
        twice = next((entry for entry in seen if seen.count(entry) > 1), None)
        if twice is not None:
            raise ValueError(f"model {twice[0]!r} stands twice in {what}; name it once, with the sum of the weights")
        if self.adapter is not None:
            adapters.check(names, self.base, self.name, self.needs)
            return part
        if (reads := self.method.reads) and (without := [e.model for e in part.sources if e.statistics is None]):
            raise ValueError(
                f"{self.name} needs the statistics of model {without[0]!r} in {what}: write statistics: FOLDER beside "
                f"it; jaxmerge statistics {without[0]} DATA FOLDER kind={reads.kind} makes the folder"
            )
        inputs, base = part.roles(self.method)
        takes_base = self.method.base_first or not self.method.base_is_input
        if takes_base and part.base is not None and part.base not in names:
            raise ValueError(f"base_model {part.base!r} is no source of {what}; add it with its layer_range")
        if (self.needs.base == "required" and base is None) or (self.name == "slerp" and part.base is None):
            raise ValueError(f"{self.name} needs a base_model")
        alone = self.method.base_alone and not inputs
        count = len(inputs)
        if not alone and (count < self.needs.least or (self.needs.most is not None and count > self.needs.most)):
            raise ValueError(f"{self.name} needs {self.needs}; found {count} models in {what}: {names}")
        return part

    def entry(self, value: Any, *, sliced: bool) -> Entry:
        keys = SOURCE_KEYS if sliced else MODEL_KEYS
        if not isinstance(value, Mapping):
            raise ValueError(f"a model is {{{', '.join(keys)}}}, found {value!r}")
        for key in value:
            self.known(key, keys, "key of a model")
        model = model_name(value.get("model"), "model")
        layers = layer_range(value.get("layer_range"), model) if sliced else None
        statistics = self.statistics(value.get("statistics"), model)
        return Entry(model, self.parameters(value.get("parameters"), model), layers, statistics)

    def statistics(self, value: Any, model: str) -> str | None:
        """Check the folder of statistics that stands beside a model."""
        if value is not None and (not isinstance(value, str) or not value):
            raise ValueError(f"statistics of model {model!r} is {value!r}, wanted the path of a folder")
        if value is not None and self.method.reads is None:
            self.notes.append(f"'statistics' has no effect in {self.name}, which reads none; found at model {model!r}")
            return None
        return value

    def parameters(self, value: Any, model: str | None = None) -> Scope:
        """Check a mapping of parameters; at a model only those that are one a model."""
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise ValueError(f"'parameters' must be a mapping, found {value!r}")
        kept = {}
        for name, setting in value.items():
            if name in (*IGNORED, *self.method.unused):
                continue
            words = [*self.method.parameters, *self.method.unused]
            if not self.known(name, words, f"parameter of {self.name}"):
                continue
            if model is not None and name not in self.method.each:
                self.notes.append(
                    f"parameter {name!r} of {self.name} is one for all models, found at model {model!r}: it has no "
                    "effect there; move it to the 'parameters' of the slice or recipe"
                )
                continue
            kept[name] = check(name, setting, self.method.parameters[name][1])
        return kept
