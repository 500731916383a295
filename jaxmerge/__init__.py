"""Merge, extrapolate and measure model weights: pure functions from pytrees to pytrees, needing jax alone."""

from jaxmerge.compose import masked
from jaxmerge.iterative import alpha_schedule, imm, offload, onload
from jaxmerge.leafwise import Needs, Operands, Rule, leafwise
from jaxmerge.linear import (
    average,
    collinear,
    extrapolate,
    extrapolation_merge,
    interpolate,
    task_arithmetic,
)
from jaxmerge.measure import change, check_finite, cosines, nonfinite, norms, to_floats
from jaxmerge.rules import RULES, rule
from jaxmerge.sparsify import dare
from jaxmerge.tree import cast, dot, leaf_paths, norm, task_vector
from jaxmerge.where import layer_group, matches, select

__all__ = [
    "RULES",
    "Needs",
    "Operands",
    "Rule",
    "alpha_schedule",
    "average",
    "cast",
    "change",
    "check_finite",
    "collinear",
    "cosines",
    "dare",
    "dot",
    "extrapolate",
    "extrapolation_merge",
    "imm",
    "interpolate",
    "layer_group",
    "leaf_paths",
    "leafwise",
    "masked",
    "matches",
    "nonfinite",
    "norm",
    "norms",
    "offload",
    "onload",
    "rule",
    "select",
    "task_arithmetic",
    "task_vector",
    "to_floats",
]
