"""Tiny dense models of the families that become mixtures of experts, and recipes over them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
from helpers.tiny_vocabularies import words
from safetensors.numpy import save_file

WIDE, MLP, HEADS, HEAD, LAYERS = 16, 24, 4, 8, 2
WORDS = ("add", "two", "numbers", "write", "a", "poem", "of", "rain", "code", "in", "python", "no")
ROWS = len(WORDS) + 3
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


def shapes_of(kind: str, layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a dense model's tensors."""
    inner = HEADS * HEAD
    parts: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (WIDE,), "post_attention_layernorm.weight": (WIDE,),
        "self_attn.q_proj.weight": (inner, WIDE), "self_attn.k_proj.weight": (inner // 2, WIDE),
        "self_attn.v_proj.weight": (inner // 2, WIDE), "self_attn.o_proj.weight": (WIDE, inner),
        "mlp.gate_proj.weight": (MLP, WIDE), "mlp.up_proj.weight": (MLP, WIDE), "mlp.down_proj.weight": (WIDE, MLP),
    }  # fmt: skip
    if kind == "qwen2":
        parts |= {f"self_attn.{p}_proj.bias": (inner // (1 if p == "q" else 2),) for p in "qkv"}
    if kind == "qwen3":
        parts |= {f"self_attn.{p}_norm.weight": (HEAD,) for p in "qk"}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, WIDE)}
    found |= {f"model.layers.{l}.{part}": shape for l in range(layers) for part, shape in parts.items()}
    return found | {"model.norm.weight": (WIDE,), "lm_head.weight": (ROWS, WIDE)}


def dense(path, kind: str, seed: int, *, dtype: Any = np.float32, without=(), **config) -> dict[str, np.ndarray]:
    """Write a dense model with a word-level tokenizer and return its tensors."""
    path = pathlib.Path(path)
    path.mkdir()
    rng = np.random.default_rng(seed)
    arrays = {n: (0.3 * rng.standard_normal(s)).astype(dtype) for n, s in shapes_of(kind).items() if n not in without}
    save_file(arrays, path / "model.safetensors", metadata={"format": "pt"})
    given = {
        "architectures": [ARCHITECTURES[kind]], "model_type": kind, "num_hidden_layers": LAYERS, "hidden_size": WIDE,
        "intermediate_size": MLP, "vocab_size": ROWS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2,
        "head_dim": HEAD, "rms_norm_eps": 1e-3, "tie_word_embeddings": "lm_head.weight" in without,
        "torch_dtype": np.dtype(dtype).name, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(given | config))
    words(list(WORDS)).save(str(path / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(roles))
    return arrays


def three(kind: str, **more) -> dict[str, dict[str, np.ndarray]]:
    """Write `base`, `one` and `two` into the current folder."""
    return {name: dense(name, kind, seed, **more) for seed, name in enumerate(["base", "one", "two"])}


def recipe(mode: str, *, shared: bool = False, more: str = "") -> dict[str, Any]:
    """Write moe.yaml of one of the recipes."""
    pathlib.Path("moe.yaml").write_text(RECIPE.format(mode=mode) + SHARED * shared + more)
    return {}
