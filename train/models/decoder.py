"""The decoder as Flax NNX modules whose attributes are the Hugging Face tensor names; every family is this one.

The modules hold no state of their own: `params` is the nested dict of `design`-wide Params, merged with
the (cached) graph definition inside the jitted function, so one pytree goes through sampling, training
and merging unchanged. Key/value caches are arguments and results, never module variables.

The layers are unrolled, `layers = {"0": …, "1": …}`, or stacked, `layers = {"stacked": …}` with a leading axis L
(stacked.py), and then scanned: one block is compiled, whatever L.

Shapes: B batch, T time, S cache length, D model, N heads, K key/value heads, G = N/K, H head, R rotated part of it,
F mlp, V vocab, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from ..runtime.mesh import gathered, spread
from . import lora
from .attention import KV, attend, cap, visible, within, write
from .config import ModelConfig
from .experts import ExpertMLP
from .matmul import matmul_t
from .rope import rope_table, rotate

Params = dict[str, Any]
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Linear(nnx.Module):
    side: lora.Side | None = None
    """A LoRA path beside the weight, put there by `bind`."""

    def __init__(self, out_features: int, in_features: int, bias: bool = False):
        self.weight = nnx.Param(jnp.zeros((out_features, in_features)))
        self.bias = nnx.Param(jnp.zeros((out_features,))) if bias else None

    def __call__(self, x: jax.Array, dtype) -> jax.Array:
        """x [..., in] → [..., out] in float32; operands in `dtype`, accumulation in float32."""
        y = matmul_t(x, self.weight[...], dtype)
        if self.side is not None:
            y = y + self.side(x, dtype)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


class RMSNorm(nnx.Module):
    def __init__(self, size: int, c: ModelConfig):
        self.weight = nnx.Param(jnp.ones((size,)))
        self.eps, self.offset = c.rms_norm_eps, float(c.unit_offset_norms)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * scale * (self.offset + self.weight[...].astype(jnp.float32))


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig):
        self.config = c
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        if c.fused_projections:
            self.qkv_proj = Linear(q + 2 * kv, c.hidden_size, c.qkv_bias)
        else:
            self.q_proj = Linear(q, c.hidden_size, c.qkv_bias)
            self.k_proj = Linear(kv, c.hidden_size, c.qkv_bias)
            self.v_proj = Linear(kv, c.hidden_size, c.qkv_bias)
        self.o_proj = Linear(c.hidden_size, q, c.o_bias)
        each = (c.head_dim, c.head_dim) if c.qk_norm else (q, kv) if c.qk_norm_all else None
        self.q_norm = RMSNorm(each[0], c) if each else None
        self.k_norm = RMSNorm(each[1], c) if each else None

    def __call__(self, x, rope, mask, cache: KV | None, at, dtype) -> tuple[jax.Array, KV]:
        """x [B, T, D], mask [B, T, S] → ([B, T, D], keys and values [B, K, S, H])."""
        c = self.config
        B, T, _ = x.shape
        q, k, v = self.project(x, dtype)
        if self.q_norm is not None and self.k_norm is not None and c.qk_norm_all:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (spread(y.reshape(B, T, -1, c.head_dim), tensor=2) for y in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None and not c.qk_norm_all:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(y, rope, interleaved=c.rope_interleaved).swapaxes(1, 2) for y in (q, k))
        kv = KV(k.astype(dtype), v.swapaxes(1, 2).astype(dtype))
        if cache is not None:
            kv = KV(write(cache.k, kv.k, at), write(cache.v, kv.v, at))
        heads = attend(q.astype(dtype), kv, mask, scale=c.score_scale, softcap=c.attn_logit_softcapping)
        return self.o_proj(heads.swapaxes(1, 2).reshape(B, T, -1), dtype), kv

    def project(self, x, dtype) -> list[jax.Array]:
        c = self.config
        if not c.fused_projections:
            return [projection(x, dtype) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return jnp.split(self.qkv_proj(x, dtype), [q, q + kv], axis=-1)


class MLP(nnx.Module):
    def __init__(self, c: ModelConfig):
        self.config = c
        if c.fused_mlp:
            self.gate_up_proj = Linear(2 * c.intermediate_size, c.hidden_size, c.mlp_bias)
        else:
            self.gate_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)
            self.up_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.down_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)

    def __call__(self, x, dtype):
        if self.config.fused_mlp:
            gate, up = jnp.split(self.gate_up_proj(x, dtype), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x, dtype), self.up_proj(x, dtype)
        return self.down_proj(spread(ACTIVATIONS[self.config.activation](gate) * up, tensor=-1), dtype)


class Block(nnx.Module):
    def __init__(self, c: ModelConfig, layer: int = 0):
        self.config = c
        self.self_attn = Attention(c)
        self.mlp = mixture(c) if c.has_experts(layer) else MLP(c)
        for name in filter(None, c.block_norms):
            setattr(self, name, RMSNorm(c.hidden_size, c))

    def __call__(self, x, rope, mask, cache, at, dtype):
        x, scale = spread(x), self.config.residual_multiplier
        y, kv = self.self_attn(self.norm(0, x), rope, mask, cache, at, dtype)
        x = spread(x + times(self.norm(1, y), scale))
        y, scores = self.feed(self.norm(2, x), dtype)
        return x + times(self.norm(3, y), scale), kv, scores

    def feed(self, x, dtype) -> tuple[jax.Array, jax.Array | None]:
        """The MLP's output, and the scores of its router, [B, T, E], where it has one."""
        return self.mlp(x, dtype) if isinstance(self.mlp, ExpertMLP) else (self.mlp(x, dtype), None)

    def norm(self, place: int, x: jax.Array) -> jax.Array:
        """x after the norm of this place among `block_norms`, if there is one."""
        name = self.config.block_norms[place]
        return getattr(self, name)(x) if name else x


