r"""Recipes: mergekit's YAML grammar, our methods in the same one, typed and refused where not understood.

    merge_method: task_arithmetic          # a name of METHODS
    base_model: path/of/base               # where the method takes one
    models:
      - model: path/of/one
        parameters: {weight: 0.5}          # number | [gradient over depth] | [{filter: substring, value: …}, …]
      - model: path/of/two
        parameters: {weight: [0.2, 0.8]}
    parameters: {lambda: 0.9}              # for all models, where the model itself says nothing
    dtype: float32                         # inputs are cast to this first; by default as stored
    out_dtype: bfloat16                    # the result's; by default dtype, else as the first model stores it
    seed: 0                                # ours: of the random methods

A filter is a substring of the tensor's dotted name, the first that matches wins, and a gradient is piecewise
linear in layer / (layers − 1), 0 outside the layers, all as in mergekit.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml

from jaxmerge import where
from jaxmerge.files.safetensors import DTYPES
from jaxmerge.rules import RULES


@dataclasses.dataclass(frozen=True)
class Method:
    """How a recipe's method becomes a call of a rule: its parameters' names, scopes and defaults."""

    rule: str
    each: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)
    options: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)
    base_is_input: bool = False  # the base is one of the models, not what deltas are taken from
    base_first: bool = False  # and it is the first of them, whatever the order in the recipe
    unused: tuple[str, ...] = ()  # parameters of the grammar that change nothing in this method
    compat: bool = False  # the rule takes compat="mergekit"

    @property
    def parameters(self) -> tuple[str, ...]:
        return (*self.each, *self.shared, *self.options, *self.unused)


REQUIRED = object()
DEFAULT = object()  # leave it to the rule: its default is the same
_WEIGHT = {"weight": ("weights", REQUIRED)}
_LAMBDA = {"lambda": ("scale", 1.0)}


def _sparse(rule: str, normalize: bool, rescale: bool, **more: Any) -> Method:
    """A method of the delta family: weight, density and more a model; lambda; normalize and rescale."""
    return Method(
        rule,
        each={**_WEIGHT, "density": ("density", 1.0), **{name: (name, DEFAULT) for name in more}},
        shared=_LAMBDA,
        options={"normalize": ("normalize", normalize), "rescale": ("rescale", rescale)},
    )


METHODS: dict[str, Method] = {
    "linear": Method("average", each=_WEIGHT, options={"normalize": ("normalize", True)}, base_is_input=True),
    "slerp": Method("slerp", shared={"t": ("t", REQUIRED)}, base_is_input=True, base_first=True),
    "nuslerp": Method(
        "nuslerp",
        each=_WEIGHT,
        options={"nuslerp_row_wise": ("row_wise", False), "nuslerp_flatten": ("flatten", True)},
    ),
    "multislerp": Method(
        "multislerp",
        each=_WEIGHT,
        options={"normalize_weights": ("normalize", True), "eps": ("eps", 1e-8)},
    ),
    "karcher": Method("karcher", options={"max_iter": ("max_iter", 10), "tol": ("tol", 1e-5)}, base_is_input=True),
    "task_arithmetic": Method(
        "task_arithmetic",
        each=_WEIGHT,
        shared=_LAMBDA,
        options={"normalize": ("normalize", False)},
        unused=("density", "rescale"),
    ),
    "ties": _sparse("ties", normalize=True, rescale=False),
    "dare_linear": _sparse("dare", normalize=False, rescale=True),
    "dare_ties": _sparse("dare_ties", normalize=False, rescale=True),
    "della": _sparse("della", normalize=True, rescale=True, epsilon=DEFAULT),
    "della_linear": _sparse("della_linear", normalize=False, rescale=True, epsilon=DEFAULT),
    "breadcrumbs": _sparse("breadcrumbs", normalize=False, rescale=False, gamma=DEFAULT),
    "breadcrumbs_ties": _sparse("breadcrumbs_ties", normalize=False, rescale=False, gamma=DEFAULT),
    "sce": Method("sce", shared={"select_topk": ("select_topk", 1.0)}, compat=True),
    "model_stock": Method("model_stock", options={"filter_wise": ("filter_wise", False)}, compat=True),
    "nearswap": Method("nearswap", shared={"t": ("t", REQUIRED)}),
    "arcee_fusion": Method("arcee_fusion"),
    "ram": Method("ram", shared={"epsilon": ("epsilon", DEFAULT)}),
    "ramplus_tl": Method(
        "ramplus_tl", shared={"epsilon": ("epsilon", DEFAULT), "r": ("r", DEFAULT), "alpha": ("alpha", DEFAULT)}
    ),
    "passthrough": Method("passthrough", shared={"scale": ("scale", 1.0)}, base_is_input=True),
    "interpolate": Method("interpolate", shared={"t": ("t", 0.5)}, base_is_input=True),
    "extrapolate": Method("extrapolate", shared={"alpha": ("alpha", REQUIRED)}),
    "extrapolation_merge": Method(
        "extrapolation_merge", each={"alpha": ("alphas", REQUIRED), "weight": ("weights", 1.0)}
    ),
    "imm": Method("imm", shared={"alpha": ("alpha", 0.5), "drop": ("drop", 0.0)}),
}
KEYS = (
    "merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "seed", "name",
    "slices", "modules", "tokenizer", "tokenizer_source", "chat_template",
)  # fmt: skip
IGNORED = ("int8_mask",)  # a memory setting of old mergekit, without effect on the numbers
FLOATS = {str(dtype): dtype for dtype in DTYPES.values() if jnp.issubdtype(dtype, jnp.floating)}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of a recipe and its own parameters."""

    model: str
    parameters: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe. `models` are the inputs of the rule in order; `base` is what it takes deltas from."""

    method: Method
    merge_method: str
    models: tuple[Entry, ...]
    base: str | None
    parameters: Mapping[str, Any]
    dtype: np.dtype | None
    out_dtype: np.dtype | None
    seed: int
    text: str

    @property
    def sources(self) -> list[str]:
        """Every model to open, once."""
        names = [entry.model for entry in self.models]
        return list(dict.fromkeys(names if self.base is None else [*names, self.base]))

    def coefficients(self, name: str, depth: float) -> dict[str, Any]:
        """Return the rule's coefficients and options for the tensor of dotted name `name`."""
        found: dict[str, Any] = {}
        for yaml_name, (coefficient, default) in self.method.each.items():
            values = [
                self._value(yaml_name, default, (entry.parameters, self.parameters), name, depth, entry.model)
                for entry in self.models
            ]
            given = [value for value in values if value is not DEFAULT]
            if given and len(given) < len(values):
                raise ValueError(f"{yaml_name!r} is given for some models and not for others; give it for all")
            if given:
                found[coefficient] = values
        for yaml_name, (coefficient, default) in (*self.method.shared.items(), *self.method.options.items()):
            # What stands at one model means the same as for all, where a method has one of it.
            scopes = (*(entry.parameters for entry in self.models), self.parameters)
            value = self._value(yaml_name, default, scopes, name, depth, None)
            if value is not DEFAULT:
                found[coefficient] = value
        if "rescale" in found:
            found["rescale"] = "l1" if found["rescale"] else None  # mergekit's keeps the L1 norm of the tensor
        return found

    def _value(self, parameter, default, scopes, name: str, depth: float, model: str | None) -> Any:
        for scope in scopes:
            if parameter in scope:
                value = evaluate(scope[parameter], name, depth)
                if value is not None:
                    return value
        if default is REQUIRED:
            of = f" of model {model!r}" if model else ""
            raise ValueError(f"{self.merge_method} needs the parameter {parameter!r}{of} for tensor {name!r}")
        return default


