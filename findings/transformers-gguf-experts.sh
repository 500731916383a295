#!/usr/bin/env bash
# transformers loads a Mixtral from GGUF as a dense Llama whose MLPs are random numbers, other ones each time.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), gguf 0.19.0, accelerate 1.15.0, Python 3.11. PYTHON=… chooses the
#   interpreter.
# One would guess: llama.cpp's architecture "llama" with expert_count is Mixtral, and its converter writes Mixtral so;
#   transformers, which has Mixtral and reads experts from files of Qwen2-MoE and Qwen3-MoE, loads it or refuses it.
# What happens: it is loaded as LlamaForCausalLM. Routers and experts are left out, and the MLPs that no tensor fills are
#   initialised at random; a table on the screen says so, and nothing is raised. A Qwen3-MoE is loaded only if its experts
#   are 768 wide, the default of transformers' config: expert_feed_forward_length is not read.
# Seen:
#   transformers 5.23.0, torch 2.13.0+cpu, gguf 0.19.0
#   Mixtral of 4 experts: LlamaForCausalLM, 0 parameters of experts
#   loaded twice, the same logits: False
#   Qwen3-MoE with experts of width 768: moe_intermediate_size 768, loaded
#   Qwen3-MoE with experts of width 96: RuntimeError
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

WIDTH, HEADS, WORDS, EXPERTS = 64, 4, 32, 4


def write(path, arch, wide):
    """A mixture of experts of one layer with random weights."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (WORDS, WIDTH), "output": (WORDS, WIDTH), "blk.0.ffn_gate_inp": (EXPERTS, WIDTH)}
    shapes |= {f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{part}_exps": (EXPERTS, wide, WIDTH) for part in ("gate", "up")}
    shapes |= {"blk.0.ffn_down_exps": (EXPERTS, WIDTH, wide)}
    tensors = {f"{name}.weight": rng.standard_normal(shape) / 8 for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": np.ones(WIDTH) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    writer = gguf.GGUFWriter(path, arch)
    if arch == "qwen3moe":
        tensors |= {f"blk.0.attn_{part}_norm.weight": np.ones(WIDTH // HEADS) for part in "qk"}
        writer.add_expert_feed_forward_length(wide)
        writer.add_key_length(WIDTH // HEADS)
        writer.add_value_length(WIDTH // HEADS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    for name, array in tensors.items():
        writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(name):
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load("models", gguf_file=name, dtype=torch.float32).eval()


print(f"transformers {transformers.__version__}, torch {torch.__version__}, gguf {importlib.metadata.version('gguf')}")
pathlib.Path("models").mkdir()
write("models/mixtral.gguf", "llama", 96)
models = [load("mixtral.gguf") for _ in range(2)]
kind = type(models[0]).__name__
experts = sum("experts" in name for name, _ in models[0].named_parameters())
print(f"Mixtral of {EXPERTS} experts: {kind}, {experts} parameters of experts")
with torch.no_grad():
    one, two = (model(torch.arange(8)[None]).logits for model in models)
print(f"loaded twice, the same logits: {torch.equal(one, two)}")
as_seen = kind == "LlamaForCausalLM" and experts == 0 and not torch.equal(one, two)
for wide in (768, 96):
    write(f"models/qwen{wide}.gguf", "qwen3moe", wide)
    try:
        found = f"moe_intermediate_size {load(f'qwen{wide}.gguf').config.moe_intermediate_size}, loaded"
    except RuntimeError:
        found = "RuntimeError"
    print(f"Qwen3-MoE with experts of width {wide}: {found}")
    as_seen &= (found == "RuntimeError") == (wide == 96)
sys.exit(not as_seen)
PYTHON
