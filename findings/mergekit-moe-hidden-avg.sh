#!/usr/bin/env bash
# mergekit-moe's gate_mode hidden_avg counts padding: what a prompt says depends on the prompts beside it.
#
# Versions: mergekit 0.1.5, transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11. PYTHON=… chooses the interpreter.
# One would guess: the direction of an expert is the mean over its prompts of the mean over a prompt's tokens, so that
#   the direction of two prompts is half the sum of the directions of each alone.
# What happens: prompts are padded to the longest, and the sum over all places, padding among them, is divided by the
#   padded length. A short prompt beside a long one is mostly padding.
# Seen:
#   mergekit 0.1.5, transformers 5.24.0, torch 2.13.0+cpu
#   2 and 2 words: |both - mean of each| is 0.000 times |mean of each|
#   2 and 24 words: |both - mean of each| is 1.552 times |mean of each|
# Exits with 0 while prompts of one length agree and prompts of unlike lengths are off by more than a tenth, else with 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
# torch first and alone: otherwise it comes with packages for GPUs.
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check mergekit==0.1.5 transformers==5.24.0
cd "$work"
"$work/venv/bin/python" - 2> /dev/null <<'PYTHON'
import importlib.metadata
import sys

import tokenizers
import torch
import transformers
from mergekit.moe.router import get_hidden_states, tokenize_prompts

print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mergekit", "transformers", "torch")))
words = {"<pad>": 0, "<s>": 1} | {f"w{i}": i for i in range(2, 40)}
backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", padding_side="left")
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=40)).eval()


def direction(*prompts):
    return torch.stack(list(get_hidden_states(model, tokenize_prompts(list(prompts), tokenizer), average=True)))


short, other = "w2 w3", "w4 w5"
long = " ".join(f"w{i}" for i in range(6, 30))
off = []
for beside in (other, long):
    each = (direction(short) + direction(beside)) / 2
    off.append(float((direction(short, beside) - each).norm() / each.norm()))
    print(f"2 and {len(beside.split())} words: |both - mean of each| is {off[-1]:.3f} times |mean of each|")
sys.exit(not (off[0] < 1e-4 and off[1] > 0.1))
PYTHON