def evaluate(setting: Any, name: str, depth: float) -> Any:
    """Resolve one YAML setting for a tensor, or None if no filter of it matches.

    Example:
      >>> evaluate([{"filter": "mlp", "value": [0, 1]}, {"value": 0.3}], "model.layers.1.mlp.w", 0.5)
      0.5
    """
    if isinstance(setting, list) and setting and all(isinstance(entry, Mapping) for entry in setting):
        for entry in setting:
            if entry.get("filter") in (None, "*") or entry["filter"] in name:
                return evaluate(entry["value"], name, depth)
        return None
    if isinstance(setting, Mapping):
        return evaluate([setting], name, depth)
    if isinstance(setting, bool | str):
        return setting
    return where.resolve(setting, name.replace(".", "/"), depth, name="parameter")


def read(path: pathlib.Path) -> Recipe:
    """Read and check a recipe file; relative model paths are relative to the current folder."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"cannot read the recipe {path}: {error.strerror}") from None
    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if len(documents) != 1:
        raise ValueError(
            f"{path} holds {len(documents)} documents; multi-stage recipes are not supported yet: run one at a time"
        )
    try:
        return parse(documents[0], text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse(document: Any, text: str = "") -> Recipe:
    """Check a recipe given as plain data."""
    if not isinstance(document, Mapping):
        raise ValueError(f"a recipe is a mapping with merge_method and models, found {type(document).__name__}")
    for key in document:
        known(key, KEYS, "key")
    for key in ("slices", "modules", "chat_template"):
        if document.get(key) is not None:
            raise ValueError(f"{key!r} is not supported yet; list whole models under 'models'")
    if document.get("tokenizer") is not None or document.get("tokenizer_source") not in (None, "base"):
        raise ValueError(
            "only 'tokenizer_source: base' is supported yet: the tokenizer is copied from base_model, else from "
            "the first model"
        )
    merge_method = document.get("merge_method")
    if merge_method is None:
        raise ValueError(f"no 'merge_method'; there are {', '.join(METHODS)}")
    known(merge_method, METHODS, "merge_method")
    method = METHODS[merge_method]
    parameters = _parameters(document.get("parameters"), method, merge_method)
    entries = [_entry(entry, method, merge_method) for entry in _list(document.get("models"), "models")]
    base = document.get("base_model")
    if base is not None:
        base = _model(base, "base_model")
    needs = RULES[method.rule].needs
    names = [entry.model for entry in entries]
    if not method.base_is_input:
        # mergekit's recipes list the base among the models too; it carries no delta.
        entries = [entry for entry in entries if entry.model != base]
    elif base is not None and method.base_first:
        own = [entry for entry in entries if entry.model == base] or [Entry(base, {})]
        entries = own + [entry for entry in entries if entry.model != base]
    elif base is not None and base not in names:
        raise ValueError(f"base_model {base!r} is not among the models {names}, which {merge_method} merges")
    if needs.base == "required" and base is None:
        raise ValueError(f"{merge_method} needs a base_model")
    if len(entries) < needs.least or (needs.most is not None and len(entries) > needs.most):
        raise ValueError(f"{merge_method} needs {needs}; found {len(entries)} models")
    seed = document.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed {seed!r} is no integer")
    return Recipe(
        method, merge_method, tuple(entries), None if method.base_is_input else base, parameters,
        _dtype(document.get("dtype"), "dtype"), _dtype(document.get("out_dtype"), "out_dtype"), seed,
        text or yaml.safe_dump(dict(document), sort_keys=False),
    )  # fmt: skip


def known(word: Any, words: Sequence[str] | Mapping[str, Any], what: str) -> None:
    """Raise if `word` is not one of `words`, naming the nearest."""
    if word in words:
        return
    near = difflib.get_close_matches(str(word), list(words), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {what} {word!r}; {hint}there are {', '.join(words)}")


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name!r} must be a list of {{model: path}}, found {value!r}")
    return value


def _entry(entry: Any, method: Method, merge_method: str) -> Entry:
    if not isinstance(entry, Mapping):
        raise ValueError(f"an entry of 'models' is {{model: path, parameters: …}}, found {entry!r}")
    for key in entry:
        known(key, ("model", "parameters"), "key of a model")
    own = _parameters(entry.get("parameters"), method, merge_method)
    return Entry(_model(entry.get("model"), "model"), own)


def _model(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, wanted the path of a folder")
    if "+" in value and not pathlib.Path(value).exists():
        raise ValueError(f"{name} {value!r}: 'model+adapter' is not supported yet; merge the adapter in first")
    return value


def _parameters(value: Any, method: Method, merge_method: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"'parameters' must be a mapping, found {value!r}")
    kept = {}
    for name, setting in value.items():
        if name in IGNORED:
            continue
        known(name, method.parameters, f"parameter of {merge_method}")
        is_switch = isinstance(method.options.get(name, (None, None))[1], bool)
        _check_setting(name, setting, is_switch)
        kept[name] = setting
    return kept


def _check_setting(name: str, setting: Any, is_switch: bool) -> None:
    if isinstance(setting, list) and setting and all(isinstance(entry, Mapping) for entry in setting):
        for entry in setting:
            for key in entry:
                known(key, ("filter", "value"), f"key of a condition of {name!r}")
            if "value" not in entry:
                raise ValueError(f"a condition of {name!r} has no 'value': {dict(entry)}")
            _check_setting(name, entry["value"], is_switch)
        return None
    if isinstance(setting, Mapping):
        return _check_setting(name, [setting], is_switch)
    values = setting if isinstance(setting, list) else [setting]
    wanted = bool if is_switch else int | float
    right = all(isinstance(v, wanted) and isinstance(v, bool) == is_switch for v in values)
    if not values or not right or (is_switch and isinstance(setting, list)):
        kind = "true or false" if is_switch else "a number, a list of numbers, or a list of {filter, value}"
        raise ValueError(f"parameter {name!r} is {setting!r}, wanted {kind}")
    return None


def _dtype(value: Any, name: str) -> np.dtype | None:
    if value is None or value == "auto":
        return None
    known(value, FLOATS, name)
    return FLOATS[value]
