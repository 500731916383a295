r"""METHODS: how a recipe's method becomes a call of a rule, and what a parameter in YAML is and means.

A setting is a number, a gradient (a list, piecewise linear over the depth t in [0, 1]), or a list of
`{filter: substring, value: setting}` of which the first that matches the tensor's dotted name wins.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmerge import where
from jaxmerge.contract import coefficients_of
from jaxmerge.rules import RULES


@dataclasses.dataclass(frozen=True)
class Reads:
    """Statistics of each model that a rule takes (`jaxmerge.files.statistics`).

    kind: of statistics. keyword: of the rule, which takes a mapping from path to array of each model. everywhere: the
    rule needs those of every tensor; else it does without where no model has them.
    """

    kind: str
    keyword: str
    everywhere: bool


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of recipes: its rule, and its parameters' names there and here, scopes and defaults.

    A parameter is `{name in YAML: (name of the rule's coefficient, default)}`; the default's type says what kind it
    is: true or false, a whole number, a number. REQUIRED has no default.
    """

    rule: str
    each: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)  # one a model
    shared: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)  # one for all
    options: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)  # one for all, static in the rule
    base_is_input: bool = False  # the base is one of the models, not what deltas are taken from
    base_first: bool = False  # and it is the first of them, whatever the order in the recipe
    base_alone: bool = False  # of the base alone, the result is the base
    unused: tuple[str, ...] = ()  # parameters of the grammar that change nothing in this method
    compat: bool = False  # the rule takes compat="mergekit"
    reads_base: bool = False  # the rule looks at the base's own values, not at changes from it alone
    reads: Reads | None = None  # statistics that stand beside each model

    @property
    def parameters(self) -> dict[str, tuple[str, Any]]:
        """Every parameter that has an effect."""
        return {**self.each, **self.shared, **self.options}


REQUIRED = object()
IGNORED = ("int8_mask",)  # a memory setting of mergekit, without effect on the numbers
EXTENSION = "x-"  # how YAML files of many programs begin keys that are for people or for anchors
_WEIGHT = {"weight": ("weights", REQUIRED)}
_LAMBDA = {"lambda": ("scale", 1.0)}


def _sparse(
    rule: str, normalize: bool, rescale: bool, ours: Mapping[str, tuple[str, Any]] | None = None, **more: float
) -> Method:
    """A method of the delta family: weight, density and more a model; lambda; normalize and rescale.

    ours: options that mergekit's method does not have.
    """
    return Method(
        rule,
        each={**_WEIGHT, "density": ("density", 1.0), **{name: (name, default) for name, default in more.items()}},
        shared=_LAMBDA,
        options={"normalize": ("normalize", normalize), "rescale": ("rescale", rescale), **(ours or {})},
        base_alone=True,
    )


