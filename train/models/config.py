"""What a decoder is made of: one frozen dataclass, the same for every source a model is loaded from."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..log import UserError

ROPE_KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
SLIDING, FULL = "sliding_attention", "full_attention"
Rope = Literal["global", "local", "none"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed to reach contexts longer than the pretrained one (formulas: rope.py).

    A field that is not of its kind stays at its default.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    """yarn, longrope: cos and sin are multiplied by it; None: what follows from the factor."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope scaling {self.kind!r} is not known; known: {', '.join(ROPE_KINDS)}")
        if self.factor <= 0:
            raise ValueError(f"rope scaling factor is {self.factor}; it must be positive")


@dataclasses.dataclass(frozen=True)
class Experts:
    """The mixture of experts in the place of an MLP: a router chooses which MLPs see a token (experts.py)."""

    count: int
    """E, how many experts a layer has."""
    per_token: int
    """k, how many of them see a token."""
    intermediate_size: int
    """F of each."""
    normalize: bool = True
    """The weights of a token's experts sum to 1: the softmax is over the k chosen scores; else over all E."""
    shared_intermediate_size: int | None = None
    """F of an expert that sees every token behind a gate of its own (Qwen2-MoE); None: there is none."""
    dense_layers: tuple[int, ...] = ()
    """Layers with an MLP and no experts."""
    balance: float = 0.001
    """Coefficient of the load-balancing loss that config.json recommends for training (`router_aux_loss_coef`)."""

    def __post_init__(self):
        for name in ("count", "per_token", "intermediate_size", "shared_intermediate_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"model config: experts.{name} is {value}; it must be at least 1")
        if self.per_token > self.count:
            raise ValueError(f"model config: {self.per_token} experts a token are chosen, and a layer has {self.count}")
        if not 0 <= self.balance < float("inf"):
            raise ValueError(f"model config: router_aux_loss_coef is {self.balance}; it must be at least 0")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder, under their Hugging Face names where those say it best.

    The defaults are Llama's; what a family switches on is in families.py.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    family: str = "llama"
    """The `model_type` it is written back under."""
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    """θ of the layers with a window, unscaled (Gemma 3); None: as the others."""
    partial_rotary_factor: float = 1.0
    """Share of a head's elements that is rotated: the first ones."""
    rope_interleaved: bool = False
    """Rotation pairs neighbours, 2i with 2i + 1 (GLM), and not i with i + R/2."""
    rope_layers: tuple[bool, ...] = ()
    """Which layers rotate (SmolLM3 leaves out some); () is all."""

    sliding_window: int | None = None
    """Keys a query sees in a layer with a window, itself included."""
    layer_types: tuple[str, ...] = ()
    """`sliding_attention` or `full_attention` a layer; () is the window, if there is one, in all."""
    query_pre_attn_scalar: float | None = None
    """Scores are divided by its root; None: head_dim."""
    attention_multiplier: float | None = None
    """Scores are multiplied by it, and not divided by a root (Granite); None: they are."""
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norms of each head's queries and keys, before rotation."""
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    block_norms: tuple[str, ...] = ("input_layernorm", "", "post_attention_layernorm", "")
    """The names of a layer's norms: before attention, after it, before the MLP, after it; "" where there is none."""
    unit_offset_norms: bool = False
    """Norms scale by 1 + w (Gemma)."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by √D (Gemma)."""
    embedding_multiplier: float = 1.0
    """Embeddings are multiplied by it (Granite)."""
    residual_multiplier: float = 1.0
    """What attention and MLP add to the residual stream is multiplied by it (Granite)."""
    logits_scaling: float = 1.0
    """Logits are divided by it (Granite)."""
    fused_projections: bool = False
    """q, k and v are in one matrix (Phi-3)."""
    qk_norm_all: bool = False
    """RMS norms of all heads' queries together, and of all heads' keys, before rotation (OLMo 2, OLMoE)."""
    fused_mlp: bool = False
    """Gate and up of the MLP are in one matrix (Phi-3, GLM)."""
    experts: Experts | None = None
    """Mixtures of experts in the place of MLPs; `intermediate_size` is then of the layers without."""

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
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            rotated = "" if self.partial_rotary_factor == 1 else f", of which {self.rotary_dim} are rotated"
            raise ValueError(
                f"model config: head_dim is {self.head_dim}{rotated}; rotary embeddings need an even number"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"model config: activation {self.activation!r} is not known; known: {ACTIVATIONS}")
        for name in (
            "sliding_window", "query_pre_attn_scalar", "attention_multiplier", "attn_logit_softcapping",
            "final_logit_softcapping", "embedding_multiplier", "residual_multiplier", "logits_scaling",
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"model config: {name} is {value}; it must be positive, or none")
        if len(self.block_norms) != 4 or len({*filter(None, self.block_norms)}) != 4 - self.block_norms.count(""):
            raise ValueError(f"model config: block_norms is {self.block_norms}; four places want a name each, or ''")
        for name in ("layer_types", "rope_layers"):
            if len(getattr(self, name)) not in (0, self.num_hidden_layers):
                raise ValueError(
                    f"model config: {name} has {len(getattr(self, name))} entries for {self.num_hidden_layers} layers"
                )
        if unknown := set(self.layer_types) - {SLIDING, FULL}:
            raise ValueError(f"model config: layer_types {sorted(unknown)} are not known; known: {SLIDING}, {FULL}")
        if self.experts is not None and (
            bad := [i for i in self.experts.dense_layers if not 0 <= i < self.num_hidden_layers]
        ):
            raise ValueError(f"model config: experts.dense_layers has {bad}, of {self.num_hidden_layers} layers")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "longrope":
            for name in ("short_factor", "long_factor"):
                if len(getattr(scaling, name)) != self.rotary_dim // 2:
                    raise ValueError(
                        f"model config: {name} has {len(getattr(scaling, name))} entries, one for each of "
                        f"{self.rotary_dim // 2} frequencies is wanted"
                    )

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that are rotated, R."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def score_scale(self) -> float:
        """What the scores of attention are multiplied by."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def layers(self) -> tuple[tuple[int | None, Rope], ...]:
        """What differs from layer to layer: the window and the kind of rotation."""
        types = self.layer_types or (FULL if self.sliding_window is None else SLIDING,) * self.num_hidden_layers
        rotates = self.rope_layers or (True,) * self.num_hidden_layers
        windows = [self.sliding_window if kind == SLIDING else None for kind in types]
        # Layers with a window have the local θ even where the window itself is off.
        local = self.local_rope_theta is not None
        return tuple(
            (window, "none" if not rotate else "local" if local and kind == SLIDING else "global")
            for window, kind, rotate in zip(windows, types, rotates, strict=True)
        )

    def has_experts(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def context(self) -> int:
        """Positions the model is made for: dynamic scaling is there to go past max_position_embeddings."""
        scaling = self.rope_scaling
        stretch = scaling.factor if scaling is not None and scaling.kind == "dynamic" else 1.0
        return int(self.max_position_embeddings * max(1.0, stretch))


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside frozen weights, W + (alpha / rank)·B·A (Hu et al., https://arxiv.org/abs/2106.09685)."""

    rank: int = 16
    """The adapters have this rank: the columns of B and the rows of A."""
    alpha: float = 32.0
    """The product B·A is scaled by alpha / rank."""
    targets: tuple[str, ...] = (r"_proj$",)
    """A module gets an adapter if one of these patterns is found in its path, such as
    `model/layers/3/self_attn/q_proj`."""
    dropout: float = 0.0
    """This share of a side path's inputs is set to zero while training."""

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; it must be in [0, 1)")
        if not self.targets:
            raise UserError("lora.targets is empty; give a pattern of module paths, such as _proj$")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
