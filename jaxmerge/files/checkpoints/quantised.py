r"""Which tensors of a checkpoint are codes and scales of weights, and the weights they stand for.

What is dequantised exactly as its own library does it is listed in `METHODS`: FP8 with `weight_scale_inv` or
`weight_scale` (both are multiplied, whatever the name says), GPTQ, AWQ, MXFP4 and bitsandbytes. Everything else that
has codes and scales is refused by name, because a merge of codes is a merge of nothing.

References:
  Frantar et al., "GPTQ", https://arxiv.org/abs/2210.17323
  Lin et al., "AWQ", https://arxiv.org/abs/2306.00978
  Rouhani et al., "Microscaling Data Formats for Deep Learning", https://arxiv.org/abs/2310.10537
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmerge.files.checkpoints.bitsandbytes import eight_bits, four_bits
from jaxmerge.files.checkpoints.classes import is_transposed
from jaxmerge.files.checkpoints.codes import FP4_BLOCK, Microscaled, Packed, Scaled, grid
from jaxmerge.files.checkpoints.safetensors import DTYPES
from jaxmerge.files.checkpoints.source import Tensor

METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "gptq", "awq", "mxfp4", "bitsandbytes")
CONFIG_KEYS = ("quantization_config", "compression_config")
# How a scale of a weight is named after the weight.
SCALES = ("_scale_inv", "_scale")
# Scales of activations and caches: they say how to compute, not what the weights are.
ACTIVATIONS = (
    "input_scale", "activation_scale", "output_scale", "input_scale_ub", "q_scale", "k_scale", "v_scale", "kv_scale",
)  # fmt: skip
# Tensors that only quantised layers have. What is left of them after dequantising is refused.
CODES = (
    "qweight", "qzeros", "weight_packed", "weight_shape", "weight_scale_2", "weight_global_scale", "SCB", "absmax",
    "quant_map", "nested_absmax", "weight_format", "codebooks", "W_q", "weight_zero_point", "bitmask", "compressed",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Dequantised:
    """A checkpoint's tensors as floats. natural: the dtype that a result has of those that were codes."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    natural: dict[str, np.dtype]
    notes: tuple[str, ...]


