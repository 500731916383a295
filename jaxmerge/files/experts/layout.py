"""One layout for the experts of a checkpoint: a tensor for each matrix of each expert.

Published checkpoints store the experts of a layer one by one. transformers 5 holds them stacked, [E, 2F, D] and
[E, D, F], and can write them so; mergekit-moe does. A rule that looks at a whole tensor, such as TIES, must see one
expert's matrix at a time, and two checkpoints of unlike layouts have no tensor in common. So stacked experts are read
as the tensors that they stand for, where transformers knows the family under both layouts. Families that know no
other layout than a stacked one keep it, and `is_stacked` tells their tensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxmerge.files.checkpoints.classes import model_types
from jaxmerge.files.checkpoints.source import Part, Source, Tensor

STACKED = re.compile(r"(?P<block>(.*\.)?mlp)\.experts\.(?P<kind>gate_up_proj|down_proj)")
# What families without another layout call their stacked experts; the first axis of each is the expert.
KEPT = re.compile(r"(.*\.)?experts\.(gate_up_proj|gate_proj|up_proj|down_proj)(_bias)?")
# The names of an expert's gate, up and down projection, by model type, and what the block is called on disk.
_QWEN = ("mlp", ("gate_proj", "up_proj", "down_proj"))
_MIXTRAL = ("block_sparse_moe", ("w1", "w3", "w2"))
LAYOUTS: dict[str, tuple[str, tuple[str, str, str]]] = {
    "mixtral": _MIXTRAL, "minimax": _MIXTRAL, "qwen2_moe": _QWEN, "qwen3_moe": _QWEN, "qwen3_next": _QWEN,
    "olmoe": _QWEN, "flex_olmo": _QWEN, "deepseek_v2": _QWEN, "deepseek_v3": _QWEN, "glm4_moe": _QWEN, "dots1": _QWEN,
    "hunyuan_v1_moe": _QWEN, "afmoe": _QWEN, "longcat_flash": _QWEN, "solar_open": _QWEN,
}  # fmt: skip


def unstacked(source: Source, notes: list[str]) -> Source:
    """Return a checkpoint with its experts one by one; one that stores them so, or knows no such layout, as it is."""
    layout = next((LAYOUTS[kind] for kind in model_types(source.config) if kind in LAYOUTS), None)
    stacks = {} if layout is None else {name: None for name in source.tensors if _splits(name, source.tensors)}
    if layout is None or not stacks:
        return source
    block, parts = layout
    blocks = {found["block"] for name in stacks if (found := STACKED.fullmatch(name))}
    tensors: dict[str, Tensor] = {}
    natural: dict[str, np.dtype] = {}
    for name, tensor in source.tensors.items():
        for new, part in _parts(name, tensor, blocks, block, parts, name in stacks):
            tensors[new] = part
            if name in source.natural:
                natural[new] = source.natural[name]
    notes.append(f"{source.name} stores its experts stacked ({next(iter(stacks))}): each becomes a tensor of its own")
    return dataclasses.replace(source, tensors=tensors, natural=natural)


def _splits(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is a stack [E, 2F, D] or [E, D, F] with the other one beside it: others lie the other way."""
    found = STACKED.fullmatch(name)
    if found is None:
        return False
    pair = [tensors.get(f"{found['block']}.experts.{kind}") for kind in ("gate_up_proj", "down_proj")]
    shapes = [tensor.shape for tensor in pair if tensor is not None and len(tensor.shape) == 3]
    if len(shapes) < 2:
        return False
    (count, twice, wide), (other, out, inner) = shapes
    return (count, twice, wide) == (other, 2 * inner, out)


def _parts(
    name: str, tensor: Tensor, blocks: set[str], block: str, parts: Sequence[str], splits: bool
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that one stands for, by their names on disk: a stack's matrices, or the tensor itself."""
    front = next((front for front in blocks if name.startswith(f"{front}.")), None)
    if front is None:
        yield name, tensor
        return
    renamed = front.removesuffix("mlp") + block
    if not splits:
        new = renamed + name.removeprefix(front)
        yield new, tensor if new == name else Part(new, tensor.shape, tensor, 0)
        return
    count, rows, wide = tensor.shape
    kinds = parts[2:] if name.endswith("down_proj") else parts[:2]
    height = rows // len(kinds)
    size = height * wide * tensor.dtype.itemsize
    for expert in range(count):
        for i, kind in enumerate(kinds):
            new = f"{renamed}.experts.{expert}.{kind}.weight"
            yield new, Part(new, (height, wide), tensor, (expert * len(kinds) + i) * size)


def is_stacked(name: str, shape: Sequence[int]) -> bool:
    """Say whether a tensor's first axis is over experts, of which a rule is to see one at a time.

    Example:
      >>> is_stacked("model.layers.0.mlp.experts.down_proj", (8, 16, 4)), is_stacked("mlp.experts.3.w1.weight", (16, 4))
      (True, False)
    """
    return KEPT.fullmatch(name) is not None and len(shape) > 1
