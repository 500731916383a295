"""What files call the tensors of a model: its own names, but for mixtures of experts.

Published checkpoints hold one tensor for each matrix of each expert; here a leaf holds one matrix of all experts.
Files in which transformers 5 stacked them otherwise are read as the published ones (`jaxmerge.files.experts.layout`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .config import ModelConfig

STACKS = ("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight", "mlp.experts.down_proj.weight")
# Of families that call them otherwise: the block, and an expert's gate, up and down projection.
OWN = {"mixtral": ("block_sparse_moe", ("w1", "w3", "w2"))}


class Part(NamedTuple):
    """What a tensor of a file is of a leaf."""

    leaf: str
    expert: int | None
    """Its index along the first axis; None: it is the whole leaf."""
    shape: tuple[int, ...]


def parts(config: ModelConfig, leaves: Mapping[str, Any]) -> dict[str, Part]:
    """Names in files → what each tensor is, in the order of the leaves.

    Args:
      leaves: dotted path → array or shape, the layers apart.
    """
    return {name: part for leaf, value in leaves.items() for name, part in _of(config, leaf, tuple(value.shape))}


def _of(config: ModelConfig, leaf: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Part]]:
    block, kinds = OWN.get(config.family, ("mlp", ("gate_proj", "up_proj", "down_proj")))
    stack = next((i for i, end in enumerate(STACKS) if leaf.endswith(f".{end}")), None)
    if config.experts is None:
        yield leaf, Part(leaf, None, shape)
    elif stack is None:
        yield leaf.replace(".mlp.gate.", f".{block}.gate."), Part(leaf, None, shape)
    else:
        front = leaf.removesuffix(STACKS[stack])
        for expert in range(shape[0]):
            yield f"{front}{block}.experts.{expert}.{kinds[stack]}.weight", Part(leaf, expert, shape[1:])


def by_leaf(found: Mapping[str, Part]) -> dict[str, list[str]]:
    """Leaf → the names of its tensors, the first expert first."""
    listed: dict[str, list[str]] = {}
    for name, part in found.items():
        listed.setdefault(part.leaf, []).append(name)
    return listed


def numbers(part: Part) -> int:
    """Elements of a tensor."""
    return math.prod(part.shape)
