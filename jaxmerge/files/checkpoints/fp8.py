r"""A folder of weights written with FP8 matrices, as transformers' fine-grained FP8 checkpoints have them.

$W_{ij} \approx q_{ij}\, s_{IJ}$: q is float8 e4m3, and every tile of 128 × 128 has one float32 scale
$s = \max|W| / 448$, for 448 is the largest e4m3 number. `NAME` holds q and `NAME_scale_inv` holds s, which is
multiplied, whatever the name says. The matrices of linear layers are stored so. Embeddings, heads, norms, routers and
biases stay as they are, and config.json names the modules that do. `quantised.py` reads the result back.

A matrix whose last tile would be cut short stays as it is too. The format allows it, and kernels compute it, but where
transformers dequantises (on a CPU; `Fp8Dequantize` of 5.23) it divides the matrix into tiles of equal size: it refuses
most such matrices, and multiplies some by the scales of other tiles.
"""

from __future__ import annotations

import math
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmerge.files import disk
from jaxmerge.files.checkpoints import safetensors, shards
from jaxmerge.files.checkpoints.beside import companions_of, write_companions
from jaxmerge.files.checkpoints.classes import is_transposed
from jaxmerge.files.checkpoints.source import Tensor, read_run
from jaxmerge.files.companions import as_json
from jaxmerge.files.documents import read_json, some

BLOCK = 128
LARGEST = 448.0  # of e4m3
CODES, SCALES = safetensors.DTYPES["F8_E4M3"], safetensors.DTYPES["F32"]
SCALE = "_scale_inv"
LAYER = re.compile(r"(^|\.)\d+\.")
# Modules of a layer whose matrix is no linear layer's, or one that FP8 checkpoints keep: routers decide by small gaps.
KEPT = re.compile(r"(^|\.)(\w*gate|\w*router|\w*embed\w*|\w*norm|\w*conv\w*|ln\w*|wte|wpe)$")
Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]
"""Dtype and shape of tensors by name, in the order of a file."""


