"""What a mixture of experts may be: which dense families become which, under which names, and with which config.json.

The names of tensors are those of the published checkpoints, one tensor an expert, which every version of transformers
loads. A config.json may leave out what its family takes for granted, and two families take different things for
granted: `ABSENT` says what the dense ones do, so that the result says it itself.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]
PARTS = ("gate_proj", "up_proj", "down_proj")
RESIDUAL = "down_proj"  # its output is added to the stream between the layers
# What transformers' configuration classes of the dense families set where config.json says nothing.
_COMMON = {
    "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "rope_theta": 10000.0, "attention_dropout": 0.0,
}  # fmt: skip
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
ABSENT: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, **_IDS, "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {**_COMMON, **_IDS, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {**_COMMON, **_WINDOW, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {**_COMMON, **_WINDOW, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128,
              "attention_bias": False},
}  # fmt: skip
# Attributes that say of a dense model what no family of experts has; each with the values that mean it has not.
_WITHOUT: dict[str, tuple[Any, ...]] = {"mlp_bias": (False, None), "hidden_act": ("silu",)}
LAYER = r"model\.layers\.(?P<layer>\d+)\."
_LEFT_OUT = ("auto_map", "_name_or_path", "transformers_version", "mlp_bias", "pretraining_tp")
_OUTSIDE = r"model\.embed_tokens\.weight|model\.norm\.weight|lm_head\.weight"
_NORMS = r"(input_layernorm|post_attention_layernorm)\.weight"
_PROJECTIONS = r"self_attn\.[qkvo]_proj\.weight"
MLP = re.compile(rf"{LAYER}mlp\.({'|'.join(PARTS)})\.weight")
COMPUTED = re.compile(rf"{LAYER}self_attn\.rotary_emb\.inv_freq")  # follows from config.json


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family of experts.

    title: as mergekit calls it; a recipe's `architecture` is how it begins. bases: the dense families that become it.
    shared: how many experts see every token. experts, gate: names below `model.layers.N.`. parts: what it calls the
    matrices of an expert. more: what it keeps of a layer beside norms and projections. biases: tensors it must have,
    zero where the base has none. counted: where config.json says how many experts there are. sizes: where it says how
    wide they are. fixed: what it says besides. windowed: whether it can attend within a window as the base does.
    """

    title: str
    model_type: str
    architecture: str
    bases: tuple[str, ...]
    experts: str
    gate: str
    parts: Mapping[str, str]
    counted: str
    more: str = r"(?!)"
    shared: int = 0
    biases: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    windowed: bool = False

    def keeps(self, name: str) -> bool:
        """Say whether a tensor of the base stays what it is."""
        return re.fullmatch(rf"{_OUTSIDE}|{LAYER}({_NORMS}|{_PROJECTIONS}|{self.more})", name) is not None

    def expert(self, layer: int, expert: int, part: str) -> str:
        """Name a matrix of an expert."""
        return f"model.layers.{layer}.{self.experts}.{expert}.{self.parts[part]}.weight"

    def config(self, dense: Config, experts: int, per_token: int) -> dict[str, Any]:
        """Return the config.json of the result."""
        kept = {key: value for key, value in filled(dense).items() if key not in _LEFT_OUT}
        if not self.windowed:
            kept.pop("layer_types", None)
        kept |= {"model_type": self.model_type, "architectures": [self.architecture]}
        kept |= {self.counted: experts, "num_experts_per_tok": per_token}
        return kept | dict.fromkeys(self.sizes, kept["intermediate_size"]) | dict(self.fixed)


