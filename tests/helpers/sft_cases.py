"""A model, a configuration and a run of fine-tuning that several tests look at."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from train.learn.progress import Checkpoints
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


LEARNER = SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def with_step(config, **changes):
    return dataclasses.replace(config, step=dataclasses.replace(config.step, **changes))


class Killed(Exception):
    pass


class InMemory(Checkpoints):
    """Keeps the newest state as NumPy arrays: the next step donates the state's own buffers."""

    def __init__(self):
        self.kept: Any = None
        self.snapshots: list[tuple[int, Any]] = []

    def restore(self, like):
        if self.kept is None:
            return None, 0, []
        state, step, log = self.kept
        return jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), state, like), step, list(log)

    def save(self, state, step, metrics):
        self.kept = (jax.tree.map(np.array, state), step, list(metrics))

    def snapshot(self, params, index):
        self.snapshots.append((index, jax.tree.map(np.array, params)))


def kill_after(steps):
    """An `on_step` that dies once `steps` steps are seen."""

    def on_step(metrics):
        if metrics["step"] == steps:
            raise Killed

    return on_step
