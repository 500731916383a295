"""A model, a configuration and a run of fine-tuning that several tests look at."""

from __future__ import annotations

import jax
import numpy as np

from train.learn.settings import Sft
from train.learn.sft import fine_tune

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip


SFT = Sft(learning_rate=3e-3, epochs=2, batch=8, max_length=96)


def tune(model, rows, config, mesh, **given):
    return fine_tune(model.config, model.params, rows, config, mesh=mesh, seed=7, **given)


def assert_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


TIMED = ("seconds", "tokens_per_second", "mfu")


def without_seconds(log):
    return [{k: v for k, v in metrics.items() if k not in TIMED} for metrics in log]
