#!/usr/bin/env bash
# transformers does not take a tensor from the shard that the index names, where another shard has one of that name.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11. PYTHON=… chooses the interpreter.
# One would guess: model.safetensors.index.json says in its weight_map which file holds a tensor, so the tensor of that
#   file is loaded. A later shard that still holds an old copy, as after an interrupted conversion, changes nothing.
# What happens: all tensors of all named shards are gathered by name, and the shard that comes last wins.
# Seen:
#   transformers 5.23.0, torch 2.13.0+cpu
#   the index names shard 1, shard 2 has a copy: loaded from shard 2
#   the index names shard 2, shard 1 has a copy: loaded from shard 2
# Exits with 0 while that is so, and with 1 once it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
# torch first and alone: otherwise it comes with packages for GPUs.
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check transformers==5.23.0
cd "$work"
"$work/venv/bin/python" - 2> /dev/null <<'PYTHON'
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
NAME = "model.layers.0.self_attn.q_proj.weight"
models = []
for seed in (0, 1):
    torch.manual_seed(seed)
    models.append(LlamaForCausalLM(config).state_dict())
right, old = models
own = {name: weight for name, weight in right.items() if "layers.0" in name}
rest = {name: weight for name, weight in right.items() if "layers.0" not in name}
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
found = []
for number in (1, 2):
    folder = pathlib.Path(f"model{number}")
    folder.mkdir()
    named, other = (f"model-0000{n}-of-00002.safetensors" for n in (number, 3 - number))
    save_file(own, folder / named, metadata={"format": "pt"})
    save_file({**rest, NAME: old[NAME].clone()}, folder / other, metadata={"format": "pt"})
    placed = dict.fromkeys(own, named) | dict.fromkeys(rest, other)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    config.save_pretrained(folder)
    loaded = LlamaForCausalLM.from_pretrained(folder).state_dict()[NAME]
    found.append(number if torch.equal(loaded, right[NAME]) else 3 - number if torch.equal(loaded, old[NAME]) else 0)
    print(f"the index names shard {number}, shard {3 - number} has a copy: loaded from shard {found[-1]}")
sys.exit(found != [2, 2])
PYTHON
