"""A step of fine-tuning on a GPU, where attention is cuDNN's; `benchmarks/accelerator.py` runs what is marked `gpu`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.learn.settings import Sft, Step
from train.learn.step import compute_of, init_state, make_step
from train.models.open import random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128, "initializer_range": 0.1,
}  # fmt: skip


def batch(packed):
    """Rows of 64 tokens, so 63 positions, as most rows have an odd number of them."""
    random = np.random.default_rng(0)
    found = {"tokens": random.integers(0, 64, (4, 64), np.int32), "weights": np.ones((4, 64), np.float32)}
    return found | ({"segments": np.sort(random.integers(1, 4, (4, 64)), axis=1).astype(np.int32)} if packed else {})


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_steps_with_cudnn_are_steps_with_plain_attention(packed):
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU, this is {jax.default_backend()}")
    mesh, rows = make_mesh(Mesh()), batch(packed)
    model = random_model(SIZES, mesh, seed=0)

    def losses(attention):
        sft = Sft(batch=4, step=Step(attention=attention))
        how = compute_of(sft, model.config, model.params, mesh, "bfloat16")
        assert how.attention == ("cudnn" if attention == "auto" else attention)
        state, step, found = init_state(sft, model.params, mesh), make_step(model.config, sft, how), []
        for _ in range(5):
            state, sums = step(state, rows, jnp.float32(3e-3))
            found.append(float(sums["loss"] / sums["weight"]))
        return found

    ours, plain = losses("auto"), losses("xla")
    np.testing.assert_allclose(ours, plain, rtol=0.02)
    assert ours[-1] < 0.5 * ours[0]
