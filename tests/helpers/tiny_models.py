"""Tiny models as Hugging Face folders."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from helpers.goldens.cases import tensor, tokens
from train.models.config import ModelConfig
from train.models.decoder import forward, shapes
from train.models.hf import named
from train.models.hf_config import config_from_hf
from train.models.stored import parts


def config_of(attributes) -> ModelConfig:
    return config_from_hf(attributes, source="config.json")


def write_folder(folder: pathlib.Path, attributes, *, state=None, **changes) -> pathlib.Path:
    """A Hugging Face folder as someone else would have written it; `changes` replace or (None) remove tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(attributes))
    if state is None:
        config = config_of(attributes)
        state = state_of(config, {name: tensor(name, leaf.shape) for name, leaf in named(shapes(config))})
    state = {name: array for name, array in {**state, **changes}.items() if array is not None}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def state_of(config: ModelConfig, leaves) -> dict[str, np.ndarray]:
    """The tensors of a file with these leaves: those of experts one by one."""
    return {
        name: leaves[part.leaf] if part.expert is None else leaves[part.leaf][part.expert]
        for name, part in parts(config, leaves).items()
    }


def logits(config, params) -> np.ndarray:
    return np.asarray(jax.jit(forward, static_argnums=0)(config, params, jnp.asarray(tokens(config.vocab_size))))


def relative(a, b) -> float:
    """Largest error over the standard deviation of the logits."""
    return float(np.abs(a - b).max() / b.std())
