"""The base model of a config: loaded from where `model.path` says, or random with its characters."""

from __future__ import annotations

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from ..config import Source
from ..log import UserError
from ..mesh import put, sharding_of
from ..resolve import build
from ..tasks import EOS_ID, PAD_ID, SYMBOLS, write_tokenizer
from .config import ModelConfig
from .decoder import init_leaf, shapes
from .families import FAMILIES
from .hf_config import config_to_hf
from .load import Model, load_model
from .tokenizer import Tokenizer


def load_source(source: Source, mesh: jax.sharding.Mesh, *, seed: int) -> Model:
    """The model of a config on its mesh, float32 masters."""
    if source.random is not None:
        return random_model(source.random, mesh, seed=seed)
    return load_model(
        source.path,
        sharding=functools.partial(sharding_of, mesh),
        dtype=jnp.float32,
        sha256=source.sha256,
    )


def random_config(sizes: dict) -> ModelConfig:
    """Sizes of a model over the symbols of the miniature, with what its family fixes; one that can be exported."""
    values = {"vocab_size": len(SYMBOLS), "eos_token_id": [EOS_ID], "bos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    family = FAMILIES.get(str(sizes.get("family", "llama")))
    try:
        config = build(ModelConfig, values | (family.fixed if family else {}) | sizes, "model.random")
        config_to_hf(config)
        return config
    except ValueError as error:
        raise UserError(f"model.random: {error}") from None


def random_model(sizes: dict, mesh: jax.sharding.Mesh, *, seed: int) -> Model:
    """Random weights and a tokenizer of characters: for tests, bug reports and pretraining from nothing."""
    config = random_config(sizes)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(folder)
        tokenizer = Tokenizer.from_folder(folder)
    fitted = tokenizer.fitted(vocab_size=config.vocab_size, eos_ids=config.eos_token_id, source="model.random")
    draw, key = jax.jit(init_leaf, static_argnums=(0, 2, 3)), jax.random.key(seed)

    def leaf(path, shape):
        # Drawn whole on one device, a leaf at a time: drawn in parts, its last bits would depend on the mesh.
        name = "/".join(entry.key for entry in path)
        return put(np.asarray(draw(config, key, name, shape.shape)), sharding_of(mesh, name, shape.shape))

    return Model(config, jax.tree_util.tree_map_with_path(leaf, shapes(config)), fitted)
