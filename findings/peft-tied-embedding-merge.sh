#!/usr/bin/env bash
# PEFT merges an adapter of a tied embedding into another model than the one its forward pass computes.
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11. PYTHON=… chooses the interpreter.
# One would guess: merge_and_unload() gives the logits of the forward pass with the adapter loaded, and
#   ensure_weight_tying=True, which keeps head and embedding one, makes that safe for a model that ties the two.
# What happens: the embedding's update is added to the one weight that both share. Without ensure_weight_tying the head
#   changes with it, which the forward pass left as it was. With it the merged logits are off by as much as they are
#   large.
# Seen:
#   peft 0.21.2, transformers 5.23.0, torch 2.13.0+cpu
#   ensure_weight_tying=False: |merged - forward| is 594.9 times |forward|
#   ensure_weight_tying=True: |merged - forward| is 1.0 times |forward|
# Exits with 0 while both are off by more than half of |forward|, and with 1 once one is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
# torch first and alone: otherwise it comes with packages for GPUs.
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check peft==0.21.2 transformers==5.23.0
cd "$work"
"$work/venv/bin/python" - 2> /dev/null <<'PYTHON'
import sys

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
words = torch.arange(3, 15)[None]
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
off = []
for ensure in (False, True):
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=True))
    asked = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"],
        ensure_weight_tying=ensure,
    )
    adapted = get_peft_model(model, asked).eval()
    with torch.no_grad():
        forward = adapted(words).logits
        merged = adapted.merge_and_unload()(words).logits
    off.append(float((merged - forward).abs().max() / forward.abs().max()))
    print(f"ensure_weight_tying={ensure}: |merged - forward| is {off[-1]:.1f} times |forward|")
sys.exit(min(off) < 0.5)
PYTHON
