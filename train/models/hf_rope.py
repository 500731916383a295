"""Rotary settings of config.json, in the old style and the new, to fields of ModelConfig and back.

Old: `rope_theta`, `rope_scaling` {type, …}, `rope_local_base_freq` (Gemma 3), `partial_rotary_factor` (Phi-3).
New: `rope_parameters` {rope_theta, rope_type, …}; of Gemma 3, one such object a kind of layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..log import UserError
from .config import FULL, SLIDING, ModelConfig, RopeScaling
from .families import Family

ORIGINAL, PARTIAL, LOCAL = "original_max_position_embeddings", "partial_rotary_factor", "rope_local_base_freq"
# Kind → what it must say, what it may.
KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", ORIGINAL}, set()),
    "yarn": (
        {"factor"},
        {ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": ({"short_factor", "long_factor"}, {ORIGINAL, "factor", "attention_factor"}),
}
# Older names of Phi-3's scaling.
PHI3_NAMES = {"su": "longrope", "yarn": "longrope"}

Fields = dict[str, Any]
"""rope_theta, rope_scaling, local_rope_theta, partial_rotary_factor of a ModelConfig."""


def read_rope(given: Mapping[str, Any], family: Family, source) -> Fields:
    """Rotary fields from either style; a config that gives both must say the same twice."""
    theta, scaling, new = (given.get(name) for name in ("rope_theta", "rope_scaling", "rope_parameters"))
    old_full = {**(scaling or {}), **({} if theta is None else {"rope_theta": theta})}
    local = given.get(LOCAL)
    old_local = {} if local is None else {"rope_theta": local}
    if not new:
        return read_style(old_full, old_local, given, family, source)
    nested = {key: value or {} for key, value in new.items() if key in (FULL, SLIDING)}
    if nested and family.local_theta is None:
        raise UserError(f"{source}: rope_parameters are of kinds of layers ({sorted(nested)}); this family has one")
    if nested and nested.keys() != new.keys():
        raise UserError(f"{source}: rope_parameters mix kinds of layers with others: {sorted(new)}")
    full, sliding = (nested.get(FULL, {}), nested.get(SLIDING, {})) if nested else (dict(new), {})
    found = read_style(full, sliding, given, family, source)
    if scaling or theta is not None or local is not None:
        # Families without an attribute for it say the local θ in the new style alone.
        old = read_style(old_full, old_local if LOCAL in family.absent else sliding, given, family, source)
        if old != found:
            raise UserError(
                f"{source}: rope_parameters {spell_fields(found)} and rope_theta with rope_scaling "
                f"{spell_fields(old)} differ; keep one of them"
            )
    return found


def spell_fields(fields: Fields) -> str:
    return str({name: value for name, value in fields.items() if value is not None})


def read_style(full: dict[str, Any], sliding: dict[str, Any], given, family: Family, source) -> Fields:
    """One style: what it says of all layers (or those without a window), and of those with one."""
    theta, kind, values = normal({"rope_theta": family.theta, **full}, source, PHI3_NAMES if is_phi3(family) else {})
    partial = values.pop("partial_rotary_factor", given.get("partial_rotary_factor"))
    partial = 1.0 if partial is None else float(partial)
    if partial != 1 and PARTIAL not in family.absent:
        raise UserError(f"{source}: not understood: partial_rotary_factor = {partial!r} (implemented: 1)")
    local = None
    if family.local_theta is not None:
        local, local_kind, rest = normal({"rope_theta": family.local_theta, **sliding}, source, {})
        if local_kind != "default" or rest:
            raise UserError(f"{source}: rope scaling {local_kind!r} of layers with a window is not implemented")
        if LOCAL not in family.absent and "rope_theta" not in sliding and local != theta:
            raise UserError(
                f"{source}: rope_theta is {theta}, and releases of transformers differ on whether layers with a window "
                f"turn by it or by {local}; say both in rope_parameters, of {FULL} and {SLIDING}"
            )
    try:
        scaling = None if kind == "default" else RopeScaling(kind, **settle(kind, values, given, family, source))  # pyright: ignore[reportArgumentType]  # one of KEYS
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "local_rope_theta": local,
        "partial_rotary_factor": partial,
    }


def is_phi3(family: Family) -> bool:
    return ORIGINAL in family.absent


def normal(rope: dict[str, Any], source, names: Mapping[str, str]) -> tuple[float, str, dict[str, Any]]:
    """(θ, kind, the other values as RopeScaling has them)."""
    said = rope.pop("rope_type", None) or rope.get("type") or "default"
    kind = names.get(said, said)
    rope.pop("type", None)
    theta = rope.pop("rope_theta")
    if not is_number(theta) or theta <= 0:
        raise UserError(f"{source}: rope_theta is {theta!r}; expected a positive number")
    if kind not in KEYS:
        raise UserError(f"{source}: rope scaling {kind!r} is not known; known: {', '.join(KEYS)}")
    values = {name: value for name, value in rope.items() if value is not None}
    partial = {name: values.pop(name) for name in ("partial_rotary_factor",) if name in values}
    must, may = KEYS[kind]
    if not must <= values.keys() <= must | may:
        optional = f" and may take {sorted(may)}" if may else ""
        raise UserError(
            f"{source}: rope scaling {kind!r} takes {sorted(must) or 'nothing else'}{optional}, found {sorted(values)}"
        )
    lists = {"short_factor", "long_factor"}
    bad = {
        name: value
        for name, value in {**values, **partial}.items()
        if not (
            (isinstance(value, list | tuple) and all(map(is_number, value)))
            if name in lists
            else isinstance(value, bool)
            if name == "truncate"
            else is_number(value)
        )
    }
    if bad:
        raise UserError(f"{source}: rope scaling {kind!r} takes numbers, found {bad}")
    return float(theta), kind, {name: convert(name, value) for name, value in {**values, **partial}.items()}


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def convert(name: str, value) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(float, value))
    return int(value) if name == ORIGINAL else value if isinstance(value, bool) else float(value)


def settle(kind: str, values: dict[str, Any], given, family: Family, source) -> dict[str, Any]:
    """Fill in what follows from other attributes: the context trained on, LongRoPE's factor."""
    if kind not in ("yarn", "longrope"):
        return values
    longest = given["max_position_embeddings"]
    if ORIGINAL in family.absent:
        values[ORIGINAL] = given[ORIGINAL]
    original = values.setdefault(ORIGINAL, longest)
    if not isinstance(original, int) or original < 2:
        raise UserError(f"{source}: {ORIGINAL} is {original!r}; expected a whole number of positions")
    if kind == "longrope":
        values.setdefault("factor", longest / original)
    return values


