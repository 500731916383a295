"""Make bitsandbytes.npz anew: layers as bitsandbytes stores them, and the floats that it makes of them.

`PYTHONPATH=tests:. python -m helpers.goldens.make_bitsandbytes` with torch and bitsandbytes 0.50.2. Rows are of whole
blocks: of others the kernel for CPUs makes other floats than bitsandbytes' own formula (findings/).
"""

import json
import pathlib

import numpy as np

SHAPE = (12, 64)
LAYERS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "nested": {"quant_type": "nf4", "compress_statistics": True},
    "stored as bfloat16": {"quant_type": "nf4", "compress_statistics": True, "storage": "bfloat16"},
    "int8": None,
}


def layer(kind, weights):
    """The state that a layer saves, and its weights as floats."""
    import bitsandbytes
    import torch

    outputs, inputs = weights.shape
    given = torch.nn.Parameter(torch.tensor(weights), requires_grad=False)
    options = LAYERS[kind]
    if options is None:
        made = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
        made.weight = bitsandbytes.nn.Int8Params(given.data, requires_grad=False, has_fp16_weights=False)
        made.to("cpu")
        floats = bitsandbytes.functional.int8_vectorwise_dequant(made.weight.data, made.weight.SCB)
    else:
        options = dict(options)
        storage = getattr(torch, options.pop("storage", "uint8"))
        made = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, quant_storage=storage, **options)
        made.weight = bitsandbytes.nn.Params4bit(given.data, requires_grad=False, quant_storage=storage, **options)
        made.to("cpu")
        floats = bitsandbytes.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)
    return made.state_dict(), floats.numpy()


def main():
    import torch

    arrays = {}
    rng = np.random.default_rng(0)
    for kind in LAYERS:
        state, floats = layer(kind, rng.standard_normal(SHAPE).astype(np.float32))
        arrays[f"{kind}/floats"] = floats
        for name, tensor in state.items():
            if tensor.dtype == torch.bfloat16:  # which NumPy has no name for
                tensor = tensor.contiguous().view(torch.int16)
            arrays[f"{kind}/{name}"] = tensor.numpy()
    path = pathlib.Path(__file__).parent / "bitsandbytes.npz"
    np.savez_compressed(path, **arrays)
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    print(f"{path}: {path.stat().st_size:,} bytes\n{json.dumps(shapes)}")


if __name__ == "__main__":
    main()
