#!/usr/bin/env bash
# transformers loads a Llama from GGUF without its attention biases, and says nothing.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), gguf 0.19.0, accelerate 1.15.0, Python 3.11. PYTHON=… chooses the
#   interpreter.
# One would guess: the gguf package lists biases of q, k, v and the output among the tensors of the architecture "llama"
#   (a config.json says attention_bias), so a file that has them is loaded with them, or refused.
# What happens: the config that is made of the file says attention_bias=False, and the four biases are left out. Of two
#   files, one of them with biases, the same model is loaded.
# Seen:
#   transformers 5.23.0, torch 2.13.0+cpu, gguf 0.19.0
#   a file with 16 tensors: attention_bias False, 12 parameters
#   a file without the biases, 12 tensors: attention_bias False, 12 parameters
#   largest difference between the logits of the two: 0.0
# Exits with 0 while that is so, and with 1 once it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
# torch first and alone: otherwise it comes with packages for GPUs.
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - 2> /dev/null <<'PYTHON'
import importlib.metadata
import pathlib
import sys

import gguf
import numpy as np
import torch
import transformers

WIDTH, HEADS, MLP, WORDS = 64, 4, 96, 32


def write(path, biased):
    """A Llama of one layer with random weights."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (WORDS, WIDTH), "output": (WORDS, WIDTH)}
    shapes |= {f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (MLP, WIDTH), "blk.0.ffn_up": (MLP, WIDTH), "blk.0.ffn_down": (WIDTH, MLP)}
    tensors = {f"{name}.weight": rng.standard_normal(shape) / 8 for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": np.ones(WIDTH) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    if biased:
        tensors |= {f"blk.0.attn_{part}.bias": np.ones(WIDTH) for part in ("q", "k", "v", "output")}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    for name, array in tensors.items():
        writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(tensors)


print(f"transformers {transformers.__version__}, torch {torch.__version__}, gguf {importlib.metadata.version('gguf')}")
pathlib.Path("models").mkdir()
logits, parameters = [], []
for name, biased in (("with", True), ("without", False)):
    count = write(f"models/{name}.gguf", biased)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        "models", gguf_file=f"{name}.gguf", dtype=torch.float32
    ).eval()
    parameters.append(len(list(model.parameters())))
    with torch.no_grad():
        logits.append(model(torch.arange(8)[None]).logits)
    what = f"a file with {count} tensors" if biased else f"a file without the biases, {count} tensors"
    print(f"{what}: attention_bias {model.config.attention_bias}, {parameters[-1]} parameters")
difference = (logits[0] - logits[1]).abs().max().item()
print(f"largest difference between the logits of the two: {difference}")
sys.exit(not (parameters == [12, 12] and difference == 0.0))
PYTHON