def _weighted(rule: str, options: Mapping[str, tuple[str, Any]] | None = None, **shared: float) -> Method:
    """A method of task vectors: weight a model, 1 by default; lambda and more for all."""
    return Method(
        rule,
        each={"weight": ("weights", 1.0)},
        shared={**_LAMBDA, **{name: (name, default) for name, default in shared.items()}},
        options=options or {},
        base_alone=True,
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
        base_alone=True,
        unused=("density", "rescale"),
    ),
    "ties": _sparse("ties", normalize=True, rescale=False, ours={"weighted_election": ("weighted_election", True)}),
    "dare_linear": _sparse("dare", normalize=False, rescale=True),
    "dare_ties": _sparse("dare_ties", normalize=False, rescale=True),
    "della": _sparse("della", normalize=True, rescale=True, epsilon=0.15),
    "della_linear": _sparse("della_linear", normalize=False, rescale=True, epsilon=0.15),
    "breadcrumbs": _sparse("breadcrumbs", normalize=False, rescale=False, gamma=0.01),
    "breadcrumbs_ties": _sparse("breadcrumbs_ties", normalize=False, rescale=False, gamma=0.01),
    "sce": Method("sce", shared={"select_topk": ("select_topk", 1.0)}, base_alone=True, compat=True),
    "model_stock": Method("model_stock", options={"filter_wise": ("filter_wise", False)}, compat=True),
    "nearswap": Method("nearswap", shared={"t": ("t", REQUIRED)}),
    "arcee_fusion": Method("arcee_fusion", reads_base=True),
    "ram": Method("ram", shared={"epsilon": ("epsilon", 1e-5)}, base_alone=True),
    "ramplus_tl": Method(
        "ramplus_tl",
        shared={"epsilon": ("epsilon", 1e-5), "r": ("r", 0.1), "alpha": ("alpha", 0.2)},
        base_alone=True,
    ),
    "passthrough": Method("passthrough", each={"scale": ("scale", 1.0)}, base_is_input=True),
    # Ours, in the same grammar.
    "interpolate": Method("interpolate", shared={"t": ("t", 0.5)}, base_is_input=True, base_first=True),
    "extrapolate": Method("extrapolate", shared={"alpha": ("alpha", REQUIRED)}),
    "extrapolation_merge": Method(
        "extrapolation_merge", each={"alpha": ("alphas", REQUIRED), "weight": ("weights", 1.0)}
    ),
    "imm": Method("imm", shared={"alpha": ("alpha", 0.5), "drop": ("drop", 0.0)}),
    "magmax": _weighted("magmax"),
    "consensus_ta": _weighted("consensus_ta", {"least": ("least", 2)}, share=0.4),
    "tatr": _weighted("tatr", region=0.99),
    "norm_aware": _weighted("norm_aware"),
    "tsvm": _weighted("tsvm", tolerance=1e-5),
    "iso_c": _weighted("iso_c", tolerance=1e-5),
    "iso_cts": _weighted("iso_cts", {"common": ("common", 0.8)}, tolerance=1e-5),
    "wudi": _weighted("wudi", damping=1e-6),
    "svc": _weighted("svc", alpha=1.0),
    "opcm": _weighted("opcm", alpha=0.5),
    "fisher": Method(
        "fisher",
        each={"weight": ("weights", 1.0)},
        shared={"floor": ("floor", 1e-6)},
        base_is_input=True,
        reads=Reads("fisher", "fishers", everywhere=True),
    ),
    "regmean": Method(
        "regmean",
        shared={"damping": ("damping", 0.1)},
        base_is_input=True,
        reads=Reads("gram", "grams", everywhere=False),
    ),
}
COPY = METHODS["passthrough"]


def methods() -> dict[str, Method]:
    """METHODS, and every rule that no method there stands for, if its coefficients are numbers with defaults.

    So a new rule is in recipes without a word here: `weights` is `weight` of each model, the others keep their names.
    """
    there = {*METHODS, *(method.rule for method in METHODS.values())}
    new = {name: _by_signature(name) for name in RULES if name not in there}
    return METHODS | {name: method for name, method in new.items() if method is not None}


def _by_signature(name: str) -> Method | None:
    given = {coefficient: p.default for coefficient, p in coefficients_of(RULES[name]).items()}
    each = {"weight": ("weights", 1.0)} if "weights" in given else {}
    given.pop("weights", None)
    if not all(isinstance(default, bool | int | float) for default in given.values()):
        return None
    traced = {key: (key, default) for key, default in given.items() if type(default) is float}
    static = {key: (key, default) for key, default in given.items() if key not in traced}
    return Method(name, each, traced, static, base_is_input=RULES[name].needs.base == "none")


@dataclasses.dataclass(frozen=True)
class Condition:
    """`{filter, value}`: the value for tensors with `filter` in their name, None or "*" for all."""

    filter: str | None
    value: Setting

    def matches(self, name: str) -> bool:
        return self.filter in (None, "*") or self.filter in name


Number = float | int | bool
Setting = Number | tuple[Number, ...] | tuple[Condition, ...]
Scope = Mapping[str, Setting]
# What YAML and pydantic between them take for a truth value.
_TRUE, _FALSE = ("true", "yes", "on", "y", "t", "1"), ("false", "no", "off", "n", "f", "0")


