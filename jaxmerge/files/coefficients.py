"""The coefficients of a tensor: what a recipe's parameters are there, as keywords of the rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxmerge.consensus import cancel
from jaxmerge.files.methods import METHODS, REQUIRED, Number, Scope, resolve
from jaxmerge.files.recipe import Recipe
from jaxmerge.sparsify import check_room

SHARES = {"density": "[0, 1]", "gamma": "[0, 1]", "select_topk": "[0, 1]", "drop": "[0, 1)"}
# Rules that divide by Σw; others take 1 where it is zero.
DIVIDED = ("average", "multislerp", "extrapolation_merge", "fisher")


class Of(NamedTuple):
    """An input of the rule: its model, the tensor's name in it, and the parameters that stand at the model."""

    model: str
    name: str
    parameters: Scope


def coefficients(
    recipe: Recipe, name: str, t: float, inputs: Sequence[Of], outer: Sequence[Scope], *, compat: str | None = None
) -> dict[str, Any]:
    """Return the rule's keywords: what is one a model by the names of the models' tensors, else by the result's.

    Args:
      recipe: whose method's rule it is.
      name: of the tensor in the result.
      t: its depth in [0, 1].
      inputs: of the rule, in its order.
      outer: the scopes around the models, the nearest first.
      compat: as in `plan.make`.

    Raises:
      ValueError: a parameter is missing, or no value that the rule takes.
    """
    method = recipe.method
    found: dict[str, Any] = {}
    for parameter, (keyword, default) in method.each.items():
        found[keyword] = [
            _value(recipe, parameter, default, (of.parameters, *outer), of.name, t, of.model) for of in inputs
        ]
    for parameter, (keyword, default) in (*method.shared.items(), *method.options.items()):
        found[keyword] = _value(recipe, parameter, default, outer, name, t, None)
    if {"density", "epsilon"} <= set(method.each):
        for of, density, epsilon in zip(inputs, found["density"], found["epsilon"], strict=True):
            check_room(density, epsilon, f"tensor {name!r} of model {of.model!r}: ")
    if method is METHODS["passthrough"]:
        found["scale"] = found["scale"][0]
    if method.rule in DIVIDED and found.get("normalize", True):
        _check_sum(recipe, name, found["weights"])
    if "rescale" in found:
        found["rescale"] = "l1" if found["rescale"] else None  # mergekit's keeps the L1 norm of the tensor
    return found | ({"compat": compat} if method.compat else {})


def _check_sum(recipe: Recipe, name: str, weights: Sequence[float]) -> None:
    """Raise if weights sum to zero, but for rounding: the rule would say so too, after hours of other tensors."""
    if not cancel(weights):
        return
    switch = next((key for key, (keyword, _) in recipe.method.options.items() if keyword == "normalize"), None)
    raise ValueError(
        f"tensor {name!r}: the weights {weights} of {recipe.merge_method} sum to zero, which they are divided by; "
        f"change one{f', or set {switch}: false' if switch else ''}"
    )


def _value(
    recipe: Recipe, parameter: str, default: Any, scopes: Sequence[Scope], name: str, t: float, model: str | None
) -> Number:
    value = resolve(parameter, default, scopes, name, t)
    of = f" of model {model!r}" if model else ""
    if value is None:
        assert default is REQUIRED
        stray = next((f"; {note}" for note in recipe.notes if repr(parameter) in note), "")
        raise ValueError(f"{recipe.merge_method} needs the parameter {parameter!r}{of} for tensor {name!r}{stray}")
    wanted = SHARES.get(parameter) if recipe.merge_method in METHODS else None
    if wanted and not (0 <= value < 1 or (value == 1 and wanted.endswith("]"))):
        raise ValueError(f"tensor {name!r}: {parameter}{of} is {value}, wanted a share in {wanted}")
    return value
