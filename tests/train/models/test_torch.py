"""Random Llama configs against transformers on torch, both ways (Python 3.11, extra `torch`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.goldens.cases import BASE, LLAMA3, tensor, tokens
from helpers.tiny_models import config_of, logits, relative

from train.models.decoder import init
from train.models.hf import load_hf, save_hf


def random_attributes(seed: int) -> dict:
    """Any mixture of the features, odd sizes included."""
    r = np.random.default_rng(seed)
    kv, groups = int(r.integers(1, 4)), int(r.integers(1, 4))
    heads = kv * groups
    rope = [
        {"rope_theta": float(r.choice([100.0, 10000.0, 5e5]))},
        {"rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": float(r.uniform(1.5, 8))}},
        {"rope_parameters": {**LLAMA3, "factor": float(r.uniform(2, 32)), "rope_theta": 100.0}},
    ][seed % 3]
    return {
        "model_type": "llama",
        "vocab_size": int(r.integers(20, 80)),
        "hidden_size": heads * int(r.integers(3, 12)),
        "intermediate_size": int(r.integers(5, 60)),
        "num_hidden_layers": int(r.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 2 * int(r.integers(1, 12)),
        "max_position_embeddings": 64,
        "rms_norm_eps": float(10 ** r.uniform(-6, -2)),
        "tie_word_embeddings": bool(r.integers(2)),
        "attention_bias": bool(r.integers(2)),
        "mlp_bias": bool(r.integers(2)),
        **rope,
    }


def torch_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens(model.config.vocab_size))).logits.float().numpy()


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(12))
def test_random_configs_equal_transformers_both_ways(seed, tmp_path):
    """Their folder loads here, ours loads there, and all four logits agree."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig.from_dict(random_attributes(seed))).eval()
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            leaf.copy_(torch.tensor(tensor(name, tuple(leaf.shape))))
    theirs = torch_logits(model)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if seed % 2 else "1GB")
    config, params = load_hf(tmp_path / "theirs")
    ours = logits(config, params)
    assert relative(ours, theirs) < 1e-4
    save_hf(tmp_path / "ours", config, params, max_shard_bytes=9000 if seed % 2 else 2**30)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="float32").eval()
    assert relative(torch_logits(back), theirs) < 1e-6
    for (name, a), (_, b) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.torch
def test_a_bfloat16_export_is_what_transformers_rounds_to(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(BASE)
    params = init(config, jax.random.key(3))
    save_hf(tmp_path / "out", config, params, dtype=jnp.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    weight = torch.tensor(np.asarray(params["lm_head"]["weight"])).to(torch.bfloat16)
    assert torch.equal(model.lm_head.weight, weight)
