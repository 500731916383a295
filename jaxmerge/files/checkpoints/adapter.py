r"""LoRA adapters, as PEFT saves them, applied to an open checkpoint without writing the result.

    W' = W + s·B·A,   s = alpha/r, or alpha/√r with use_rslora
    W' = m ⊙ (W + s·B·A)/‖W + s·B·A‖ by row, with DoRA's magnitudes m

A tensor that is adapted stays a `Tensor` (`adapted.py`). PEFT's `merge_and_unload` adds the same product in the
weight's dtype, so that a low-precision result may differ from it in the last place. What is right is PEFT's forward
pass: which matrices are transposed is decided by the model's layer classes, as PEFT does when it loads an adapter, and
a head that was tied to an adapted embedding stays as it was unless the adapter says `ensure_weight_tying`.

References:
  Hu et al., "LoRA", https://arxiv.org/abs/2106.09685
  Kalajdzievski, "Rank-Stabilized LoRA", https://arxiv.org/abs/2312.03732
  Liu et al., "DoRA", https://arxiv.org/abs/2402.09353
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxmerge.files.checkpoints.adapted import Adapted, Renamed, Replaced, Shifted
from jaxmerge.files.checkpoints.classes import is_transposed, model_types
from jaxmerge.files.checkpoints.heads import have_same_bits, is_head, tied_pair, untied
from jaxmerge.files.checkpoints.safetensors import NotHere
from jaxmerge.files.checkpoints.shards import Weights, weights_in
from jaxmerge.files.checkpoints.source import Source, Tensor
from jaxmerge.files.documents import read_json, some
from jaxmerge.files.patterns import matches_module

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.(?P<leaf>weight|bias))?"
)
# Keys that make an adapter more than W + s·B·A.
_UNKNOWN_KINDS = (
    "layer_replication", "use_qalora", "use_bdlora", "kasa_config", "arrow_config", "alora_invocation_tokens",
    "trainable_token_indices", "target_parameters", "megatron_config",
)  # fmt: skip
# What stands before a module's name in one saving of a model and not in another.
WRAPPERS = ("model", "language_model", "text_model", "transformer", "base_model", "module")
# Initialisations that also change the base's weights, which the adapter then does not fit as they are.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def apply(source: Source, adapter: pathlib.Path, weights: Weights | None = None) -> Source:
    """Apply a PEFT LoRA adapter to a checkpoint; nothing is read but headers.

    Args:
      source: the model it was trained on.
      adapter: folder with adapter_config.json and adapter_model.safetensors.
      weights: the adapter's file of weights; by default that in the folder.

    Returns:
      The source with the adapter's modules as virtual tensors, its `modules_to_save` and biases as stored, in the
      source's dtypes. A tied head that is no longer the embedding becomes a tensor of its own, the config untied.

    Raises:
      ValueError: the adapter is of another kind, or has tensors that fit none of the source's: all are named.
    """
    folder = pathlib.Path(adapter)
    config = read_config(folder)
    path, weights = folder / WEIGHTS, weights or weights_in(folder)
    if not weights.has(WEIGHTS):
        raise ValueError(f"adapter {str(folder)!r} has no {WEIGHTS}; save it as safetensors (PEFT's default)")
    names = Names(source.tensors)
    pair = tied_pair(source)
    lent = None
    if pair is not None:
        # The adapter may name the head all the same.
        lent = Renamed(source.tensors[pair[0]], pair[1])
        names.add(pair[1], lent)
    factors, unmatched = _place(weights.header(WEIGHTS), names)
    turned = _only_turned(names, factors, source.config)
    for module, parts in factors.items():
        unmatched += _adapt(names, module, parts, config, path, _Layers(source.config, turned))
    if unmatched:
        raise ValueError(_unmatched(path, source, config, unmatched))
    found, notes = source.config, ()
    if pair is not None and lent is not None:
        found, notes = _settle_head(names.tensors, pair, lent, source, config, str(folder))
    return dataclasses.replace(
        source, name=f"{source.name}+{adapter}", tensors=names.tensors, config=found,
        files=(*source.files, folder / CONFIG, path), notes=(*source.notes, *notes),
    )  # fmt: skip


def _unmatched(path: pathlib.Path, source: Source, config: Mapping[str, Any], keys: list[str]) -> str:
    task = str(config.get("task_type"))
    kind = "" if task in ("CAUSAL_LM", "None") else f"; the adapter is for {task}, whose head this model may lack"
    return (
        f"{path}: {len(keys)} tensors fit no tensor of {source.name!r}: {some(keys, 4)}{kind}; give the model that the "
        f"adapter was trained on ({config.get('base_model_name_or_path') or 'its config does not say which'!s:.200})"
    )


class Names:
    """The tensors of a model, found by the names that an adapter has for them.

    The same module is called `model.layers.0…`, `model.language_model.layers.0…` or `layers.0…`, depending on whether
    a decoder was saved or adapted alone, with its head, or inside a wrapper for images. So where no tensor has the name
    itself, the one counts that has it but for such words in front, if there is just one.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors: dict[str, Tensor] = {}
        self._by_end: dict[str, list[str]] = {}
        for name, tensor in tensors.items():
            self.add(name, tensor)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor."""
        self.tensors[name] = tensor
        self._by_end.setdefault(without_wrappers(name), []).append(name)

    def find(self, name: str) -> str | None:
        """Return the model's name of a tensor; None if there is none, or more than one that it may be."""
        if name in self.tensors:
            return name
        found = self._by_end.get(without_wrappers(name), [])
        return found[0] if len(found) == 1 else None


