"""The Llama decoder as Flax NNX modules whose attributes are the Hugging Face tensor names.

The modules hold no state of their own: `params` is the nested dict of `design`-wide Params, merged with
the (cached) graph definition inside the jitted function, so one pytree goes through sampling, training
and merging unchanged. Key/value caches are arguments and results, never module variables.

Shapes: B batch, T time, S cache length, D model, N heads, K key/value heads, G = N/K, H head, F mlp, V vocab.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from .attention import KV, attend, visible, write
from .config import ModelConfig
from .matmul import matmul_t
from .rope import rope_table, rotate

Params = dict[str, Any]


class Linear(nnx.Module):
    def __init__(self, out_features: int, in_features: int, bias: bool = False):
        self.weight = nnx.Param(jnp.zeros((out_features, in_features)))
        self.bias = nnx.Param(jnp.zeros((out_features,))) if bias else None

    def __call__(self, x: jax.Array, dtype) -> jax.Array:
        """x [..., in] → [..., out] in float32; operands in `dtype`, accumulation in float32."""
        y = matmul_t(x, self.weight[...], dtype)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * scale * self.weight[...].astype(jnp.float32)


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig):
        self.config = c
        self.q_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, c.attention_bias)
        self.k_proj = Linear(c.num_key_value_heads * c.head_dim, c.hidden_size, c.attention_bias)
        self.v_proj = Linear(c.num_key_value_heads * c.head_dim, c.hidden_size, c.attention_bias)
        self.o_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, c.attention_bias)

    def __call__(self, x, rope, mask, cache: KV | None, at, dtype) -> tuple[jax.Array, KV]:
        """x [B, T, D], mask [B, T, S] → ([B, T, D], keys and values [B, K, S, H])."""
        c = self.config
        B, T, _ = x.shape
        q = self.q_proj(x, dtype).reshape(B, T, c.num_attention_heads, c.head_dim)
        k = self.k_proj(x, dtype).reshape(B, T, c.num_key_value_heads, c.head_dim)
        v = self.v_proj(x, dtype).reshape(B, T, c.num_key_value_heads, c.head_dim)
        q = rotate(q, rope).swapaxes(1, 2)
        kv = KV(rotate(k, rope).swapaxes(1, 2).astype(dtype), v.swapaxes(1, 2).astype(dtype))
        if cache is not None:
            kv = KV(write(cache.k, kv.k, at), write(cache.v, kv.v, at))
        heads = attend(q.astype(dtype), kv, mask)
        return self.o_proj(heads.swapaxes(1, 2).reshape(B, T, -1), dtype), kv


class MLP(nnx.Module):
    def __init__(self, c: ModelConfig):
        self.gate_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.up_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.down_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)

    def __call__(self, x, dtype):
        return self.down_proj(jax.nn.silu(self.gate_proj(x, dtype)) * self.up_proj(x, dtype), dtype)


class Block(nnx.Module):
    def __init__(self, c: ModelConfig):
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def __call__(self, x, rope, mask, cache, at, dtype):
        y, kv = self.self_attn(self.input_layernorm(x), rope, mask, cache, at, dtype)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x), dtype), kv


class Embedding(nnx.Module):
    def __init__(self, vocab: int, size: int):
        self.weight = nnx.Param(jnp.zeros((vocab, size)))


class Trunk(nnx.Module):
    def __init__(self, c: ModelConfig):
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        # Keys are strings because a parameter's path is its Hugging Face name.
        self.layers = nnx.Dict({str(i): Block(c) for i in range(c.num_hidden_layers)})
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Decoder(nnx.Module):
    def __init__(self, c: ModelConfig):
        self.config = c
        self.model = Trunk(c)
        self.lm_head = None if c.tie_word_embeddings else Linear(c.vocab_size, c.hidden_size)

    def __call__(self, tokens, positions, mask, caches=None, at=None, *, dtype=jnp.float32):
        """tokens, positions [B, T]; mask [B, T, S] → (hidden [B, T, D], one KV a layer)."""
        c, m = self.config, self.model
        x = jnp.take(m.embed_tokens.weight[...], tokens, axis=0).astype(jnp.float32)
        rope = rope_table(c, positions)
        kvs = []
        for i in range(c.num_hidden_layers):
            cache = None if caches is None else caches[i]
            x, kv = m.layers[str(i)](x, rope, mask, cache, at, dtype)
            kvs.append(kv)
        return m.norm(x), tuple(kvs)

    def head(self, hidden: jax.Array, dtype) -> jax.Array:
        """hidden [..., D] → logits [..., V], float32. A tied head is the embedding, transposed."""
        weight = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight[...]
        return matmul_t(hidden, weight, dtype)


@functools.lru_cache(maxsize=16)
def definition(c: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    """The graph definition and the shapes of the parameters; nothing is allocated."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(c)))
    return graph, nnx.to_pure_dict(state)


def bind(c: ModelConfig, params: Params) -> Decoder:
    """The decoder with these parameters in place; free inside `jit`."""
    return nnx.merge(definition(c)[0], nnx.State(params))


def shapes(c: ModelConfig) -> Params:
    """Parameters as ShapeDtypeStructs: what a checkpoint must hold."""
    return definition(c)[1]


def init(c: ModelConfig, key: jax.Array) -> Params:
    """Random float32 parameters: N(0, initializer_range²), norms 1, biases 0; a leaf depends on key and path."""

    def leaf(path, shape):
        name = "/".join(entry.key for entry in path)
        if name.endswith("norm/weight"):
            return jnp.ones(shape.shape)
        if name.endswith("bias"):
            return jnp.zeros(shape.shape)
        k = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
        return c.initializer_range * jax.random.normal(k, shape.shape)

    return jax.tree_util.tree_map_with_path(leaf, shapes(c))


def forward(c: ModelConfig, params: Params, tokens, *, positions=None, segments=None, dtype=jnp.float32):
    """Logits [B, T, V] float32 of right-padded tokens [B, T]; padding after a sequence cannot change it."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    decoder = bind(c, params)
    hidden, _ = decoder(tokens, positions, visible(positions, segments), dtype=dtype)
    return decoder.head(hidden, dtype)
