"""RULES: every rule by name. A new rule is one function and one line here; then it is under the contract test of
`tests/jaxmerge/test_contract.py`, in recipes (`jaxmerge.files.methods`) and a probe of `improve`."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping

from jaxmerge import arithmetic, delta, iterative, selection, spectral, spherical, statistics, stock
from jaxmerge.contract import Rule, nearest

FORMULA = re.compile(r"\$(.+?)\$", re.DOTALL)
"""A formula of a docstring: Markdown mathematics, LaTeX between dollars."""


class Rules(dict[str, Rule]):
    """A dict of rules that prints as a table, and says of a name that it lacks which is the nearest."""

    def __missing__(self, name: object) -> Rule:
        raise KeyError(f"no rule {name!r}; {nearest(name, self)}there are {', '.join(self)}")

    def __repr__(self) -> str:
        return table([("rule", "needs", "formula", "paper"), *(row(name, rule) for name, rule in self.items())])


RULES: dict[str, Rule] = Rules({
    "interpolate": arithmetic.interpolate,
    "average": arithmetic.average,
    "task_arithmetic": arithmetic.task_arithmetic,
    "extrapolate": arithmetic.extrapolate,
    "extrapolation_merge": arithmetic.extrapolation_merge,
    "passthrough": arithmetic.passthrough,
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
    "norm_aware": stock.norm_aware,
    "nearswap": selection.nearswap,
    "arcee_fusion": selection.arcee_fusion,
    "ram": selection.ram,
    "ramplus_tl": selection.ramplus_tl,
    "magmax": selection.magmax,
    "consensus_ta": selection.consensus_ta,
    "tatr": selection.tatr,
    "tsvm": spectral.tsvm,
    "iso_c": spectral.iso_c,
    "iso_cts": spectral.iso_cts,
    "wudi": spectral.wudi,
    "svc": spectral.svc,
    "opcm": spectral.opcm,
    "fisher": statistics.fisher,
    "regmean": statistics.regmean,
    "grafting": statistics.grafting,
    # mergekit's names for average and dare, for those who look them up here.
    "linear": arithmetic.average,
    "dare_linear": delta.dare,
})  # fmt: skip


def rule(name: str) -> Rule:
    """Return the rule called `name`; `rule(name).needs` says what it needs.

    Example:
      >>> print(rule("dare").needs)
      ≥1 models, base, key
    """
    return RULES[name]


def row(name: str, rule: Rule) -> tuple[str, str, str, str]:
    """Return what the table says of a rule: its name, what it needs, the first formula of its docstring, its paper.

    Example:
      >>> row("interpolate", RULES["interpolate"])
      ('interpolate', '2 models', '(1−t) θ_a + t θ_b', '')
    """
    text = inspect.getdoc(rule) or ""
    formula = FORMULA.search(text)
    return name, str(rule.needs), plain(formula[1]) if formula else "", paper(text)


def paper(text: str) -> str:
    """Return the first reference of a docstring in short: who, and the number on arXiv, else the year.

    Example:
      >>> paper('References:\\n  Yadav et al., "TIES-Merging", https://arxiv.org/abs/2306.01708')
      'Yadav et al., arXiv:2306.01708'
    """
    found = re.search(r"References:\n\s*(.*)", text)
    if found is None:
        return ""
    who = found[1].partition(",")[0]
    number = re.search(r"arxiv\.org/abs/(\S+)", found[1])
    when = f"arXiv:{number[1]}" if number else "".join(re.findall(r"\b\d{4}$", found[1]))
    return ", ".join(filter(None, ("" if who.startswith("http") else who, when)))


# What of LaTeX the formulas use, as text; the rest of the commands go by their names.
SIGNS = {
    "alpha": "α", "beta": "β", "gamma": "γ", "epsilon": "ε", "lambda": "λ", "theta": "θ", "tau": "τ", "Omega": "Ω",
    "sum": "Σ", "odot": "⊙", "cdot": "·", "leftarrow": "←", "top": "ᵀ", "|": "‖", ",": " ", " ": " ", "bar": "mean ",
    "mathrm": "", "ge": "≥",
}  # fmt: skip


def plain(formula: str) -> str:
    r"""Write a formula in LaTeX as text.

    Example:
      >>> plain(r"\theta_b + \lambda \sum_i w_i (\theta_i - \theta_b)")
      'θ_b + λ Σ_i w_i (θ_i − θ_b)'
    """
    formula = re.sub(r"\\(sin|cos)(?=\\)", r"\1 ", formula)  # a command after it is its argument
    text = re.sub(r"\\([A-Za-z]+|.)", lambda found: SIGNS.get(found[1], found[1]), formula).replace("-", "−")
    return " ".join(re.sub(r"[{}]", "", text).split())


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Write rows as a table of text, the first of them as its head."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def families(rules: Mapping[str, Rule]) -> str:
    """List rules by family, the module they are in, each with the first line of its docstring."""
    found: dict[str, list[str]] = {}
    for name, rule in rules.items():
        line = (inspect.getdoc(rule) or "").partition("\n")[0]
        also = f"another name of {rule.__name__}" if name != rule.__name__ else as_text(line)
        found.setdefault(rule.__module__, []).append(f"  {name:<20}{also}")
    heads = {module: (sys.modules[module].__doc__ or module).partition("\n")[0] for module in found}
    return "\n\n".join("\n".join([as_text(heads[module]), *lines]) for module, lines in found.items())


def as_text(line: str) -> str:
    """Write a line of a docstring as text: its formulas too."""
    return FORMULA.sub(lambda found: plain(found[1]), line)
