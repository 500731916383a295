"""Tiny models of every family, their logits and greedy tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from helpers.goldens.cases import tensor
from helpers.goldens.family_cases import FAMILY_CASES, family_tokens
from helpers.tiny_models import config_of
from train.generate.engine import Decoding, Engine
from train.generate.slots import Request
from train.models.config import Lora, ModelConfig
from train.models.decoder import forward, shapes

IDS = family_tokens(61)


def weights(config: ModelConfig):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(drawn(".".join(e.key for e in path), leaf.shape)), shapes(config)
    )


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of that name; transformers draws the gates and ups of all experts as one tensor."""
    if ".experts." not in name or name.endswith("down_proj.weight"):
        return tensor(name.replace("experts.down_proj.weight", "experts.down_proj"), shape)
    both = tensor(f"{name.partition('.experts.')[0]}.experts.gate_up_proj", (shape[0], 2 * shape[1], shape[2]))
    return both[:, shape[1] :] if "up_proj" in name else both[:, : shape[1]]


def logits(config, params, ids=IDS, **options) -> np.ndarray:
    """Operation by operation: a hundred small configs compile for minutes (jitted: the engine's tests below)."""
    return np.asarray(forward(config, params, jnp.asarray(ids), **{k: jnp.asarray(v) for k, v in options.items()}))


def pack(ids, lengths, rows: int = 2) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The first tokens of each row of ids one after another, in `rows` equal rows: (tokens, positions and segments)."""
    tokens = np.concatenate([row[:n] for row, n in zip(ids, lengths, strict=True)])
    positions = np.concatenate([np.arange(n) for n in lengths])
    segments = np.repeat(np.arange(len(lengths)), lengths)
    return np.tile(tokens, (rows, 1)), {k: np.tile(v, (rows, 1)) for k, v in
                                        {"positions": positions, "segments": segments}.items()}  # fmt: skip


def run_engine(config, params, prompts, new: int):
    engine = Engine(config, params, slots=8, how=Decoding(greedy=True), eos=())
    requests = [Request(i, tuple(p), np.zeros(2, np.uint32), new) for i, p in enumerate(prompts)]
    return [c.tokens for c in sorted(engine.run(requests), key=lambda c: c.id)]


KEY = jax.random.key(4)


LORA = Lora(rank=4, alpha=6.0)


def model(name):
    config = config_of(FAMILY_CASES[name])
    return config, weights(config)


def trained(adapter):
    """As if trained: B no longer zero."""
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(8), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