def write_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Rotary attributes in both styles."""
    s = config.rope_scaling
    scaling = None
    if s is not None:
        must, may = KEYS[s.kind]
        values = {name: getattr(s, name) for name in sorted(must | may)}
        if s.kind == "longrope" and s.factor == config.max_position_embeddings / s.original_max_position_embeddings:
            del values["factor"]  # older readers of Phi-3 want no other key than the two lists
        if s.kind == "longrope" and is_phi3(family):
            del values[ORIGINAL]  # said once, beside it
        plain = {n: list(v) if isinstance(v, tuple) else v for n, v in values.items() if v is not None}
        scaling = {"rope_type": s.kind, **({"type": s.kind} if is_phi3(family) else {}), **plain}
    new: dict[str, Any] = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    new.pop("type", None)
    written: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": scaling}
    if family.local_theta is not None:
        local = family.local_theta if config.local_rope_theta is None else config.local_rope_theta
        new = {FULL: new, SLIDING: {"rope_theta": local, "rope_type": "default"}}
        if LOCAL in family.absent:
            written[LOCAL] = local
        elif local != config.rope_theta:
            written = {}
    if PARTIAL in family.absent:
        new[PARTIAL] = written[PARTIAL] = config.partial_rotary_factor
    if is_phi3(family) and s is not None:
        written[ORIGINAL] = s.original_max_position_embeddings
    return {**written, "rope_parameters": new}
