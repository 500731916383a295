"""Invariants of a config that take more than a line: the dataclasses of config.py call these.

Most refuse a setting that is clearly given and that nothing reads: it would be lost without a word.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .log import UserError

if TYPE_CHECKING:
    from .config import Improve, Merge, Method, Probe, Sampling

PROBE_READS = {
    "expo": ("alphas",),
    "exme": ("best", "search", "alphas", "weights"),
    "line": ("coefficients",),
    "best": (),
    "merge": ("rule", "parameters"),
}
"""Fields that each kind of probe reads besides of, kind and rounds."""
TREE = ("children", "depth", "gate", "retries", "diverse", "samples", "rollout")
SEARCH_READS = {
    "dart": ("dart",),
    "tot": (*TREE, "beam"),
    "mcts": (*TREE, "iterations", "leaves", "exploration", "bonus", "reflect"),
}
"""Keys of `sampling.search` that each source reads."""


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_alpha(alpha: Any) -> None:
    """Refuse what `merge.alpha` cannot be; what it says of paths and rounds is tried on the model."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float, list, Mapping)):
        raise UserError(f"merge.alpha is {alpha!r}; give a number, a list (one a round) or a map")
    if isinstance(alpha, float) and not math.isfinite(alpha):
        raise UserError(f"merge.alpha is {alpha}; give a finite number")
    if isinstance(alpha, Mapping) and "search" in alpha:
        candidates = alpha["search"]
        if not isinstance(candidates, list) or not candidates or set(alpha) != {"search"}:
            raise UserError(f"merge.alpha is {alpha!r}; a search is {{search: [α, …]}} with one α or more")
        if others := [c for c in candidates if not is_number(c)]:
            raise UserError(f"merge.alpha.search holds {others[0]!r}; its candidates are finite numbers")
    if isinstance(alpha, Mapping) and "importance" in alpha:
        span = alpha["importance"]
        if set(alpha) != {"importance"} or not isinstance(span, list | tuple) or len(span) != 2:
            raise UserError(f"merge.alpha is {alpha!r}; layer-adaptive is {{importance: [α, α]}}")
        if others := [a for a in span if not is_number(a)]:
            raise UserError(f"merge.alpha.importance holds {others[0]!r}; its two ends are finite numbers")


def check_probe(probe: Probe) -> None:
    """Refuse fields that differ from their defaults and that a probe of this kind does not read."""
    reads = PROBE_READS[probe.kind]
    if probe.kind == "exme" and probe.search is not None:
        reads = tuple(name for name in reads if name not in ("alphas", "weights"))
    for field in dataclasses.fields(probe):
        if field.name in ("of", "kind", "rounds", *reads):
            continue
        value, made = getattr(probe, field.name), field.default_factory
        if value != (field.default if made is dataclasses.MISSING else made()):
            searched = " with a search" if probe.kind == "exme" and probe.search is not None else ""
            raise UserError(
                f"probe.{field.name} is {value!r}, and a probe of kind {probe.kind}{searched} does not read it; "
                f"it reads {', '.join(reads) or 'none of these'}: leave it out, or choose another kind"
            )


def check_methods(config: Improve) -> None:
    """Refuse what a method sets and its run does not read, and what needs questions that are not there."""
    for name, method in config.methods.items():
        if method.probe is None:
            merge: Merge = config.block(name, "merge")
            check_merge(config, name, method, merge)
            check_sampling(name, method, config.block(name, "sampling"))


def check_merge(config: Improve, name: str, method: Method, merge: Merge) -> None:
    # The original model is kept in host memory whatever the rule.
    given = [key for key in method.merge if key != "offload"]
    if given and "rule" not in given and merge.rule == "none":
        raise UserError(
            f"methods.{name}.merge sets {', '.join(given)}, and its rule is none: nothing would be merged; "
            f"set methods.{name}.merge.rule (imm, say), or leave these out"
        )
    alphas = merge.alpha if isinstance(merge.alpha, list) else [merge.alpha]
    measured = [a for a in alphas if isinstance(a, Mapping) and ("search" in a or "importance" in a)]
    if measured and not any(f.validation for f in config.tasks.families):
        raise UserError(
            f"methods.{name}.merge.alpha: {next(iter(measured[0]))} needs validation questions; give families some"
        )


def check_sampling(name: str, method: Method, sampling: Sampling) -> None:
    """Of a method's own keys alone: those of the run's block may be for other methods, or from before an override."""
    source = sampling.source
    if source == "plain":
        return
    if "samples" in method.sampling:
        raise UserError(
            f"methods.{name}.sampling.samples is {sampling.samples}, and source: {source} does not read it; leave it "
            "out: how many solutions there are is said in sampling.search"
        )
    for key, value in method.sampling.get("search", {}).items():
        if key not in SEARCH_READS[source] and (key, value) != ("kind", source):
            raise UserError(
                f"methods.{name}.sampling.search.{key}: source: {source} does not read it; "
                f"it reads {', '.join(SEARCH_READS[source])}"
            )