def known(word: Any, words: Sequence[str] | Mapping[str, Any], what: str) -> None:
    """Raise if `word` is not one of `words`, naming the nearest."""
    if isinstance(word, str) and word in words:  # YAML may put anything where a word belongs
        return
    near = difflib.get_close_matches(str(word), list(words), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {what} {word!r}; {hint}there are {', '.join(words)}")


def check(name: str, setting: Any, default: Any) -> Setting:
    """Check a setting as YAML gives it and return it with its numbers as numbers.

    Example:
      >>> check("weight", [{"filter": "mlp", "value": [0, "1e-1"]}, {"value": 0.3}], 1.0)[0]
      Condition(filter='mlp', value=(0.0, 0.1))
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return _number(name, setting, setting, default)
    if not setting or not any(isinstance(entry, Mapping) for entry in setting):
        if not setting:
            raise ValueError(f"parameter {name!r} is an empty list, wanted {_wanted(default)}")
        return tuple(_number(name, entry, setting, default) for entry in setting)
    return tuple(_condition(name, entry, default) for entry in setting)


def _condition(name: str, entry: Any, default: Any) -> Condition:
    if not isinstance(entry, Mapping):
        raise ValueError(f"parameter {name!r} mixes numbers and conditions; write {{value: {entry}}} for {entry!r}")
    for key in entry:
        if not str(key).startswith(EXTENSION):
            known(key, ("filter", "value"), f"key of a condition of {name!r}")
    if "value" not in entry:
        raise ValueError(f"a condition of {name!r} has no 'value': {dict(entry)}")
    pattern = entry.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        raise ValueError(f"the filter of a condition of {name!r} is {pattern!r}, wanted a part of tensor names")
    return Condition(pattern, check(name, entry["value"], default))


def _number(name: str, value: Any, setting: Any, default: Any) -> Number:
    """One number or truth value; text counts where it reads as one (YAML 1.1 takes 1e-5 for text)."""
    found: Number | None = None
    if isinstance(default, bool):
        if isinstance(value, bool) or value in (0, 1):
            found = bool(value)
        elif isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
            found = value.lower() in _TRUE
    elif isinstance(value, bool | int | float | str):
        try:
            found = float(value)
        except ValueError:
            found = None
        if found is not None and not math.isfinite(found):
            found = None
    if found is None:
        raise ValueError(f"parameter {name!r} is {setting!r}, wanted {_wanted(default)}")
    return found


def _wanted(default: Any) -> str:
    if isinstance(default, bool):
        return "true or false, a list of these, or a list of {filter, value}"
    return "a number, a list of numbers, or a list of {filter, value}"


def evaluate(setting: Setting, name: str, t: float) -> Number | None:
    """Resolve a setting for a tensor at depth `t`, or None if no filter of it matches.

    Example:
      >>> evaluate((Condition("mlp", (0.0, 1.0)), Condition(None, 0.3)), "model.layers.1.mlp.w", 0.5)
      0.5
    """
    if not isinstance(setting, tuple):
        return setting
    numbers = [entry for entry in setting if not isinstance(entry, Condition)]
    if not numbers:
        found = next((c for c in setting if isinstance(c, Condition) and c.matches(name)), None)
        return None if found is None else evaluate(found.value, name, t)
    if isinstance(numbers[0], bool):  # a gradient of truth values: the one at or before t
        return numbers[int(t * (len(numbers) - 1))]
    return where.resolve(numbers, name, t, name="parameter")


def resolve(parameter: str, default: Any, scopes: Sequence[Scope], name: str, t: float) -> Number | None:
    """Return the value in the first scope that gives one, else the default; None if there is no default."""
    value: Any = None
    for scope in scopes:
        if parameter in scope:
            value = evaluate(scope[parameter], name, t)
            if value is not None:
                break
    else:
        value = None if default is REQUIRED else default
    if value is not None and isinstance(default, int) and not isinstance(default, bool):
        if value != int(value):
            raise ValueError(f"parameter {parameter!r} of tensor {name!r} is {value}, wanted a whole number")
        return int(value)
    return value
