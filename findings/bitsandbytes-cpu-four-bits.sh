#!/usr/bin/env bash
# bitsandbytes' kernel for CPUs dequantises four bits wrongly where a row is longer than a block and no multiple of it.
#
# Versions: bitsandbytes 0.50.2, torch 2.13.0 (a CPU with AVX-512), Python 3.11. PYTHON=… chooses the interpreter.
# One would guess: the scale of element k is absmax[k // blocksize], k counted over the whole matrix, as it was when the
#   matrix was quantised, and as bitsandbytes' own code in plain torch has it.
# What happens: the kernel takes other scales, so the weights are off by more than the quantisation itself.
# Seen:
#   bitsandbytes 0.50.2, torch 2.13.0+cpu
#   8 x 64 in blocks of 64: largest error 0.311 by the kernel, 0.311 by plain torch
#   8 x 96 in blocks of 64: largest error 1.538 by the kernel, 0.385 by plain torch
#   8 x 128 in blocks of 64: largest error 0.347 by the kernel, 0.347 by plain torch
#   8 x 160 in blocks of 64: largest error 1.894 by the kernel, 0.367 by plain torch
# Exits with 0 while rows of whole blocks agree and the others are off by more than half as much again, else with 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
# torch first and alone: otherwise it comes with packages for GPUs.
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check bitsandbytes==0.50.2
cd "$work"
TORCH_COMPILE_DISABLE=1 "$work/venv/bin/python" - 2> /dev/null <<'PYTHON'
import importlib.metadata
import sys

import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("bitsandbytes", "torch")))
torch.manual_seed(0)
times = []
for width in (64, 96, 128, 160):
    weights = torch.randn(8, width)
    codes, state = quantize_4bit(weights, blocksize=64, quant_type="nf4")
    kernel = dequantize_4bit(codes, state)
    code = get_4bit_type("nf4", device="cpu")
    plain = _dequantize_4bit_compute(codes.reshape(-1), state.absmax, code, 64, weights.shape, torch.float32)
    errors = [float((made - weights).abs().max()) for made in (kernel, plain)]
    print("8 x {} in blocks of 64: largest error {:.3f} by the kernel, {:.3f} by plain torch".format(width, *errors))
    times.append(errors[0] / errors[1])
sys.exit(not (max(times[0], times[2]) < 1.01 and min(times[1], times[3]) > 1.5))
PYTHON
