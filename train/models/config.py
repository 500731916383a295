"""What a decoder is made of: one frozen dataclass, the same for every source a model is loaded from."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed to reach contexts longer than the pretrained one.

    linear: every frequency divided by `factor`.
    llama3: frequencies whose wavelength exceeds `original_max_position_embeddings / low_freq_factor`
      divided by `factor`, those below `… / high_freq_factor` kept, a smooth ramp in between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope scaling {self.kind!r} is not known; known: linear, llama3")
        if self.factor <= 0:
            raise ValueError(f"rope scaling factor is {self.factor}; it must be positive")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a Llama-architecture decoder, under their Hugging Face names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model config: {name} is {getattr(self, name)}; it must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model config: {self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise ValueError(f"model config: head_dim is {self.head_dim}; rotary embeddings need an even one")
