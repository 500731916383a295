"""A two-layer decoder in plain NumPy, float64: what the numbers of the analysis are compared with."""

import jax
import jax.numpy as jnp
import numpy as np

from train.models.config import ModelConfig
from train.models.decoder import init

CONFIG = ModelConfig(
    vocab_size=7, hidden_size=4, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=2, max_position_embeddings=64, initializer_range=0.7,
)  # fmt: skip


def params(seed):
    """Random weights whose norms are no ones."""
    made = init(CONFIG, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: w if w.ndim > 1 else jnp.asarray(rng.uniform(0.5, 1.5, w.shape), jnp.float32), made)


def float64(tree):
    return jax.tree.map(lambda w: np.asarray(w, np.float64), tree)


def norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * weight


def turned(x):
    """Rotate heads of two elements [T, N, 2] by one radian a position."""
    angle = np.arange(len(x))[:, None]
    a, b = x[..., 0], x[..., 1]
    return np.stack([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def block(layer, x, seen=None):
    """What a layer makes of the stream x [T, D]; `seen` is told what enters its linear layers."""
    at, h = layer["self_attn"], norm(x, layer["input_layernorm"]["weight"])
    q, k, v = ((h @ at[f"{name}_proj"]["weight"].T).reshape(len(x), -1, 2) for name in "qkv")
    q, k = turned(q), turned(k)
    scores = np.einsum("thd,sd->hts", q, k[:, 0]) / np.sqrt(2)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("hts,sd->thd", weights, v[:, 0]).reshape(len(x), -1)
    x = x + heads @ at["o_proj"]["weight"].T
    entered = {"self_attn.q_proj": h, "self_attn.k_proj": h, "self_attn.v_proj": h, "self_attn.o_proj": heads}
    mlp, h = layer["mlp"], norm(x, layer["post_attention_layernorm"]["weight"])
    gate = h @ mlp["gate_proj"]["weight"].T
    active = gate / (1 + np.exp(-gate)) * (h @ mlp["up_proj"]["weight"].T)
    if seen is not None:
        seen.update(entered | {"mlp.gate_proj": h, "mlp.up_proj": h, "mlp.down_proj": active})
    return x + active @ mlp["down_proj"]["weight"].T


def nll(tree, sequences, layers=(0, 1)):
    """Mean −log p of the completions of (prompt, completion) pairs, through some layers of a model in float64."""
    total, count = 0.0, 0
    for prompt, completion in sequences:
        tokens = [*prompt, *completion]
        x = tree["model"]["embed_tokens"]["weight"][tokens[:-1]]
        for layer in layers:
            x = block(tree["model"]["layers"][str(layer)], x)
        logits = norm(x, tree["model"]["norm"]["weight"]) @ tree["lm_head"]["weight"].T
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place in range(len(prompt), len(tokens)):
            total, count = total - logs[place - 1, tokens[place]], count + 1
    return total / count