def without_wrappers(name: str) -> str:
    parts = name.split(".")
    while parts[0] in WRAPPERS and len(parts) > 1:
        del parts[0]
    return ".".join(parts)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise ValueError(f"adapter {str(folder)!r} has no {CONFIG}; give the folder of a PEFT LoRA adapter")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r:.80}, only 'LORA' is known here")
    for key in _UNKNOWN_KINDS:
        if config.get(key):
            raise ValueError(f"{path}: {key}={config[key]!r:.80} is not known here; merge the adapter with PEFT first")
    start = str(config.get("init_lora_weights", ""))
    if start.lower().startswith(_CHANGE_BASE):
        raise ValueError(
            f"{path}: init_lora_weights={start!r:.80} changed the base's weights too, so the adapter does not fit the "
            "base as it is stored; convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


Parts = dict[str, Tensor]  # kind → tensor: lora_A, lora_B, lora_B.bias, lora_embedding_A, …


def _place(stored: Mapping[str, Tensor], names: Names) -> tuple[dict[str, Parts], list[str]]:
    """Put what replaces tensors in their place; gather the factors of each module; list what is left."""
    factors: dict[str, Parts] = {}
    unmatched = []
    for key, tensor in stored.items():
        name = key.removeprefix("base_model.model.")
        found = FACTOR.fullmatch(name)
        if found:
            leaf = ".bias" if found["leaf"] == "bias" else ""
            factors.setdefault(found["module"], {})[found["kind"] + leaf] = tensor
            continue
        target = names.find(re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)", "", name))
        if target is None:
            unmatched.append(key)
            continue
        _check_shape(target, tensor, names.tensors[target].shape)
        names.tensors[target] = Replaced(names.tensors[target], tensor)
    return factors, unmatched


@dataclasses.dataclass(frozen=True)
class _Layers:
    """Which layers store their matrix [in, out]: by the model's class, or as their shapes say of a class unknown."""

    config: Mapping[str, Any]
    turned: frozenset[str]

    def are_turned(self, target: str, shape: tuple[int, ...], path: pathlib.Path, said: bool) -> bool:
        """Say it of the matrix `target`; `said` is what the adapter says of some of its modules."""
        if is_transposed(self.config, target):
            return True
        if not self.turned:
            return False
        if shape[0] != shape[1] or target in self.turned or not said:
            return target in self.turned
        raise ValueError(
            f"{path}: whether {target} {list(shape)} is stored [in, out] cannot be told, because it is square and "
            f"model type {', '.join(model_types(self.config)) or 'unknown'} is not known here; merge the adapter with "
            "PEFT first"
        )


def _only_turned(names: Names, factors: Mapping[str, Parts], config: Mapping[str, Any]) -> frozenset[str]:
    """Of a class that is not in our table, the matrices that fit their factors only as [in, out]."""
    found = set()
    for module, parts in factors.items():
        target = names.find(f"{module}.weight")
        if target is None or not {"lora_A", "lora_B"} <= set(parts) or is_transposed(config, target):
            continue
        shape = tuple(names.tensors[target].shape)
        wanted = (parts["lora_B"].shape[0], parts["lora_A"].shape[-1])
        if shape != wanted and shape == wanted[::-1]:
            found.add(target)
    return frozenset(found)


def _adapt(
    names: Names, module: str, parts: Parts, config: Mapping[str, Any], path: pathlib.Path, layers: _Layers
) -> list[str]:
    """Replace a module's weight and bias by adapted ones; names of the parts that fit none."""
    target = names.find(f"{module}.weight")
    if target is None:
        return [part.name for part in parts.values()]
    bias, magnitude = parts.pop("lora_B.bias", None), parts.pop("lora_magnitude_vector", None)
    embedding = "lora_embedding_A" in parts
    kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if set(parts) != set(kinds):
        found = sorted(part.name for part in parts.values())
        raise ValueError(f"{path}: module {module!r} has {found}, wanted its A and its B; the file is incomplete")
    a, b = (parts[kind] for kind in kinds)
    base = names.tensors[target]
    if not (len(base.shape) == len(a.shape) == len(b.shape) == 2 and jnp.issubdtype(base.dtype, jnp.floating)):
        raise ValueError(
            f"{path}: {a.name} {list(a.shape)} adapts {target} {base.dtype}{list(base.shape)}; only matrices of "
            "floats are known here, merge the adapter with PEFT first"
        )
    flipped = embedding or layers.are_turned(target, base.shape, path, bool(config.get("fan_in_fan_out")))
    rank = b.shape[1]
    _check_shape(target, b, (base.shape[1] if flipped else base.shape[0], rank))
    _check_shape(target, a, (rank, base.shape[0] if flipped else base.shape[1]))
    if magnitude is not None:
        if flipped:
            raise ValueError(f"{path}: {magnitude.name}: DoRA of embeddings and transposed weights is not known here")
        _check_shape(target, magnitude, (base.shape[0],))
    scale = scale_of(config, module, rank, path)
    names.tensors[target] = Adapted(base, a, b, scale, flipped, magnitude)
    if bias is not None:
        name = names.find(f"{module}.bias")
        if name is None:
            return [bias.name]
        _check_shape(name, bias, names.tensors[name].shape)
        names.tensors[name] = Shifted(names.tensors[name], bias, scale)
    return []


def scale_of(config: Mapping[str, Any], module: str, rank: int, path: pathlib.Path) -> float:
    def of(patterns: str, default: str) -> Any:
        """As PEFT matches: the end of the module's name, from a dot on, in full."""
        table = config.get(patterns) or {}
        where = f"{path.parent / CONFIG}: {patterns}"
        if not isinstance(table, dict):
            raise ValueError(f"{where} is {table!r:.60}, wanted patterns with their values")
        return next((v for key, v in table.items() if matches_module(key, module, where)), config.get(default))

    said, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    if said is not None and said != rank:
        raise ValueError(
            f"{path}: module {module!r} has rank {rank}, {CONFIG} says {said!r:.80}; the two do not go together"
        )
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 1e30:
        raise ValueError(f"{path.parent / CONFIG}: lora_alpha is {alpha!r:.100}, wanted a finite number")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _check_shape(target: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(wanted):
        more = "; its vocabulary was extended, extend the base's first" if "embed" in target or is_head(target) else ""
        raise ValueError(
            f"{tensor.where}: {tensor.name} has shape {list(tensor.shape)}, wanted {list(wanted)} for {target}{more}"
        )


def _settle_head(
    tensors: dict[str, Tensor], pair: tuple[str, str], lent: Tensor, source: Source, config: Mapping[str, Any],
    adapter: str,
) -> tuple[Mapping[str, Any], tuple[str, ...]]:  # fmt: skip
    """Say what becomes of the head of a tied model, in `tensors`; the config of the result, and notes.

    PEFT wraps the embedding, and the head goes on with the weights that both had, unless `ensure_weight_tying`.
    """
    name, head = pair
    embedding = tensors[name]
    changed = embedding is not source.tensors[name]
    if config.get("ensure_weight_tying") and changed:
        del tensors[head]
        return source.config, (f"{adapter} adapts the embedding of {source.name} and keeps its head tied: both change",)
    if tensors[head] is lent and not changed:
        del tensors[head]
        return source.config, ()
    own = tensors[head]
    if isinstance(own, Replaced) and isinstance(embedding, Replaced):
        try:
            same = have_same_bits(own.tensor, embedding.tensor)
        except NotHere:  # a dry run: the larger of the two results is planned
            same = False
        if same:
            del tensors[head]
            return source.config, ()
    which = "embedding" if own is lent else "head" if not changed else "embedding and the head"
    note = f"{adapter} adapts the {which} of {source.name}, which were tied; now they are apart"
    return untied(source.config), (note,)