def dequantise(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Dequantised:
    """Replace codes and scales by the weights they stand for, and drop what config.json says of them.

    Args:
      name: of the model, for messages.
      tensors: as stored.
      config: config.json; its `quantization_config` says how codes are packed.

    Raises:
      ValueError: a method or a layout that is not known here; names it, and a way out.
    """
    said = _said(config)
    method = str(said.get("quant_method", "")).lower()
    if method and method not in METHODS:
        raise ValueError(_refusal(name, f"config.json says quant_method {method!r}"))
    left = dict(tensors)
    made = {**four_bits(name, left, config), **eight_bits(name, left, config)}
    made |= {**_packed(name, left, said, config), **_scaled(name, left, said), **_microscaled(name, left, config)}
    for tensor in left:
        if tensor.rpartition(".")[2] in CODES or (method and _is_code(left[tensor])):
            # What the config calls it: NVFP4 and others are a format of a method that has several.
            said_too = [str(said[key]) for key in ("quant_algo", "format") if isinstance(said.get(key), str)]
            kind = f" of {', '.join([method, *said_too])}" if method else ""
            raise ValueError(_refusal(name, f"tensor {tensor!r} is stored as {left[tensor].dtype} codes{kind}"))
    idle = [tensor for tensor in left if made and tensor.rpartition(".")[2] in ACTIVATIONS]
    # In the order of the file: a result is written in it.
    order = {tensor: place for place, tensor in enumerate(tensors)}
    made_at = {weight: min(order[part] for part in parts) for weight, (parts, _) in made.items()}
    found = {tensor: (order[tensor], left[tensor]) for tensor in left if tensor not in idle}
    found |= {weight: (made_at[weight], tensor) for weight, (_, tensor) in made.items()}
    plain = {tensor: entry for tensor, (_, entry) in sorted(found.items(), key=lambda item: item[1][0])}
    natural = dict.fromkeys(made, _natural(config))
    return Dequantised(plain, _without(config), natural, _notes(name, method, made, idle))


def _said(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for part in (config, config.get("text_config") or {}):
        for key in CONFIG_KEYS:
            if isinstance(part.get(key), Mapping):
                return part[key]
    return {}


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    if isinstance(plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in plain["text_config"].items() if key not in CONFIG_KEYS}
    return plain


def _natural(config: Mapping[str, Any]) -> np.dtype:
    """The dtype of the model before it was quantised, as far as config.json says it."""
    text = config.get("text_config") or {}
    said = (part.get(key) for part in (config, text) for key in ("dtype", "torch_dtype"))
    names = {str(dtype): dtype for dtype in DTYPES.values() if jnp.issubdtype(dtype, jnp.floating)}
    return next((names[found] for word in said if (found := str(word).removeprefix("torch.")) in names), DTYPES["BF16"])


def _refusal(name: str, what: str) -> str:
    return (
        f"model {name!r} is quantised: {what}, which is no layout that is dequantised here (docs/merge.md lists "
        f"those of {', '.join(METHODS)}); "
        "give the model it was made from, or dequantise it first, with transformers: "
        "AutoModelForCausalLM.from_pretrained(…).dequantize().save_pretrained(…)"
    )


def _notes(name: str, method: str, made: Mapping[str, Any], idle: list[str]) -> tuple[str, ...]:
    if not made:
        return ()
    notes = (f"{name}: {len(made)} tensors are stored as {method or 'FP8'} codes with scales; dequantised",)
    return (*notes, f"{name}: {len(idle)} scales of activations are left out") if idle else notes


def _is_code(tensor: Tensor) -> bool:
    """Whether a tensor holds what needs a scale: FP8, or a matrix of bytes."""
    return _is_fp8(tensor) or (tensor.dtype in (np.int8, np.uint8) and len(tensor.shape) > 1)


def _is_fp8(tensor: Tensor) -> bool:
    return tensor.dtype in (DTYPES["F8_E4M3"], DTYPES["F8_E5M2"])


def _scaled(name: str, left: dict[str, Tensor], said: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """Take weights with a scale of their own out of `left`; (names of the parts, tensor) by name."""
    made: dict[str, tuple[tuple[str, ...], Tensor]] = {}
    for weight, codes in list(left.items()):
        key = next((weight + ending for ending in SCALES if weight + ending in left), None)
        if key is None or not (_is_fp8(codes) or codes.dtype == np.int8):
            continue
        keys = [weight, key, *([zeros] if (zeros := f"{weight}_zero_point") in left else [])]
        parts = tuple(left[part] for part in keys)
        counts = grid(codes.shape, parts[1].shape)
        blocks = None if counts is None else _blocks(codes.shape, counts, _block_sizes(said))
        if blocks is None or any(part.shape != parts[1].shape for part in parts[2:]):
            raise ValueError(
                f"model {name!r}: {key} has shape {list(parts[1].shape)}, which is no scale of {weight} "
                f"{list(codes.shape)} in blocks of {list(_block_sizes(said)) or 'known size'}; copy the checkpoint "
                "again, or dequantise it with the library that made it"
            )
        made[weight] = (tuple(keys), Scaled(weight, tuple(codes.shape), parts, blocks))
        for part in keys:
            del left[part]
    return made


def _block_sizes(said: Mapping[str, Any]) -> tuple[int, ...]:
    """Rows and columns of a block, where the config says them."""
    groups = said.get("config_groups")
    weights = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, Mapping) else []
    found = [said.get("weight_block_size"), *(weight.get("block_structure") for weight in weights)]
    sizes = next((size for size in found if isinstance(size, list | tuple) and len(size) == 2), (128, 128))
    return tuple(int(size) for size in sizes)


def _blocks(shape: tuple[int, ...], counts: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Elements of a block along each axis: the last block may be cut short where the config says its size."""
    found = []
    asked = (1,) * (len(shape) - 2) + sizes if len(shape) >= 2 else (1,) * len(shape)
    for length, count, size in zip(shape, counts, asked, strict=True):
        if count == 1:
            found.append(max(length, 1))
        elif -(-length // size) == count:
            found.append(size)
        elif length % count == 0:
            found.append(length // count)
        else:
            return None
    return tuple(found)


def _packed(
    name: str, left: dict[str, Tensor], said: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """Take GPTQ's and AWQ's words out of `left`; (names of the parts, tensor) by name."""
    made: dict[str, tuple[tuple[str, ...], Tensor]] = {}
    modules = [tensor.removesuffix(".qweight") for tensor in left if tensor.endswith(".qweight")]
    for module in modules:
        awq, bits, shift = _packing(name, said)
        ends = ["qweight", "qzeros", "scales", *(["g_idx"] if f"{module}.g_idx" in left and not awq else [])]
        keys = [f"{module}.{end}" for end in ends]
        if lacking := [key for key in keys if key not in left]:
            raise ValueError(f"model {name!r}: {module} has codes but no {', '.join(lacking)}; copy the whole folder")
        parts = tuple(left[key] for key in keys)
        count = 32 // bits
        rows, columns = parts[0].shape
        inputs, outputs = (rows, columns * count) if awq else (rows * count, columns)
        groups = parts[2].shape[0]
        wanted = [(rows, columns), (groups, outputs // count), (groups, outputs), (inputs,)][: len(parts)]
        found = [tuple(part.shape) for part in parts]
        if found != wanted or any(part.dtype != np.int32 for part in (*parts[:2], *parts[3:])):
            raise ValueError(
                f"model {name!r}: {module} has {dict(zip(ends, map(list, found), strict=True))}, wanted "
                f"{dict(zip(ends, map(list, wanted), strict=True))} of int32 for {bits} bits; copy the checkpoint again"
            )
        transposed = is_transposed(config, f"{module}.weight")
        shape = (inputs, outputs) if transposed else (outputs, inputs)
        weight = Packed(f"{module}.weight", shape, parts, bits, awq, shift, transposed)
        made[weight.name] = (tuple(keys), weight)
        for key in keys:
            del left[key]
        left.pop(f"{module}.g_idx", None)
    return made


def _packing(name: str, said: Mapping[str, Any]) -> tuple[bool, int, int]:
    """AWQ or GPTQ, the bits of a code, and what to add to stored zero points."""
    method, bits = said.get("quant_method"), said.get("bits", said.get("w_bit"))
    layout = str(
        said.get("checkpoint_format" if method == "gptq" else "version", "gptq" if method == "gptq" else "gemm")
    )
    known = {"gptq": {"gptq": 1, "gptq_v2": 0}, "awq": {"gemm": 0}}
    widths = {"gptq": (2, 4, 8), "awq": (4,)}
    if method not in known or layout.lower() not in known[method] or bits not in widths[method]:
        raise ValueError(_refusal(name, f"quant_method {method!r} in the layout {layout!r} with {bits!r} bits"))
    return method == "awq", bits, known[method][layout.lower()]


def _microscaled(
    name: str, left: dict[str, Tensor], config: Mapping[str, Any]
) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    made: dict[str, tuple[tuple[str, ...], Tensor]] = {}
    for key in [tensor for tensor in left if tensor.endswith("_blocks")]:
        weight = key.removesuffix("_blocks")
        scales = f"{weight}_scales"
        if scales not in left:
            continue
        blocks = left[key]
        shape, byte = tuple(blocks.shape), np.dtype(np.uint8)
        right = len(shape) == 4 and shape[3] == FP4_BLOCK // 2 and tuple(left[scales].shape) == shape[:3]
        if config.get("model_type") != "gpt_oss" or not right or {blocks.dtype, left[scales].dtype} != {byte}:
            raise ValueError(
                _refusal(name, f"{key} {blocks.dtype}{list(shape)} beside {scales} of another model or shape")
            )
        whole = (shape[0], shape[2] * FP4_BLOCK, shape[1])
        made[weight] = ((key, scales), Microscaled(weight, whole, (blocks, left[scales])))
        del left[key], left[scales]
    return made
