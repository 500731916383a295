"""Mixtures of experts on a mesh with an axis for them: what one device computes."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from train.generate.rollout import Prompt, rollout
from train.generate.settings import Settings
from train.learn.batches import Rows
from train.learn.settings import Sft, Step
from train.learn.sft import fine_tune
from train.log import UserError
from train.models.open import random_model
from train.runtime.mesh import batch_sharding, make_mesh, sharding_of, shardings
from train.runtime.settings import Mesh

SIZES = {
    "family": "qwen2_moe", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3, "qkv_bias": True,
    "experts": {"count": 4, "per_token": 2, "intermediate_size": 16, "shared_intermediate_size": 16},
}  # fmt: skip
MESHES = {"one": Mesh(), "2×2×2": Mesh(fsdp=2, expert=2, tensor=2)}


@pytest.fixture(scope="module")
def on():
    return {name: (mesh := make_mesh(m), random_model(SIZES, mesh, seed=1)) for name, m in MESHES.items()}


def test_experts_lie_apart(on):
    mesh, model = on["2×2×2"]
    mlp = model.params["model"]["layers"]["0"]["mlp"]
    assert {s.data.shape for s in mlp["experts"]["up_proj"]["weight"].addressable_shards} == {(2, 8, 16)}
    assert {s.data.shape for s in mlp["experts"]["down_proj"]["weight"].addressable_shards} == {(2, 16, 8)}
    assert mlp["gate"]["weight"].sharding.spec == mlp["shared_expert_gate"]["weight"].sharding.spec == P()
    assert shardings(mesh, model.params)["model"]["norm"]["weight"].spec == P()
    assert batch_sharding(mesh, 4).spec == P(("data", "fsdp", "expert"))
    with pytest.raises(UserError, match=r"axis of 3 does not divide over mesh\.expert=2"):
        sharding_of(mesh, "model/layers/0/mlp/experts/up_proj/weight", (3, 16, 32))


def test_eight_devices_learn_what_one_learns(on):
    """Losses, the balance of the router, and the weights after two updates, in which the router's gradient is."""
    r = np.random.default_rng(0)
    rows = Rows(r.integers(2, 60, (16, 17)).astype(np.int32), np.ones((16, 17), np.float32))
    config = Sft(learning_rate=1e-3, epochs=1, batch=8, step=Step(router_aux_loss_coef=0.5))
    made = [fine_tune(m.config, m.params, rows, config, mesh=mesh, seed=2) for mesh, m in (on["2×2×2"], on["one"])]
    for key in ("loss", "router_balance", "router_max_share", "expert_share_1", "gradient_norm"):
        found, wanted = ([metrics[key] for metrics in log] for _, log in made)
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
    for a, b in zip(*(jax.tree.leaves(params) for params, _ in made), strict=True):
        assert float(np.abs(np.asarray(a) - np.asarray(b)).mean()) < 1e-5


def test_eight_devices_sample_what_one_samples(on):
    prompts = [Prompt(str(i), tuple(range(2, 5 + i))) for i in range(5)]
    settings = Settings(max_new_tokens=6, slots=8, temperature=0.0)
    found, wanted = (
        rollout(m.config, m.params, m.tokenizer, prompts, settings, jax.random.key(0))
        for _, m in (on["2×2×2"], on["one"])
    )
    for a, b in zip(found, wanted, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
