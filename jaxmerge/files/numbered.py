r"""Keys of a config.json that speak of layers by number, rewritten for layers in a new order.

A config says in five ways what its layer l is: a list with an entry a layer; a list of numbers of layers; a number of
layers at the start; a period; or nothing, where the model's class decides by l alone. Each is rewritten so that layer j
of the result is what layer l of its model was, or refused by name where no config says that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# Lists of numbers of layers.
NUMBERS = (
    "mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices", "moe_layer_ids",
    "global_attention_layers", "attention_layer_ids", "deepstack_visual_indexes",
)  # fmt: skip
# How many layers at the start are of another kind than the rest.
STARTS = (
    "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_hash_layers", "max_window_layers",
    "first_moe_layer",
)  # fmt: skip
# Every how many layers another kind comes, and the list that comes before it where a config has both.
PERIODS = {
    "moe_layer_freq": "mlp_layer_types",
    "interleave_moe_layer_step": "moe_layers",
    "no_rope_layer_interval": "no_rope_layers",
    "sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "layer_group_size": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "attn_layer_period": "layers_block_type",
    "expert_layer_period": "mlp_layer_types",
    "moe_layer_interval": "mlp_layer_types",
}
# Lists with an entry a layer that classes of transformers fill in where config.json has none.
FILLED = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")
# Strings with a letter a layer.
LETTERS = ("hybrid_override_pattern",)
# What no config can say of another order.
FIXED = ("num_kv_shared_layers", "linear_attn_config", "num_sparse_encoder_layers", "num_sparse_decoder_layers")
# Every how many layers experts come, and the layers that have none all the same.
SPARSE, DENSE = "decoder_sparse_step", "mlp_only_layers"
FUTURE = "num_nextn_predict_layers"  # layers behind the last that predict tokens further ahead


@dataclasses.dataclass(frozen=True)
class Order:
    """Layers of the result, and the configs that say what they are.

    layers: (model, its layer), one a layer of the result. parts: each model's config, the part that counts its layers.
    counts: how many layers each of them counts. had: layers of the config that is rewritten.
    """

    layers: Sequence[tuple[str, int]]
    parts: Mapping[str, Mapping[str, Any]]
    counts: Mapping[str, int]
    had: int

    def is_as_it_was(self, part: Mapping[str, Any]) -> bool:
        """Whether every layer is where it was, and of the kind that the config that is rewritten says."""
        if [layer for _, layer in self.layers] != list(range(self.had)):
            return False
        keys = {*NUMBERS, *STARTS, *PERIODS, *FILLED, *LETTERS, *FIXED, SPARSE}
        models = {model for model, _ in self.layers}
        return all(self.value(model, key, part.get(key)) == part.get(key) for model in models for key in keys)

    def value(self, model: str, key: str, default: Any) -> Any:
        """What a model's own config has under a key, else the config that is rewritten."""
        return self.parts[model].get(key, default)

    def numbers(self, model: str, key: str, default: Any) -> list[Any]:
        """A list of a model's config; null is none."""
        own = self.value(model, key, default)
        if own is not None and not isinstance(own, list):
            raise self.mistake(model, key, own, "a list of numbers of layers")
        return own or []

    def mistake(self, model: str, key: str, value: Any, wanted: str) -> ValueError:
        return ValueError(f"model {model!r}: config.json says {key}: {value!r:.80}, wanted {wanted}; mend it there")


def rewrite(part: Mapping[str, Any], order: Order, count_key: str, notes: list[str]) -> dict[str, Any]:
    """Return the part of a config that counts layers, for layers in a new order.

    Args:
      part: config.json, or its `text_config` or the like.
      order: of the result's layers.
      count_key: `num_hidden_layers`, or what it is called here.
      notes: what the user should know is added.

    Raises:
      ValueError: a key that cannot say what the layers of the result are.
    """
    changed = {**part, count_key: len(order.layers)}
    _drop_future(changed, order, notes)
    if order.is_as_it_was(part):
        return changed
    for key, value in part.items():
        if key in FIXED and value:
            raise ValueError(_refusal(key, value, "no other order of layers can be said with it"))
        if key in NUMBERS and isinstance(value, list):
            held = [order.numbers(model, key, value) for model, _ in order.layers]
            changed[key] = [j for j, (_, layer) in enumerate(order.layers) if layer in held[j]]
        elif isinstance(value, list) and len(value) == order.had > 0:
            changed[key] = [_entry(order, key, model, layer, value) for model, layer in order.layers]
        elif key in LETTERS and isinstance(value, str) and len(value) == order.had:
            changed[key] = "".join(_entry(order, key, model, layer, value) for model, layer in order.layers)
        elif key in STARTS and type(value) is int:
            changed[key] = _start(order, part, key, value)
    _spread_experts(changed, part, order)
    _fill(changed, part, order, count_key, notes)
    _check_periods(changed, part, order)
    return changed


def _entry(order: Order, key: str, model: str, layer: int, value: Any) -> Any:
    """What a list has for a layer of a model: that model's own entry, if it has such a list."""
    own = order.value(model, key, value)
    if own is not None and not isinstance(own, type(value)):
        raise order.mistake(model, key, own, f"a {'list' if isinstance(value, list) else 'text'} as the others have")
    return own[layer] if own is not None and layer < len(own) else value[min(layer, len(value) - 1)]


