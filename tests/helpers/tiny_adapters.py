"""A tiny Llama and LoRA adapters on it."""

from __future__ import annotations

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxmerge.files.checkpoints import adapter
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read

D, F, V, R = 12, 20, 31, 3
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"

MODULES = {
    **{f"model.layers.{l}.self_attn.{p}_proj": (D, D) for l in range(2) for p in "qkvo"},
    **{f"model.layers.{l}.mlp.{p}_proj": (F, D) for l in range(2) for p in ("gate", "up")},
    **{f"model.layers.{l}.mlp.down_proj": (D, F) for l in range(2)},
}


NORMS = [f"model.layers.{l}.{n}_layernorm" for l in range(2) for n in ("input", "post_attention")]


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": D, "intermediate_size": F,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": V,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def weights(seed: int, dtype: type = np.float32, tied: bool = False) -> dict[str, np.ndarray]:
    r = np.random.default_rng(seed)
    shapes = {f"{m}.weight": s for m, s in MODULES.items()} | {"model.embed_tokens.weight": (V, D)}
    shapes |= {f"{n}.weight": (D,) for n in [*NORMS, "model.norm"]} | ({} if tied else {"lm_head.weight": (V, D)})
    return {name: r.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def folder(path: pathlib.Path, arrays: dict[str, np.ndarray], **config) -> pathlib.Path:
    path.mkdir()
    save_file(arrays, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    return path


def adapter_folder(path: pathlib.Path, arrays: dict[str, np.ndarray], **config) -> pathlib.Path:
    path.mkdir()
    save_file({f"base_model.model.{k}": np.ascontiguousarray(v) for k, v in arrays.items()}, path / adapter.WEIGHTS)
    (path / adapter.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": 6, **config}))
    return path


def normal(*shape: int, seed: int = 9) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def factors(module: str, shape: tuple[int, int], rank: int = R, seed: int = 9) -> dict[str, np.ndarray]:
    return {
        f"{module}.lora_A.weight": normal(rank, shape[1], seed=seed),
        f"{module}.lora_B.weight": normal(shape[0], rank, seed=seed),
    }


def applied(base: pathlib.Path, lora: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: read(t) for name, t in open_source(f"{base}+{lora}").tensors.items()}


def alike(found: np.ndarray, wanted: np.ndarray, ulps: float = 2.0) -> None:
    """Equal to the rounding of the found dtype, in units of its last place at the largest element."""
    assert found.shape == wanted.shape
    step = float(ml_dtypes.finfo(found.dtype).eps) * float(np.abs(wanted).max())
    assert np.abs(found.astype(np.float64) - wanted).max() <= ulps * step
