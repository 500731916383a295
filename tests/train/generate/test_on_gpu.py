"""The decoder on a GPU against the same one on the CPU; `benchmarks/accelerator.py` runs what is marked `gpu`."""

import jax
import pytest

from train.generate.rollout import Prompt, rollout
from train.generate.settings import Settings
from train.models.characters import encode
from train.models.open import random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.35,
}  # fmt: skip
TEXTS = ("12+7-5?", "g48,18?", "s31,5,12<?", "a?b", "x" * 20, "0")
HOW = {"greedy": {}, "drawn": {"samples": 4, "temperature": 1.0}}


@pytest.mark.gpu
@pytest.mark.parametrize("how", list(HOW))
def test_a_gpu_says_what_the_cpu_says(how):
    """In products of float32; keys, and so draws, are the same on every device. Drawn: each slot is refilled."""
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU, this is {jax.default_backend()}")
    model = random_model(SIZES, make_mesh(Mesh()), seed=3)
    prompts = [Prompt(f"q{i}", tuple(encode(text))) for i, text in enumerate(TEXTS)]
    settings = Settings(max_new_tokens=12, slots=8, **HOW[how])

    def say(device):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            params = jax.device_put(model.params, device)
            done = rollout(model.config, params, model.tokenizer, prompts, settings, jax.random.key(5))
            return [(sample.prompt_id, sample.index, sample.tokens, sample.reason) for sample in done]

    assert say(jax.devices()[0]) == say(jax.devices("cpu")[0])
