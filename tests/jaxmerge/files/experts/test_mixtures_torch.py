"""Mixtures of experts as transformers loads them (Python 3.11, extra `torch`)."""

import pathlib

import numpy as np
import pytest
from helpers.tiny_experts import ROWS, dense, recipe, three
from safetensors.numpy import load_file

from jaxmerge.files import merge

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

SAME = """
base_model: base
gate_mode: random
experts: [{source_model: base}, {source_model: base}, {source_model: base}]
"""
# An expert that sees every token and adds nothing.
NONE = "shared_experts: [{source_model: base, residual_scale: 0.0}]\n"


def load(folder):
    """Load a folder and return the model, after a look at its keys."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(folder):
    import torch

    tokens = torch.tensor(np.random.default_rng(5).integers(0, ROWS, (2, 24)))
    with torch.no_grad():
        return load(folder)(tokens).logits.float().numpy()


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_transformers_loads_every_family_and_the_experts_are_used(kind, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    three(kind)
    recipe("cheap_embed", shared=kind == "qwen2")
    merge("moe.yaml", "out", max_shard_bytes=40_000)
    assert pathlib.Path("out/model.safetensors.index.json").exists()
    found = logits("out")
    assert np.isfinite(found).all()
    assert not np.allclose(found, logits("base"), rtol=0.1)


@pytest.mark.parametrize(
    ("kind", "more", "base"),
    [
        ("llama", "", {"kv": 4, "unsaid": ("rms_norm_eps", "num_key_value_heads"), "rope_theta": 500.0}),
        ("mistral", "", {"sliding_window": 4}),
        ("mistral", NONE, {"heads": 2, "unsaid": ("head_dim",), "sliding_window": None}),
        ("qwen2", NONE, {"unsaid": ("rms_norm_eps",)}),
        ("qwen3", "", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 200.0}}),
    ],
)
def test_a_mixture_of_the_base_alone_computes_what_the_base_does(kind, more, base, tmp_path, monkeypatch):
    """Whatever the base's config.json leaves out: the family of experts takes other things for granted."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    dense("base", kind, 0, **base)
    pathlib.Path("moe.yaml").write_text(SAME + more)
    merge("moe.yaml", "out")
    wanted = logits("base")
    np.testing.assert_allclose(logits("out"), wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_both_layouts_that_transformers_writes_merge_into_what_it_loads(kind, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    three(kind)
    recipe("cheap_embed", shared=kind == "qwen2")
    merge("moe.yaml", "made")
    load("made").save_pretrained("stacked", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file("stacked/model.safetensors"))
    named = [{"model": name, "parameters": {"weight": 0.5}} for name in ("stacked", "made")]
    merge({"merge_method": "linear", "models": named}, "out")
    found, wanted = load_file("out/model.safetensors"), load_file("made/model.safetensors")
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    np.testing.assert_array_equal(logits("out"), logits("made"))