def is_linear(name: str, dtype: np.dtype, shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    """Whether a tensor is the matrix of a linear layer, [out, in], among the numbered layers.

    Example:
      >>> bfloat16 = np.dtype(jnp.bfloat16)
      >>> is_linear("model.layers.0.mlp.gate_proj.weight", bfloat16, (256, 128), {})
      True
      >>> is_linear("model.layers.0.mlp.gate.weight", bfloat16, (8, 128), {})
      False
    """
    module, _, kind = name.rpartition(".")
    return (
        kind == "weight"
        and len(shape) == 2
        and bool(jnp.issubdtype(dtype, jnp.floating))
        and LAYER.search(name) is not None
        and KEPT.search(module) is None
        and not is_transposed(config, name)
    )


def is_stored(name: str, dtype: np.dtype, shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    """Whether a tensor is stored as codes: a linear layer's, with whole tiles or one tile along each axis."""
    return is_linear(name, dtype, shape, config) and all(size <= BLOCK or size % BLOCK == 0 for size in shape)


def layout(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], config: Mapping[str, Any]) -> Layout:
    """Return what is stored of tensors: codes and their scales, and the others as they are."""
    found: Layout = {}
    for name, (dtype, shape) in tensors.items():
        if is_stored(name, dtype, shape, config):
            found[name] = (CODES, shape)
            found[name + SCALE] = (SCALES, tuple(-(-size // BLOCK) for size in shape))
        else:
            found[name] = (dtype, shape)
    return found


def quantise(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes [m, n] and scales [⌈m/128⌉, ⌈n/128⌉] of a matrix [m, n]; a tile of zeros has scale 1.

    Example:
      >>> codes, scales = quantise(np.array([[1.0, -448.0]], np.float32))
      >>> codes.astype(np.float32).tolist(), scales.tolist()
      ([[1.0, -448.0]], [[1.0]])
    """
    wide = np.asarray(matrix, np.float32)
    edges = [np.arange(0, size, BLOCK) for size in wide.shape]
    largest = np.maximum.reduceat(np.maximum.reduceat(np.abs(wide), edges[0], axis=0), edges[1], axis=1)
    scales = np.where(largest > 0, np.maximum(largest / LARGEST, np.finfo(np.float32).tiny), 1).astype(np.float32)
    codes = np.clip(wide / spread(scales, wide.shape), -LARGEST, LARGEST).astype(CODES)
    return codes, scales


def spread(scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the scale of every element."""
    return np.repeat(np.repeat(scales, BLOCK, axis=0)[: shape[0]], BLOCK, axis=1)[:, : shape[1]]


def rounded(matrix: np.ndarray) -> np.ndarray:
    """Return what is read back of a matrix, float32."""
    codes, scales = quantise(matrix)
    return codes.astype(np.float32) * spread(scales, matrix.shape)


def described(config: Mapping[str, Any], tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, Any]:
    """Return config.json with what transformers reads of the form, and the modules that are not in it."""
    kept = [
        name.removesuffix(".weight")
        for name, (dtype, shape) in tensors.items()
        if name.endswith(".weight") and len(shape) == 2 and not is_stored(name, dtype, shape, config)
    ]
    head = [] if any(name.endswith("lm_head") for name in kept) else ["lm_head"]  # of tied ones there is no tensor
    return {
        **config,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": [*kept, *head],
        },
    }


def write(folder: pathlib.Path, out: pathlib.Path, max_shard_bytes: int) -> None:
    """Write a finished safetensors folder in this form; 128 rows of a matrix are held at a time.

    Raises:
      ValueError: no matrix of it would be stored as codes.
    """
    stored, _ = shards.open_folder(folder)
    config = read_json(folder / "config.json")
    tensors: Layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
    check(tensors, config)
    places = safetensors.plan(layout(tensors, config), max_shard_bytes)
    with disk.new_folder(out, places.total) as partial:
        writer = safetensors.Writer(partial, places)
        try:
            for name, tensor in stored.items():
                if is_stored(name, *tensors[name], config):
                    _write_codes(writer, name, tensor)
                else:
                    for first, run in _runs(tensor, BLOCK * 4096):
                        writer.write(name, run.view(np.uint8), first * run.itemsize)
            writer.finish()
        finally:
            writer.close()
        write_companions(partial, companions_of(folder))
        (partial / "config.json").write_bytes(as_json(described(config, tensors)))
        for file in folder.iterdir():
            if file.suffix != ".safetensors" and file.name != safetensors.INDEX and not (partial / file.name).exists():
                shutil.copyfile(file, partial / file.name)


def check(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], config: Mapping[str, Any]) -> list[str]:
    """Raise if nothing would be stored as codes; return what the user should know."""
    if not config:
        raise ValueError("format=fp8: the result has no config.json, which says how codes are read; leave format out")
    cut = [name for name, of in tensors.items() if is_linear(name, *of, config) and not is_stored(name, *of, config)]
    if not any(is_stored(name, *of, config) for name, of in tensors.items()):
        found = f"{cut[0]} is {list(tensors[cut[0]][1])}" if cut else "there is none"
        raise ValueError(
            f"format=fp8: wanted matrices of linear layers, [out, in] in numbered layers, whose sizes {BLOCK} divides; "
            f"{found}; leave format out"
        )
    if not cut:
        return []
    return [f"{len(cut)} matrices whose sizes {BLOCK} does not divide stay as they are: {some(cut, 2)}"]


def _write_codes(writer: safetensors.Writer, name: str, tensor: Tensor) -> None:
    """Quantise and write a matrix, a row of tiles at a time."""
    width = tensor.shape[1]
    for first, run in _runs(tensor, BLOCK * width):
        rows = run.reshape(-1, width)
        if not np.isfinite(rows.astype(np.float32)).all():
            raise ValueError(f"tensor {name!r} holds numbers that float32 does not; FP8 has no scale for them")
        codes, scales = quantise(rows)
        writer.write(name, codes.reshape(-1).view(np.uint8), first)
        writer.write(name + SCALE, scales.reshape(-1).view(np.uint8), first // (BLOCK * width) * scales.nbytes)


def _runs(tensor: Tensor, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Read a tensor in runs of so many elements: the first one's number, and the run."""
    size = math.prod(tensor.shape)
    for first in range(0, size, max(count, 1)):
        yield first, read_run(tensor, first, min(first + count, size))
