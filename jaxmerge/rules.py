"""RULES: every rule by name. A new rule is one function and one line here; then it is under the contract test of
`tests/jaxmerge/test_contract.py`, in recipes (`jaxmerge.files.methods`) and a probe of `improve`."""

from __future__ import annotations

from jaxmerge import delta, iterative, linear, selection, spherical, statistics, stock
from jaxmerge.leafwise import Rule

RULES: dict[str, Rule] = {
    "interpolate": linear.interpolate,
    "average": linear.average,
    "task_arithmetic": linear.task_arithmetic,
    "extrapolate": linear.extrapolate,
    "extrapolation_merge": linear.extrapolation_merge,
    "passthrough": linear.passthrough,
    "imm": iterative.imm,
    "slerp": spherical.slerp,
    "nuslerp": spherical.nuslerp,
    "multislerp": spherical.multislerp,
    "karcher": spherical.karcher,
    "dare": delta.dare,
    "dare_ties": delta.dare_ties,
    "ties": delta.ties,
    "della": delta.della,
    "della_linear": delta.della_linear,
    "breadcrumbs": delta.breadcrumbs,
    "breadcrumbs_ties": delta.breadcrumbs_ties,
    "sce": delta.sce,
    "model_stock": stock.model_stock,
    "nearswap": selection.nearswap,
    "arcee_fusion": selection.arcee_fusion,
    "ram": selection.ram,
    "ramplus_tl": selection.ramplus_tl,
    "fisher": statistics.fisher,
    "regmean": statistics.regmean,
    "grafting": statistics.grafting,
    # mergekit's names for average and dare, for those who look them up here.
    "linear": linear.average,
    "dare_linear": delta.dare,
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
