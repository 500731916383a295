"""Our adapters in PEFT: the same logits, and the same merged weights (Python 3.11, extra `torch`)."""

import numpy as np
import pytest
from helpers.goldens.family_cases import FAMILY_CASES
from helpers.tiny_families import IDS, KEY, LORA, logits, trained, weights
from helpers.tiny_models import config_of, relative

from train.models.config import Lora
from train.models.hf import named, save_hf
from train.models.lora import attach, init_lora, merge_lora
from train.models.lora_files import load_lora, save_lora

pytestmark = [
    pytest.mark.torch,
    # PEFT asks transformers in the old way.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.mark.parametrize("targets", [LORA.targets, (r"layers/1/.*(q|up|qkv|gate_up)_proj$",)], ids=["all", "some"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "phi3"])
def test_peft_loads_our_adapters(name, targets, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = config_of(FAMILY_CASES[name])
    params, lora = weights(config), Lora(4, 6.0, targets)
    adapter = trained(init_lora(lora, params, KEY))
    save_hf(tmp_path / "base", config, params)
    save_lora(tmp_path / "adapter", lora, adapter, params, base=str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32", attn_implementation="eager")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = model(torch.tensor(IDS)).logits.numpy()
    assert relative(theirs, logits(config, params)) > 0.01
    assert relative(logits(config, attach(lora, params, adapter)), theirs) < 1e-4
    merged = model.merge_and_unload()
    for path, leaf in named(merge_lora(lora, params, adapter)):
        np.testing.assert_allclose(merged.get_parameter(path).detach().numpy(), leaf, atol=1e-6, err_msg=path)


def test_we_load_what_peft_saves(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = config_of(FAMILY_CASES["gemma2"])
    params = weights(config)
    save_hf(tmp_path / "base", config, params)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32", attn_implementation="eager")
    torch.manual_seed(0)
    model = get_peft_model(
        base, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    )
    with torch.no_grad():
        for path, leaf in model.named_parameters():
            if "lora_B" in path:
                leaf.copy_(0.2 * torch.randn(leaf.shape))
    model.save_pretrained(tmp_path / "adapter")
    lora, adapter = load_lora(tmp_path / "adapter")
    assert (lora.rank, lora.alpha, lora.dropout) == (3, 5.0, 0.1)
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(IDS)).logits.numpy()
    assert relative(logits(config, attach(lora, params, adapter)), theirs) < 1e-4
