"""RULES: every rule by name. A new rule is one function and one line here; then it is under the contract test
of `tests/test_jaxmerge_contract.py`, in recipes and on the command line."""

from __future__ import annotations

from jaxmerge.iterative import imm
from jaxmerge.leafwise import Rule
from jaxmerge.linear import average, extrapolate, extrapolation_merge, interpolate, task_arithmetic
from jaxmerge.sparsify import dare

RULES: dict[str, Rule] = {
    "interpolate": interpolate,
    "average": average,
    "task_arithmetic": task_arithmetic,
    "extrapolate": extrapolate,
    "extrapolation_merge": extrapolation_merge,
    "dare": dare,
    "imm": imm,
}


def rule(name: str) -> Rule:
    """Return the rule called `name`; `rule(name).needs` says what it needs.

    Example:
      >>> print(rule("dare").needs)
      ≥1 models, base, key
    """
    if name not in RULES:
        raise KeyError(f"no rule {name!r}; there are {', '.join(RULES)}")
    return RULES[name]
