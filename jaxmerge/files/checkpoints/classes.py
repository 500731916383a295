"""What a tensor's layer is, told from config.json and the tensor's name: embedding, or a matrix stored [in, out].

`torch.nn.Linear` stores [out, in]. The `Conv1D` of transformers, which GPT-2 and its like are made of, stores
[in, out]. Which of the two a layer is, is a matter of the model's class: what an adapter's file says of it
(`fan_in_fan_out`) is said of whichever module was adapted last.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

# The modules that are `Conv1D`, by model type; from the modelling code of transformers.
_GPT2 = r"(attn|crossattention)\.(c_attn|q_attn|c_proj)|mlp\.(c_fc|c_proj)"
CONV1D = {
    "gpt2": _GPT2,
    "imagegpt": _GPT2,
    "decision_transformer": _GPT2,
    "openai-gpt": r"attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj)",
    "clvp": r"mlp\.(c_fc|c_proj)",
}
EMBEDDINGS = (
    "embed_tokens", "embed_positions", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings",
    "embed_in", "tok_embeddings", "tokens_embed", "positions_embed", "shared",
)  # fmt: skip


def is_embedding(name: str) -> bool:
    """Say whether a tensor is the table of an embedding layer.

    Example:
      >>> is_embedding("model.embed_tokens.weight"), is_embedding("lm_head.weight")
      (True, False)
    """
    return name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS


def is_transposed(config: Mapping[str, Any], name: str) -> bool:
    """Say whether a layer's matrix is stored [in, out].

    Example:
      >>> is_transposed({"model_type": "gpt2"}, "transformer.h.0.attn.c_proj.weight")
      True
      >>> is_transposed({"model_type": "gpt2"}, "lm_head.weight"), is_transposed({}, "h.0.attn.c_proj.weight")
      (False, False)
    """
    patterns = [CONV1D[kind] for kind in model_types(config) if kind in CONV1D]
    module = name.removesuffix(".weight")
    return any(re.fullmatch(rf"(.*\.)?({pattern})", module) for pattern in patterns)


# What files of a model with a head leave out in front of its modules' names, by the embedding that shows it.
_LEFT_OUT = {"wte.weight": "transformer.", "word_embeddings.weight": "transformer.", "embed_tokens.weight": "model."}
# Parts of wrapper models as they were published, and as transformers calls them since 4.52.
_MOVED = (
    (r"language_model\.model\.", "model.language_model."),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"(vision_tower|vision_model|multi_modal_projector|image_newline)(?=\.|$)", r"model.\1"),
)
# Classes of models with a head over the vocabulary, by what their names contain.
_WITH_HEAD = re.compile("CausalLM|LMHead|ConditionalGeneration|MaskedLM|PreTraining|DoubleHeads")


def says_head(config: Mapping[str, Any]) -> bool:
    """Say whether a config's `architectures` are of models with a head over the vocabulary."""
    return any(_WITH_HEAD.search(str(kind)) for kind in config.get("architectures") or [])


def name_in_memory(name: str, names: Collection[str], config: Mapping[str, Any]) -> str:
    """Return what a tensor is called in the model that transformers makes of a checkpoint, whose files have `names`.

    Files name tensors as they were saved: a decoder without its head leaves out what stands before its modules in a
    model with one, and wrapper models were reordered since. Adapters are loaded by the names in memory.

    Example:
      >>> name_in_memory("h.0.mlp.c_fc.weight", ["wte.weight"], {"architectures": ["GPT2LMHeadModel"]})
      'transformer.h.0.mlp.c_fc.weight'
    """
    if not says_head(config):
        return name
    if any(part.startswith("language_model.model.") for part in names):
        return next((re.sub(f"^{old}", new, name) for old, new in _MOVED if re.match(old, name)), name)
    front = next((front for embedding, front in _LEFT_OUT.items() if embedding in names), "")
    return name if name.startswith(("lm_head.", "score.")) else front + name


def model_types(config: Mapping[str, Any]) -> list[str]:
    """Return the model type of a config and of its parts (`text_config`, `decoder`, …)."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return [str(part["model_type"]) for part in parts if "model_type" in part]