def times(x: jax.Array, factor: float) -> jax.Array:
    """x · factor; nothing is computed for 1."""
    return x if factor == 1 else x * factor


def mixture(c: ModelConfig) -> ExpertMLP:
    """The mixture of experts of a layer."""
    e = c.experts
    assert e is not None, "asked where a layer has experts"
    wide = e.shared_intermediate_size
    shared = None if wide is None else MLP(dataclasses.replace(c, intermediate_size=wide))
    return ExpertMLP(e, c.hidden_size, ACTIVATIONS[c.activation], shared)


class Embedding(nnx.Module):
    def __init__(self, vocab: int, size: int):
        self.weight = nnx.Param(jnp.zeros((vocab, size)))


class Trunk(nnx.Module):
    def __init__(self, c: ModelConfig, names: tuple[str, ...]):
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        # Keys are strings because a parameter's path is its Hugging Face name.
        self.layers = nnx.Dict({name: Block(c, int(name) if name.isdecimal() else 0) for name in names})
        self.norm = RMSNorm(c.hidden_size, c)


class Decoder(nnx.Module):
    def __init__(self, c: ModelConfig, names: tuple[str, ...]):
        self.config = c
        self.model = Trunk(c, names)
        self.lm_head = None if c.tie_word_embeddings else Linear(c.vocab_size, c.hidden_size)

    def __call__(self, tokens, positions, mask, caches=None, at=None, *, dtype=jnp.float32, remat="none"):
        """Run the layers.

        Args:
          tokens, positions: [B, T]. Padding carries the position of the last token before it.
          mask: [B, T, S], causality × segments; windows are applied here, layer by layer.
          caches, at: while decoding, one KV a layer (of stacked layers: one KV of [L, B, K, S, H]) and the index
            of each row's token, [B].
          remat: what is computed again in the backward pass: "none", everything in a block ("full"), or all but
            the results of its matrix products ("dots").

        Returns:
          (hidden [B, T, D] float32, keys and values as in `caches`).
        """
        return self.routed(tokens, positions, mask, caches, at, dtype=dtype, remat=remat)[:2]

    def routed(self, tokens, positions, mask, caches=None, at=None, *, dtype=jnp.float32, remat="none"):
        """As a call, and third the routers' scores: [B, T, E] of each layer with experts; of a scan [L, B, T, E].

        A scan over caches returns none.
        """
        c, m = self.config, self.model
        x, views = self.embed(tokens), self.views(positions, mask, at)
        if "stacked" in m.layers:
            x, kvs, scores = scan(c, m.layers["stacked"], x, views, caches, at, dtype, remat)
            return m.norm(x), kvs, () if scores is None else scores
        kvs, scores = [], []
        for i, kind in enumerate(c.layers):
            graph, leaves = nnx.split(m.layers[str(i)])
            cache = None if caches is None else caches[i]
            x, kv, of_layer = runner(graph, dtype, remat)(leaves, x, *views[kind], cache, at)
            kvs.append(kv)
            scores += [] if of_layer is None else [of_layer]
        return m.norm(x), tuple(kvs), tuple(scores)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] → what enters the first layer, [B, T, D] float32."""
        x = jnp.take(gathered(self.model.embed_tokens.weight[...]), tokens, axis=0).astype(jnp.float32)
        x = x * self.config.hidden_size**0.5 if self.config.scaled_embedding else x
        return times(x, self.config.embedding_multiplier)

    def views(self, positions: jax.Array, mask: jax.Array, at: jax.Array | None = None) -> dict[Any, tuple[Any, Any]]:
        """Kind of layer → its table of rotations and its mask."""
        c = self.config
        return {
            kind: (rope_table(c, positions, kind[1]), within(mask, kind[0], at)) for kind in dict.fromkeys(c.layers)
        }

    def head(self, hidden: jax.Array, dtype) -> jax.Array:
        """hidden [..., D] → logits [..., V], float32. A tied head is the embedding, transposed."""
        if self.lm_head is None:
            logits = matmul_t(hidden, self.model.embed_tokens.weight[...], dtype)
        else:
            logits = self.lm_head(hidden, dtype)
        logits = times(spread(logits, tensor=-1), 1 / self.config.logits_scaling)
        return cap(logits, self.config.final_logit_softcapping)


def runner(graph, dtype, remat: str, *, scanned: bool = False):
    """A block as a function of its leaves, so that all of it can be computed again or scanned over."""

    def run(leaves, x, rope, mask, cache, at):
        return nnx.merge(graph, leaves)(x, rope, mask, cache, at, dtype)

    if remat == "none":
        return run
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r} is not known; known: none, {', '.join(REMAT)}")
    # In a scan nothing could merge the two computations; elsewhere XLA would.
    return jax.checkpoint(run, policy=REMAT[remat], prevent_cse=not scanned)


def scan(c: ModelConfig, blocks: Block, x, views, caches, at, dtype, remat: str):
    """The stacked layers, one after another; where layers differ, each picks its view by index."""
    graph, leaves = nnx.split(blocks)
    run = runner(graph, dtype, remat, scanned=True)
    kinds = list(views)
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *views.values()) if len(kinds) > 1 else None
    which = jnp.asarray([kinds.index(kind) for kind in c.layers])

    def view(kind):
        return views[kinds[0]] if stacked is None else jax.tree.map(lambda v: v[kind], stacked)

    def fresh(x, layer):
        leaves, kind = layer
        rope, mask = view(kind)
        x, *made = run(leaves, x, rope, mask, None, at)
        return x, made

    def cached(carry, layer):
        (x, caches), (leaves, kind, i) = carry, layer
        rope, mask = view(kind)
        # Carried whole and written in place: caches as scanned inputs and outputs are copied at every step.
        cache = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), caches)
        x, kv, _ = run(leaves, x, rope, mask, cache, at)
        return (x, jax.tree.map(lambda a, new: lax.dynamic_update_index_in_dim(a, new, i, 0), caches, kv)), None

    if caches is None:
        x, (kvs, scores) = lax.scan(fresh, x, (leaves, which))
        return x, kvs, scores
    (x, caches), _ = lax.scan(cached, (x, caches), (leaves, which, jnp.arange(c.num_hidden_layers)))
    return x, caches, None


def is_stacked(params: Params) -> bool:
    """Whether the layers have the leading axis L; also of adapters, which may have no layers."""
    return "stacked" in params.get("model", {}).get("layers", {})


@functools.lru_cache(maxsize=32)
def definition(c: ModelConfig, stacked: bool = False) -> tuple[nnx.GraphDef, Params]:
    """The graph definition and the shapes of the (unrolled) parameters; nothing is allocated."""
    names = ("stacked",) if stacked else tuple(str(i) for i in range(c.num_hidden_layers))
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(c, names)))
    return graph, nnx.to_pure_dict(state)


def bind(c: ModelConfig, params: Params) -> Decoder:
    """The decoder with these parameters in place; free inside `jit`. LoRA sides (lora.py) come along."""
    plain, sides = lora.detach(params)
    decoder = nnx.merge(definition(c, is_stacked(plain))[0], nnx.State(plain))
    for path, leaves in sides.items():
        module = functools.reduce(lambda m, key: m[key] if isinstance(m, nnx.Dict) else getattr(m, key), path, decoder)
        module.side = lora.Side(leaves)
    return decoder


def shapes(c: ModelConfig) -> Params:
    """Parameters as ShapeDtypeStructs: what a checkpoint must hold."""
    return definition(c)[1]


def init(c: ModelConfig, key: jax.Array) -> Params:
    """Random float32 parameters: N(0, initializer_range²), norms 1, biases 0; a leaf depends on key and path."""

    def leaf(path, shape):
        return init_leaf(c, key, "/".join(entry.key for entry in path), shape.shape)

    return jax.tree_util.tree_map_with_path(leaf, shapes(c))


def draw_normal(scale: float, shape: tuple[int, ...], key: jax.Array, salt: np.uint32) -> jax.Array:
    return scale * jax.random.normal(jax.random.fold_in(key, salt), shape)


def init_leaf(c: ModelConfig, key: jax.Array, path: str, shape: tuple[int, ...], draw=draw_normal) -> jax.Array:
    if path.endswith("norm/weight"):
        return jnp.full(shape, 0.0 if c.unit_offset_norms else 1.0)
    if path.endswith("bias"):
        return jnp.zeros(shape)
    return draw(c.initializer_range, shape, key, np.uint32(zlib.crc32(path.encode())))


def count_up(shape: tuple[int, ...], lengths=None) -> jax.Array:
    """Positions [B, T] from 0; after a row's `lengths` [B] (None: no padding) the last one is repeated."""
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    return positions if lengths is None else jnp.minimum(positions, jnp.maximum(lengths - 1, 0)[:, None])


def logprobs(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """log softmax(logits [..., V]) at labels [...]."""
    return jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def forward(c: ModelConfig, params: Params, tokens, *, lengths=None, positions=None, segments=None, dtype=jnp.float32):
    """Logits [B, T, V] float32 of right-padded tokens [B, T]; padding after a sequence cannot change it.

    Args:
      lengths: [B], tokens before the padding: rotary scalings that look at a sequence's length need it.
      positions, segments: [B, T] of packed rows: positions start again in each segment.
    """
    if positions is None:
        positions = count_up(tokens.shape, lengths)
    decoder = bind(c, params)
    hidden, _ = decoder(tokens, positions, visible(positions, segments), dtype=dtype)
    return decoder.head(hidden, dtype)
