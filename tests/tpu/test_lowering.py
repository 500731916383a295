"""The step, the decoder and the merge lower for TPU and GPU: what a CPU can check of platforms it is not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge
from train.generate.caches import empty_caches
from train.generate.engine import Decoding, decode
from train.learn.settings import Sft
from train.learn.step import init_state, make_step
from train.models.decoder import init
from train.models.open import random_config
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

CONFIG = random_config(
    {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
)


@pytest.fixture(scope="module")
def params():
    return init(CONFIG, jax.random.key(0))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_step_decode_and_merge_lower(platform, params):
    config = Sft(batch=4)
    state = init_state(config, params, make_mesh(Mesh()))
    batch = {"tokens": jnp.zeros((4, 17), jnp.int32), "weights": jnp.ones((4, 17))}
    step = make_step(CONFIG, dataclasses.replace(config, learning_rate=0.0), "bfloat16")
    assert "stablehlo.dot_general" in lowered(step, platform, state, batch, jnp.float32(0.1))
    how = Decoding(False, top_p=0.9, dtype="bfloat16")
    zeros = np.zeros(4, np.int32)
    arguments = (CONFIG, params, empty_caches(CONFIG, 4, 32, "bfloat16"), zeros, zeros, zeros)
    keys = np.zeros((4, 2), np.uint32)
    assert "stablehlo.while" in lowered(decode, platform, *arguments, keys, jnp.float32(1), how=how)
    merge = jax.jit(lambda a, b, alpha: jaxmerge.imm([b], base=a, alpha=alpha))
    assert "stablehlo.multiply" in lowered(merge, platform, params, params, jnp.float32(0.5))


def lowered(function, platform: str, *arguments, **options) -> str:
    return function.trace(*arguments, **options).lower(lowering_platforms=(platform,)).as_text()
