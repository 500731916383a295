"""The public names of the library, which `import jaxmerge` finds here when the first of them is asked for."""

from jaxmerge.arithmetic import (
    average,
    collinear,
    extrapolate,
    extrapolation_merge,
    interpolate,
    passthrough,
    task_arithmetic,
)
from jaxmerge.compose import masked
from jaxmerge.consensus import elect_sign, elect_sign_by_energy, elect_sign_unweighted, weighted_sum
from jaxmerge.contract import Needs, Rule, requires
from jaxmerge.delta import breadcrumbs, breadcrumbs_ties, dare, dare_ties, della, della_linear, sce, ties
from jaxmerge.exme import exme_merge, exme_safe, exme_space, exme_weights, guarded, search_exme, staged
from jaxmerge.iterative import alpha_schedule, imm, offload, onload
from jaxmerge.leaves import Operands, leafwise
from jaxmerge.localise import Graft, learn_mask
from jaxmerge.measure import change, check_finite, cosines, nonfinite, norms, to_floats
from jaxmerge.rules import RULES, rule
from jaxmerge.selection import arcee_fusion, consensus_ta, magmax, nearswap, ram, ramplus_tl, tatr
from jaxmerge.sparse import delta_rule
from jaxmerge.sparsify import drop, rank_drop, trim, two_sided_trim, variance_select
from jaxmerge.spectral import iso_c, iso_cts, opcm, svc, tsvm, wudi
from jaxmerge.spherical import karcher, multislerp, nuslerp, slerp
from jaxmerge.statistics import fisher, graft_mask, grafting, regmean
from jaxmerge.stock import model_stock, norm_aware
from jaxmerge.strategies import STRATEGIES, Float, Space
from jaxmerge.tree import cast, dot, leaf_paths, norm, task_vector
from jaxmerge.tune import Compiled, Monotone, Result, Search, descend, judge_line, monotone, search_merge
from jaxmerge.where import Coefficient, PerModel, layer_group, matches, select

# mergekit's names, as in RULES.
linear, dare_linear = average, dare

__all__ = [
    "RULES",
    "STRATEGIES",
    "Coefficient",
    "Compiled",
    "Float",
    "Graft",
    "Monotone",
    "Needs",
    "Operands",
    "PerModel",
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
    "consensus_ta",
    "cosines",
    "dare",
    "dare_linear",
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
    "iso_c",
    "iso_cts",
    "judge_line",
    "karcher",
    "layer_group",
    "leaf_paths",
    "leafwise",
    "learn_mask",
    "linear",
    "magmax",
    "masked",
    "matches",
    "model_stock",
    "monotone",
    "multislerp",
    "nearswap",
    "nonfinite",
    "norm",
    "norm_aware",
    "norms",
    "nuslerp",
    "offload",
    "onload",
    "opcm",
    "passthrough",
    "ram",
    "ramplus_tl",
    "rank_drop",
    "regmean",
    "requires",
    "rule",
    "sce",
    "search_exme",
    "search_merge",
    "select",
    "slerp",
    "staged",
    "svc",
    "task_arithmetic",
    "task_vector",
    "tatr",
    "ties",
    "to_floats",
    "trim",
    "tsvm",
    "two_sided_trim",
    "variance_select",
    "weighted_sum",
    "wudi",
]