def _refusal(key: str, value: Any, why: str) -> str:
    return (
        f"config.json says {key}: {value!r:.80}, and {why}; choose slices that keep such layers where they were, or "
        "write the result's config.json by hand from a merge of whole models"
    )


def _drop_future(changed: dict[str, Any], order: Order, notes: list[str]) -> None:
    for model, layer in order.layers:
        if order.value(model, FUTURE, 0) and layer >= order.counts[model]:
            raise ValueError(
                f"layer {layer} of {model!r} is one of its {FUTURE}: {order.value(model, FUTURE, 0)}, behind its "
                f"{order.counts[model]} layers; choose slices that end there"
            )
    if changed.get(FUTURE):
        notes.append(f"{FUTURE} was {changed[FUTURE]}: the slices leave those layers out, it is 0 now")
        changed[FUTURE] = 0


def _start(order: Order, part: Mapping[str, Any], key: str, value: int) -> int:
    """Return how many layers at the start are now of the first kind."""
    if key == "max_window_layers" and not part.get("use_sliding_window"):
        return value
    starts = {model: order.value(model, key, value) for model, _ in order.layers}
    for model, start in starts.items():
        if type(start) is not int:
            raise order.mistake(model, key, start, "a whole number")
    first = [layer < starts[model] for model, layer in order.layers]
    count = first.index(False) if False in first else len(first)
    if any(first[count:]):
        where = [j for j, is_first in enumerate(first) if is_first]
        raise ValueError(_refusal(key, value, f"the layers of that kind would stand at {where}, not at the start"))
    # All of them are of the first kind: a later layer may be so too.
    return max(count, value) if count == len(first) else count


def _spread_experts(changed: dict[str, Any], part: Mapping[str, Any], order: Order) -> None:
    """Say layer by layer which have experts, where `decoder_sparse_step` said it by a period."""
    steps = [order.value(model, SPARSE, part.get(SPARSE, 1)) for model, _ in order.layers]
    if all(type(step) is int and step for step in steps) and (set(steps) <= {1} or _in_step(order, set(steps))):
        return
    dense = [j for j, (model, layer) in enumerate(order.layers) if not _has_experts(order, part, model, layer)]
    changed |= {SPARSE: 1, DENSE: dense}


def _has_experts(order: Order, part: Mapping[str, Any], model: str, layer: int) -> bool:
    """Decide as transformers does, which divides by the step where a layer may have experts."""
    if layer in order.numbers(model, DENSE, part.get(DENSE)) or order.value(model, "num_experts", 1) == 0:
        return False
    step = order.value(model, SPARSE, part.get(SPARSE, 1))
    if type(step) is not int or step == 0:
        raise order.mistake(model, SPARSE, step, "a whole number but 0: it divides l + 1 where layer l has experts")
    return (layer + 1) % step == 0


def _in_step(order: Order, periods: set[int]) -> bool:
    """Whether every layer is where it was in one common period."""
    (period, *others) = periods
    return not others and all(layer % period == j % period for j, (_, layer) in enumerate(order.layers))


def _check_periods(changed: Mapping[str, Any], part: Mapping[str, Any], order: Order) -> None:
    for key, listed in PERIODS.items():
        value = part.get(key)
        if type(value) is not int or isinstance(changed.get(listed), list):
            continue
        periods = [order.value(model, key, value) for model, _ in order.layers]
        told_apart = {period for period in periods if type(period) is int and period > 0}
        all_alike = all(type(period) is int and period in (0, 1) for period in periods)
        in_step = len(set(map(repr, periods))) == 1 and told_apart and _in_step(order, told_apart)
        if not (all_alike or in_step):
            raise ValueError(_refusal(key, value, "the layers would not be where they were in that period"))


def _fill(changed: dict[str, Any], part: Mapping[str, Any], order: Order, count_key: str, notes: list[str]) -> None:
    """Write out the lists that the model's class fills in by the number of a layer, where that would be wrong now."""
    kind = part.get("model_type")
    if not isinstance(kind, str):
        return
    models = dict.fromkeys(model for model, _ in order.layers)
    was = {model: _filled(order.parts[model], count_key, order.counts[model]) for model in models}
    then = _filled(changed, count_key, len(order.layers))
    if then is None or None in was.values():
        if any(key in part for key in (*PERIODS, "layer_types", "sliding_window")):
            notes.append(
                f"whether model type {kind!r} tells its layers apart by their number is not known: transformers does "
                "not read this config; look at the result before you use it"
            )
        return
    for key in FILLED:
        wanted = [(was[model] or {}).get(key, [None] * order.counts[model])[layer] for model, layer in order.layers]
        if key not in part and None not in wanted and wanted != then.get(key):
            changed[key] = wanted
            notes.append(f"{key} is written out, layer by layer: {kind!r} decides it by a layer's number otherwise")


def _filled(part: Mapping[str, Any], count_key: str, count: int) -> dict[str, list[Any]] | None:
    """Return the lists that transformers makes of a config; None if it does not know such a one."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return None
    classes: Any = CONFIG_MAPPING
    if part.get("model_type") not in classes:
        return None
    given = {key: value for key, value in part.items() if key != "model_type"} | {count_key: count}
    try:
        made = classes[part["model_type"]](**given)
    except Exception:  # whatever a class makes of a config that is not its own: it is not known, which is noted
        return None
    lists = {key: getattr(made, key, None) for key in FILLED}
    return {key: list(value) for key, value in lists.items() if isinstance(value, list) and len(value) == count}
