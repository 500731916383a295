"""The mixture of experts of a config.json, both ways; which attributes a family has is in families.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..log import UserError
from .config import Experts, ModelConfig
from .families import Family

COUNTS = ("num_experts", "num_local_experts")
"""What config.json calls the number of experts of a layer; transformers 5 takes either."""
# A family has a mixture of experts if it has this attribute.
CHOSEN = "num_experts_per_tok"


def resolve_counts(given: dict[str, Any], attributes: Mapping[str, Any], family: Family, source) -> dict[str, Any]:
    """Attributes with the number of experts under the family's own name for it."""
    if CHOSEN not in family.absent:
        return given
    own = next(name for name in COUNTS if name in family.absent)
    said = {name: attributes[name] for name in COUNTS if attributes.get(name) is not None}
    if len(set(map(str, said.values()))) > 1:
        raise UserError(f"{source}: {' and '.join(f'{k} = {v!r:.40}' for k, v in said.items())} disagree; keep one")
    kept = {name: value for name, value in given.items() if name not in COUNTS}
    return {**kept, own: next(iter(said.values()), family.absent[own])}


def read_experts(given: Mapping[str, Any], family: Family, source) -> dict[str, Any]:
    """The field `experts` of a ModelConfig; nothing for a dense family."""
    if CHOSEN not in family.absent:
        return {}
    own = next(name for name in COUNTS if name in family.absent)
    wide, width = "shared_expert_intermediate_size", "moe_intermediate_size"
    sizes = [own, CHOSEN, *(name for name in (width, wide, "decoder_sparse_step") if name in family.absent)]
    for name in sizes:
        if not _is_whole(given[name]) or given[name] < 1:
            raise UserError(f"{source}: {name} is {given[name]!r:.100}; expected a whole number from 1")
    balance, listed = given["router_aux_loss_coef"], given.get("mlp_only_layers") or []
    if isinstance(balance, bool) or not isinstance(balance, int | float):
        raise UserError(f"{source}: router_aux_loss_coef is {balance!r:.100}; expected a number")
    if not isinstance(normalize := given.get("norm_topk_prob", True), bool):
        raise UserError(f"{source}: norm_topk_prob is {normalize!r:.100}; expected true or false")
    count, step = given["num_hidden_layers"], given.get("decoder_sparse_step", 1)
    if not isinstance(listed, list) or not all(map(_is_whole, listed)):
        raise UserError(f"{source}: mlp_only_layers is {listed!r:.100}; expected a list of layers, counted from 0")
    return {
        "experts": Experts(
            count=given[own],
            per_token=given[CHOSEN],
            intermediate_size=given.get(width, given["intermediate_size"]),
            normalize=normalize,
            shared_intermediate_size=given.get(wide),
            dense_layers=tuple(i for i in range(count) if i in listed or (i + 1) % step),
            balance=float(balance),
        )
    }


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def write_experts(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The attributes of a mixture of experts; nothing for a dense family."""
    e = config.experts
    if e is None or CHOSEN not in family.absent:
        return {}
    values = {
        **dict.fromkeys(COUNTS, e.count),
        CHOSEN: e.per_token,
        "moe_intermediate_size": e.intermediate_size,
        "shared_expert_intermediate_size": e.shared_intermediate_size,
        "norm_topk_prob": e.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(e.dense_layers),
        "router_aux_loss_coef": e.balance,
    }
    return {name: value for name, value in values.items() if name in family.absent}
