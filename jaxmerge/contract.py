r"""What a rule is: one signature, what it needs, and the checks of what it is called with.

A rule is a function `rule(models, *, base=None, key=None, names=None, stacked=(), donate=False, <coefficients>)`. Every
coefficient stands in its signature with its type, and with its default where it has one. `requires` makes a rule of
such a function, which then takes `donate=True` too: the result is written over the first model, whose arrays are gone
after the call. That saves the result's memory, and on CPUs the time that fresh memory takes.
"""

from __future__ import annotations

import contextvars
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol

from jaxmerge.tree import PyTree

P = ParamSpec("P")
INPUTS = ("models", "base", "key", "names", "stacked", "donate")
"""The parameters that every rule has; the others are its coefficients."""
EMPTY: Any = inspect.Parameter.empty
DONATE: contextvars.ContextVar[bool] = contextvars.ContextVar("donate", default=False)
"""Whether the rule that runs may write its result over its first model."""


@dataclass(frozen=True)
class Needs:
    """What a rule needs: how many models (`most` None: no limit), a base, a key; and what it promises."""

    least: int = 1
    most: int | None = None
    base: str = "none"  # "none", "optional" or "required"
    key: str = "none"  # "none", "optional" (only for some coefficients) or "required"
    symmetric: bool = False  # swapping models together with their weights and names changes nothing
    elementwise: bool = False  # element j of the result depends on element j of the inputs alone

    def __str__(self) -> str:
        count = f"{self.least}" if self.most == self.least else f"≥{self.least}"
        if self.most not in (None, self.least):
            count = f"{self.least}–{self.most}"
        words = [f"{count} model{'s' if count != '1' else ''}"]
        words += [f"base{' (optional)' if self.base == 'optional' else ''}"] * (self.base != "none")
        words += [f"key{' (optional)' if self.key == 'optional' else ''}"] * (self.key != "none")
        return ", ".join(words)


class Rule(Protocol[P]):
    """A function of the one signature with its `needs`: pytrees in, one pytree out.

    `P` are the parameters of the function, so that an editor and a type checker see every coefficient of a rule that
    they know by name. Plain `Rule` is any rule.
    """

    needs: Needs
    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> PyTree: ...


def requires(**needs: Any) -> Callable[[Callable[P, PyTree]], Rule[P]]:
    """Mark a function as a rule with these `Needs`: it carries them, and its arguments are checked first."""

    def mark(function: Callable[P, PyTree]) -> Rule[P]:
        known = coefficients_of(function)
        hidden = [name for name, p in known.items() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        if hidden:
            raise TypeError(
                f"rule {function.__name__} takes *{hidden[0]}, which hides its coefficients; write each of them into "
                "the signature: (models, *, base=None, key=None, names=None, stacked=(), scale=1.0)"
            )

        @functools.wraps(function)
        def checked(models, *, base=None, key=None, names=None, stacked=(), donate=False, **coefficients):
            check_inputs(checked.__name__, checked.needs, models, base, key, names)  # type: ignore[attr-defined]
            check_coefficients(checked.__name__, known, coefficients)
            token = DONATE.set(donate)
            try:
                return function(models, base=base, key=key, names=names, stacked=stacked, **coefficients)  # type: ignore[call-arg]
            finally:
                DONATE.reset(token)

        checked.needs = Needs(**needs)  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return mark


def coefficients_of(rule: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a rule that are its coefficients, by name.

    Example:
      >>> from jaxmerge import RULES
      >>> list(coefficients_of(RULES["nuslerp"]))
      ['weights', 'flatten', 'row_wise']
    """
    return {name: p for name, p in inspect.signature(rule).parameters.items() if name not in INPUTS}


def check_inputs(name: str, needs: Needs, models: Any, base: Any, key: Any, names: Any) -> None:
    """Raise if the inputs of rule `name` are not what it needs."""
    if isinstance(models, Mapping) or not isinstance(models, Sequence):
        raise TypeError(
            f"{name}: models must be a sequence of pytrees, found {type(models).__name__}; "
            "pass a list, also for one model: rule([tuned], base=base)"
        )
    count = len(models)
    if count < needs.least or (needs.most is not None and count > needs.most):
        raise ValueError(f"{name} needs {needs}; found {count} models")
    if needs.base == "required" and base is None:
        raise ValueError(f"{name} needs {needs}; found base=None, pass base=")
    if needs.base == "none" and base is not None:
        raise ValueError(f"{name} takes no base ({needs}); pass it among the models, or leave it out")
    if needs.key == "required" and key is None:
        raise ValueError(f"{name} draws random masks; found key=None, pass key=jax.random.key(seed)")
    if names is not None and (isinstance(names, str) or len(names) != count):
        raise ValueError(f"{name}: names={names!r}, wanted a list of {count}: one a model")
    if names is not None and len(set(names)) != count:
        raise ValueError(f"{name}: names={list(names)!r} are not distinct, so two models would share masks")


def check_coefficients(name: str, known: Mapping[str, inspect.Parameter], given: Iterable[str]) -> None:
    """Raise if rule `name` is called with a coefficient that it has not, or without one that has no default."""
    for coefficient in given:
        if coefficient not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise TypeError(f"{name}() has no coefficient {coefficient!r}; {nearest(coefficient, known)}{takes}")
    for coefficient, parameter in known.items():
        if parameter.default is EMPTY and coefficient not in given:
            raise TypeError(f"{name}() needs {coefficient}=")


def check_compat(compat: Any) -> None:
    """Raise unless `compat` is None or "mergekit"."""
    if compat not in (None, "mergekit"):
        raise ValueError(f"compat={compat!r}, wanted None or 'mergekit'")


def nearest(word: Any, words: Iterable[str]) -> str:
    """Return `did you mean 'ties'? ` for an error, of the word that is nearest; nothing where none is near.

    Example:
      >>> nearest("tise", ["slerp", "ties"]), nearest("sum", ["slerp", "ties"])
      ("did you mean 'ties'? ", '')
    """
    near = difflib.get_close_matches(str(word), list(words), n=1)
    return f"did you mean {near[0]!r}? " if near else ""
