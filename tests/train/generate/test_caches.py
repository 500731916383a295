"""Empty caches of the engine."""

import jax
import numpy as np

from train.generate.engine import Decoding, Engine
from train.generate.slots import Request
from train.models.open import random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip


def test_a_batch_of_a_size_that_was_there_compiles_nothing():
    """Not even the program that makes empty caches, for which a function made anew counts as another one."""
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, seconds, **_: events.append(name))
    model = random_model(SIZES, make_mesh(Mesh()), seed=3)
    engine = Engine(model.config, model.params, slots=16, how=Decoding(greedy=False), eos=())
    counts = []
    for size in (1, 3, 3, 8, 5):
        requests = [Request(i, (4, 5, 6), np.array([0, i], np.uint32), 3) for i in range(size)]
        before = len(events)
        assert len(list(engine.run(requests))) == size
        counts.append(sum(name.endswith("backend_compile_duration") for name in events[before:]))
    assert counts[1:] == [0] * 4, "all begin with eight slots, half of sixteen"
