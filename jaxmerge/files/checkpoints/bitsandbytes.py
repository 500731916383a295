r"""Weights that bitsandbytes stored in eight or four bits, as the floats they stand for.

    LLM.int8()   W[o, i] = q[o, i]·c[o] / 127         c: `SCB`, the largest magnitude of each row
    NF4, FP4     W[k] = t[q[k]]·a[k // blocksize]     a: `absmax`; t: `quant_map`; two codes q a byte, high half first
    nested       a[j] = u[p[j]]·b[j // 256] + offset  p: `absmax`; b: `nested_absmax`; u: `nested_quant_map`

k counts the elements of a matrix in C order; its shape and the lengths of blocks are JSON in a tensor
`quant_state.bitsandbytes__nf4`. Products are float64 and rounded once, to float32. transformers turns the
matrices of a `Conv1D` before it quantises them; they are turned back here.

References:
  Dettmers et al., "LLM.int8()", https://arxiv.org/abs/2208.07339
  Dettmers et al., "QLoRA", https://arxiv.org/abs/2305.14314
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmerge.files.checkpoints.classes import is_transposed
from jaxmerge.files.checkpoints.codes import Made, Turned
from jaxmerge.files.checkpoints.safetensors import NotHere
from jaxmerge.files.checkpoints.source import Tensor, read, read_run
from jaxmerge.files.documents import parse_json

STATE = ".quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4")
AGAIN = "copy the checkpoint again"


@dataclasses.dataclass(frozen=True, eq=False)
class EightBits(Made):
    """A matrix of int8 codes with the largest magnitude of each row, which 127 stands for."""

    def _rows(self, first: int, last: int) -> np.ndarray:
        width = self.shape[1]
        codes = read_run(self.parts[0], first * width, last * width).reshape(last - first, width)
        largest = read_run(self.parts[1], first, last).astype(np.float64)
        return (codes * (largest / 127)[:, None]).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class FourBits(Made):
    """Codes of four bits into a table, with a scale for each run of `block` elements.

    parts: codes, scales, table; if the scales are codes themselves, their scales and their table. nested: elements
    that share a scale of the scales, and what is added to them all; None where scales are floats.
    """

    block: int
    nested: tuple[int, float] | None

    def _rows(self, first: int, last: int) -> np.ndarray:
        width = math.prod(self.shape[1:])
        start, stop = first * width, last * width
        packed = np.empty(-(-stop // 2) - start // 2, np.uint8)
        self.parts[0].read_into(packed, start // 2)
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[start % 2 :][: stop - start]
        blocks = np.arange(start, stop) // self.block
        scales = self._scales(int(blocks[0]), int(blocks[-1]) + 1) if stop > start else np.empty(0)
        made = read(self.parts[2]).astype(np.float64)[codes] * scales[blocks - start // self.block]
        return made.astype(np.float32).reshape(last - first, *self.shape[1:])

    def _scales(self, first: int, last: int) -> np.ndarray:
        """Make the scales of blocks [first, last)."""
        stored = read_run(self.parts[1], first, last)
        if self.nested is None:
            return stored.astype(np.float64)
        (block, offset), table = self.nested, read(self.parts[4]).astype(np.float64)
        largest = read_run(self.parts[3], first // block, (last - 1) // block + 1).astype(np.float64)
        return table[stored] * largest[np.arange(first, last) // block - first // block] + offset


def eight_bits(
    name: str, left: dict[str, Tensor], config: Mapping[str, Any]
) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """Take matrices beside an `SCB` out of `left`; (names of the parts, tensor) by name."""
    made: dict[str, tuple[tuple[str, ...], Tensor]] = {}
    for key in [tensor for tensor in left if tensor.endswith(".SCB")]:
        weight, layout = (key.removesuffix("SCB") + end for end in ("weight", "weight_format"))
        codes, largest = left.get(weight), left[key]
        if codes is None or codes.dtype != np.int8 or len(codes.shape) != 2 or largest.shape != codes.shape[:1]:
            found = "nothing" if codes is None else f"{codes.dtype}{list(codes.shape)}"
            raise ValueError(
                f"model {name!r}: {key} has shape {list(largest.shape)} and {weight} is {found}, wanted a matrix of "
                f"int8 with as many rows; {AGAIN}"
            )
        if number := _layout(left.get(layout)):
            raise ValueError(
                f"model {name!r}: {layout} is {number}, an order of codes that one kind of GPU had; only 0, rows, is "
                "read. Save the model again with a newer bitsandbytes"
            )
        matrix = EightBits(weight, codes.shape, (codes, largest))
        made[weight] = ((weight, key), Turned.of(matrix) if is_transposed(config, weight) else matrix)
        for part in (weight, key, layout):
            left.pop(part, None)
    return made


def _layout(stored: Tensor | None) -> int:
    """The order of the codes; 0, rows, where the file says nothing or is not here: the merge itself reads it."""
    try:
        return 0 if stored is None else int(read(stored).reshape(-1)[0])
    except NotHere:
        return 0


def four_bits(
    name: str, left: dict[str, Tensor], config: Mapping[str, Any]
) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """Take codes of four bits with their state out of `left`; (names of the parts, tensor) by name."""
    made: dict[str, tuple[tuple[str, ...], Tensor]] = {}
    for key in [tensor for tensor in left if tensor.rpartition(STATE)[2] in TYPES and STATE in tensor]:
        weight = key.rpartition(STATE)[0]
        state = _state(name, left[key])
        ends = [".absmax", ".quant_map"]
        if "nested_offset" in state:
            ends += [".nested_absmax", ".nested_quant_map"]
        keys = [weight, *(weight + end for end in ends)]
        if lacking := [part for part in keys if part not in left]:
            raise ValueError(f"model {name!r}: {key} is there, but not {', '.join(lacking)}; copy the whole folder")
        matrix = _matrix(name, weight, state, tuple(left[part] for part in keys))
        turned = len(matrix.shape) == 2 and is_transposed(config, weight)
        made[weight] = (tuple(keys), Turned.of(matrix) if turned else matrix)
        for part in (*keys, key):
            del left[part]
    return made


def _state(name: str, stored: Tensor) -> dict[str, Any]:
    """Read the JSON beside a weight: the shape, the type of code, the lengths of blocks."""
    try:
        text = read(stored).tobytes()
    except NotHere:
        raise NotHere(
            f"model {name!r} is stored in bitsandbytes' four bits, whose shapes stand among the weights and not in "
            "headers; download it before a dry run (`hf download`), or run without"
        ) from None
    where = f"{stored.where}: {stored.name}"
    state = parse_json(text, where)
    shape, sizes = state.get("shape"), [state.get("blocksize"), state.get("nested_blocksize", 1)]
    offset = state.get("nested_offset", 0.0)
    whole = isinstance(shape, list) and bool(shape) and all(type(size) is int and size > 0 for size in [*shape, *sizes])
    if not whole or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise ValueError(f"{where} says {state!s:.200}, wanted shape, blocksize and the like; {AGAIN}")
    return state


def _matrix(name: str, weight: str, state: Mapping[str, Any], parts: tuple[Tensor, ...]) -> FourBits:
    """Hold the parts of a weight to its state."""
    shape, nested = tuple(state["shape"]), len(parts) > 3
    count = math.prod(shape)
    blocks = -(-count // state["blocksize"])
    # What is held to: bytes of the codes, which may be stored as floats of any width; then elements of the others.
    found = [parts[0].size, *(math.prod(part.shape) for part in parts[1:])]
    wanted = [-(-count // 2), blocks, 16, *([-(-blocks // state.get("nested_blocksize", 1)), 256] if nested else [])]
    floats = [jnp.issubdtype(part.dtype, jnp.floating) for part in parts[1:]]
    if found != wanted or floats != [not nested, *[True] * (len(parts) - 2)]:
        ends = ["codes (bytes)", "absmax", "quant_map", "nested_absmax", "nested_quant_map"][: len(parts)]
        raise ValueError(
            f"model {name!r}: {weight} has {dict(zip(ends, found, strict=True))} elements, wanted "
            f"{dict(zip(ends, wanted, strict=True))} for {list(shape)}, floats but for codes; {AGAIN}"
        )
    scales = (state.get("nested_blocksize", 1), float(state["nested_offset"])) if nested else None
    return FourBits(weight, shape, parts, state["blocksize"], scales)
