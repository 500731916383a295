#!/usr/bin/env bash
# Past the short context of longrope, transformers' generate gives other tokens with its cache than without, except in Phi-3.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11. PYTHON=… chooses the interpreter.
# One would guess: the cache saves time and changes nothing, as with every other rotation but the dynamic ones. With
#   longrope a sequence longer than original_max_position_embeddings is rotated by the long factors, all of its keys.
# What happens: keys that are in the cache when the sequence grows past that length stay rotated by the short factors,
#   while queries and new keys are rotated by the long ones. Phi3ForCausalLM drops its cache at that length and computes
#   all keys anew; LlamaForCausalLM, which takes the same rope_parameters, does not. Nothing is said.
# Seen (the prompt has 8 tokens, the short context 16; step 9 is the first one that reads a longer sequence):
#   transformers 5.23.0, torch 2.13.0+cpu
#   LlamaForCausalLM: tokens differ from step 9 on
#   Phi3ForCausalLM: the same tokens
# Exits with 0 while that is so, else with 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
# torch first and alone: otherwise it comes with packages for GPUs.
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2> /dev/null <<'PYTHON'
import importlib.metadata
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch")))
rope = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, "factor": 4.0,
    "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)],
}
sizes = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "rope_parameters": rope, "original_max_position_embeddings": 16,
}
same = {}
for config, model in ((LlamaConfig, LlamaForCausalLM), (Phi3Config, Phi3ForCausalLM)):
    torch.manual_seed(0)
    made = model(config(**sizes)).eval()
    prompt = torch.arange(2, 10)[None]
    texts = []
    for cache in (True, False):
        mask = torch.ones_like(prompt)
        out = made.generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False, use_cache=cache)
        texts.append(out[0, prompt.shape[1]:].tolist())
    first = next((i for i, (a, b) in enumerate(zip(*texts)) if a != b), None)
    same[model.__name__] = first
    print(f"{model.__name__}: " + ("the same tokens" if first is None else f"tokens differ from step {first} on"))
sys.exit(not (same["Phi3ForCausalLM"] is None and same["LlamaForCausalLM"] is not None and same["LlamaForCausalLM"] >= 9))
PYTHON
