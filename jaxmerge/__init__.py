"""Merge, extrapolate and measure model weights: pure functions from pytrees to pytrees, needing jax alone."""

from jaxmerge.compose import masked
from jaxmerge.consensus import elect_sign, elect_sign_by_energy, elect_sign_unweighted, weighted_sum
from jaxmerge.delta import breadcrumbs, breadcrumbs_ties, dare, dare_ties, della, della_linear, delta_rule, sce, ties
from jaxmerge.exme import exme_merge, exme_safe, exme_space, exme_weights, guarded, search_exme, staged
from jaxmerge.iterative import alpha_schedule, imm, offload, onload
from jaxmerge.leafwise import Needs, Operands, Rule, leafwise
from jaxmerge.linear import (
    average,
    collinear,
    extrapolate,
    extrapolation_merge,
    interpolate,
    passthrough,
    task_arithmetic,
)
from jaxmerge.measure import change, check_finite, cosines, nonfinite, norms, to_floats
from jaxmerge.rules import RULES, rule
from jaxmerge.selection import arcee_fusion, nearswap, ram, ramplus_tl
from jaxmerge.sparsify import drop, rank_drop, trim, two_sided_trim, variance_select
from jaxmerge.spherical import karcher, multislerp, nuslerp, slerp
from jaxmerge.statistics import fisher, graft_mask, grafting, regmean
from jaxmerge.stock import model_stock
from jaxmerge.strategies import STRATEGIES, Float, Space
from jaxmerge.tree import cast, dot, leaf_paths, norm, task_vector
from jaxmerge.tune import Compiled, Monotone, Result, Search, descend, judge_line, monotone, search_merge
from jaxmerge.where import layer_group, matches, select

__all__ = [
    "RULES",
    "STRATEGIES",
    "Compiled",
    "Float",
    "Monotone",
    "Needs",
    "Operands",
    "Result",
    "Rule",
    "Search",
    "Space",
    "alpha_schedule",
    "arcee_fusion",
    "average",
    "breadcrumbs",
    "breadcrumbs_ties",
    "cast",
    "change",
    "check_finite",
    "collinear",
    "cosines",
    "dare",
    "dare_ties",
    "della",
    "della_linear",
    "delta_rule",
    "descend",
    "dot",
    "drop",
    "elect_sign",
    "elect_sign_by_energy",
    "elect_sign_unweighted",
    "exme_merge",
    "exme_safe",
    "exme_space",
    "exme_weights",
    "extrapolate",
    "extrapolation_merge",
    "fisher",
    "graft_mask",
    "grafting",
    "guarded",
    "imm",
    "interpolate",
    "judge_line",
    "karcher",
    "layer_group",
    "leaf_paths",
    "leafwise",
    "masked",
    "matches",
    "model_stock",
    "monotone",
    "multislerp",
    "nearswap",
    "nonfinite",
    "norm",
    "norms",
    "nuslerp",
    "offload",
    "onload",
    "passthrough",
    "ram",
    "ramplus_tl",
    "rank_drop",
    "regmean",
    "rule",
    "sce",
    "search_exme",
    "search_merge",
    "select",
    "slerp",
    "staged",
    "task_arithmetic",
    "task_vector",
    "ties",
    "to_floats",
    "trim",
    "two_sided_trim",
    "variance_select",
    "weighted_sum",
]
