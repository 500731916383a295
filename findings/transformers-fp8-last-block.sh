#!/usr/bin/env bash
# transformers dequantises FP8 weights with the wrong scales where the last block of 128 is cut short.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11. PYTHON=… chooses the interpreter.
# One would guess: a matrix with weight_block_size [128, 128] and 192 rows has a block of 128 rows and one of 64, as the
#   checkpoints are written; FineGrainedFP8Config(dequantize=True) multiplies each code by the scale of its block.
# What happens: the size of a block is taken to be rows // (rows of the scale grid), 96 here. Rows 96 to 127 get the
#   scale of the second block, and nothing is said. Where the division leaves a rest (576 rows, 5 blocks) it raises.
# Seen:
#   transformers 5.23.0, torch 2.13.0+cpu
#   dequantised / (code * scale of its block): row 0 1.0, row 100 4.0, row 150 1.0
# Exits with 0 while that is so, and with 1 once it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
# torch first and alone: otherwise it comes with packages for GPUs.
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check transformers==5.23.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - 2> /dev/null <<'PYTHON'
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

BLOCK, SIZE = 128, 192
torch.manual_seed(0)
sizes = dict(hidden_size=SIZE, intermediate_size=SIZE, num_hidden_layers=1, num_attention_heads=3, vocab_size=32)
plain = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).state_dict()
scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
spread = scale.repeat_interleave(BLOCK, 0)[:SIZE].repeat_interleave(BLOCK, 1)[:, :SIZE]
stored, wanted = {}, {}
for name, weight in plain.items():
    if not name.endswith("proj.weight"):
        stored[name] = weight.clone()
        continue
    codes = torch.randn(SIZE, SIZE).clamp(-4, 4).to(torch.float8_e4m3fn)
    stored |= {name: codes, f"{name}_scale_inv": scale.clone()}
    wanted[name] = codes.float() * spread
folder = pathlib.Path("model")
folder.mkdir()
save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16").to_dict()
config["quantization_config"] = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
}
(folder / "config.json").write_text(json.dumps(config))
asked = FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), dequantize=True)
model = LlamaForCausalLM.from_pretrained(folder, quantization_config=asked, dtype=torch.bfloat16)
name = "model.layers.0.self_attn.q_proj.weight"
found = [round(float(model.state_dict()[name][row, 0].float() / wanted[name][row, 0]), 2) for row in (0, 100, 150)]
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("dequantised / (code * scale of its block): row 0 {}, row 100 {}, row 150 {}".format(*found))
sys.exit(found != [1.0, 4.0, 1.0])
PYTHON
