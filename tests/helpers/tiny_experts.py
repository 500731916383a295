"""Tiny dense models of the families that become mixtures of experts, and recipes over them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from helpers.tiny_vocabularies import pieces

WIDE, MLP, HEADS, HEAD, LAYERS = 16, 24, 4, 8, 2
TOKENIZER = pieces("add two numbers write code in python a poem of rain no", 60)
ROWS = TOKENIZER.get_vocab_size()
BOS, EOS = "<s>", "</s>"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
RECIPE = """
base_model: base
gate_mode: {mode}
experts:
  - source_model: one
    positive_prompts: [add two numbers, write code in python]
    negative_prompts: [a poem of rain]
  - source_model: two
    positive_prompts: [write a poem]
    residual_scale: 0.4
  - source_model: base
    positive_prompts: [no rain]
  - source_model: one
    positive_prompts: [in python, add numbers]
"""
SHARED = """shared_experts:
  - source_model: two
    positive_prompts: [a]
    residual_scale: 0.1
"""


def shapes_of(kind: str, heads: int = HEADS, kv: int = HEADS // 2, layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a dense model's tensors."""
    inner, narrow = heads * HEAD, kv * HEAD
    parts: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (WIDE,), "post_attention_layernorm.weight": (WIDE,),
        "self_attn.q_proj.weight": (inner, WIDE), "self_attn.k_proj.weight": (narrow, WIDE),
        "self_attn.v_proj.weight": (narrow, WIDE), "self_attn.o_proj.weight": (WIDE, inner),
        "mlp.gate_proj.weight": (MLP, WIDE), "mlp.up_proj.weight": (MLP, WIDE), "mlp.down_proj.weight": (WIDE, MLP),
    }  # fmt: skip
    if kind == "qwen2":
        parts |= {f"self_attn.{p}_proj.bias": (inner if p == "q" else narrow,) for p in "qkv"}
    if kind == "qwen3":
        parts |= {f"self_attn.{p}_norm.weight": (HEAD,) for p in "qk"}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, WIDE)}
    found |= {f"model.layers.{l}.{part}": shape for l in range(layers) for part, shape in parts.items()}
    return found | {"model.norm.weight": (WIDE,), "lm_head.weight": (ROWS, WIDE)}


def dense(
    path,
    kind: str,
    seed: int,
    *,
    dtype: Any = np.float32,
    without=(),
    unsaid=(),
    heads: int = HEADS,
    kv: int = 0,
    **more,
) -> dict[str, np.ndarray]:
    """Write a dense model with a byte-level tokenizer, a Qwen2 without a BOS token, and return its tensors.

    without: tensors, unsaid: keys of config.json that are left out. heads, kv: of queries, and of keys and values.
    """
    kv = kv or heads // 2
    path = pathlib.Path(path)
    path.mkdir()
    rng = np.random.default_rng(seed)
    shapes = {name: shape for name, shape in shapes_of(kind, heads, kv).items() if name not in without}
    arrays = {name: (0.3 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}
    save_file(arrays, path / "model.safetensors", metadata={"format": "pt"})
    given = {
        "architectures": [ARCHITECTURES[kind]], "model_type": kind, "num_hidden_layers": LAYERS, "hidden_size": WIDE,
        "intermediate_size": MLP, "vocab_size": ROWS, "num_attention_heads": heads, "num_key_value_heads": kv,
        "head_dim": HEAD, "rms_norm_eps": 1e-3, "tie_word_embeddings": "lm_head.weight" in without,
        "torch_dtype": np.dtype(dtype).name, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    said = {key: value for key, value in (given | more).items() if key not in unsaid}
    (path / "config.json").write_text(json.dumps(said))
    TOKENIZER.save(str(path / "tokenizer.json"))
    roles = {"bos_token": None if kind == "qwen2" else BOS, "eos_token": EOS}
    (path / "tokenizer_config.json").write_text(json.dumps(roles))
    return arrays


def three(kind: str, **more) -> dict[str, dict[str, np.ndarray]]:
    """Write `base`, `one` and `two` into the current folder."""
    return {name: dense(name, kind, seed, **more) for seed, name in enumerate(["base", "one", "two"])}


def recipe(mode: str, *, shared: bool = False, more: str = "") -> dict[str, Any]:
    """Write moe.yaml of one of the recipes."""
    pathlib.Path("moe.yaml").write_text(RECIPE.format(mode=mode) + SHARED * shared + more)
    return {}