_PLAIN = {part: part for part in PARTS}
_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "use_sliding_window": False}
ARCHITECTURES: dict[str, Architecture] = {
    "mixtral": Architecture(
        title="Mixtral", model_type="mixtral", architecture="MixtralForCausalLM", bases=("llama", "mistral"),
        experts="block_sparse_moe.experts", gate="block_sparse_moe.gate.weight",
        parts={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}, counted="num_local_experts", windowed=True,
    ),
    "qwen2_moe": Architecture(
        title="Qwen MoE", model_type="qwen2_moe", architecture="Qwen2MoeForCausalLM",
        bases=("qwen2", "llama", "mistral"), experts="mlp.experts", gate="mlp.gate.weight", parts=_PLAIN,
        counted="num_experts", more=r"self_attn\.[qkv]_proj\.bias", shared=1,
        biases=tuple(f"self_attn.{kind}_proj.bias" for kind in "qkv"),
        sizes=("moe_intermediate_size", "shared_expert_intermediate_size"), fixed=_EVERY_LAYER,
    ),
    "qwen3_moe": Architecture(
        title="Qwen3 MoE", model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", bases=("qwen3",),
        experts="mlp.experts", gate="mlp.gate.weight", parts=_PLAIN, counted="num_experts",
        more=r"self_attn\.([qk]_norm\.weight|[qkvo]_proj\.bias)", sizes=("moe_intermediate_size",), fixed=_EVERY_LAYER,
    ),
}  # fmt: skip
SHARED, SHARED_GATE = "mlp.shared_expert", "mlp.shared_expert_gate.weight"


def filled(dense: Config) -> dict[str, Any]:
    """Return a dense model's config.json with what its family takes for granted."""
    full = {**dense, **{key: value for key, value in ABSENT[str(dense["model_type"])].items() if key not in dense}}
    if full.get("num_key_value_heads") is None:
        full["num_key_value_heads"] = full.get("num_attention_heads")
    if isinstance(rope := full.get("rope_parameters"), Mapping):
        full["rope_parameters"] = {"rope_theta": full["rope_theta"], **rope}
        full["rope_theta"] = full["rope_parameters"]["rope_theta"]  # where versions of transformers before 5 look
    return full


def window_of(dense: Config) -> int | None:
    """Return within how many tokens a dense model attends, in some of its layers; None where that is unlimited."""
    full = filled(dense)
    return full["sliding_window"] if full.get("use_sliding_window", True) else None


def choose(kinds: Mapping[str, Any], shared: int, wanted: str | None) -> Architecture:
    """Return what the models of a recipe become.

    Args:
      kinds: model → its config's model_type.
      shared: the number of experts that see every token.
      wanted: the recipe's `architecture`.

    Raises:
      ValueError: nothing fits; says what each family takes.
    """
    named = [of for of in ARCHITECTURES.values() if of.title.lower().startswith((wanted or "").lower())]
    if not named:
        there = ", ".join(of.title for of in ARCHITECTURES.values())
        raise ValueError(f"architecture is {wanted!r}, wanted how one of {there} begins")
    found = sorted({str(kind) for kind in kinds.values()})
    fitting = [of for of in named if found[0] in of.bases and of.shared == shared]
    if len(found) == 1 and fitting:
        return fitting[0]
    takes = "; ".join(
        f"{of.title} takes {' or '.join(of.bases)} and {of.shared or 'no'} shared expert{'s' * (of.shared != 1)}"
        for of in named
    )
    each = ", ".join(f"{model} is {kind!r}" for model, kind in kinds.items())
    raise ValueError(
        f"these models with {shared} shared experts become no family of experts: {each}; all are to be of one family, "
        f"and {takes}"
    )


def check_config(name: str, config: Config) -> None:
    """Raise where a dense model does what no family of experts does, or its config.json lacks a size."""
    for key, harmless in _WITHOUT.items():
        if key in config and config[key] not in harmless:
            raise ValueError(
                f"{name}: config.json says {key}: {config[key]!r}, which no mixture of experts has a place for"
            )
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        if type(config.get(key)) is not int or config[key] < 1:
            raise ValueError(f"{name}: config.json says {key}: {config.get(key)!r}, wanted a whole number from 1")
