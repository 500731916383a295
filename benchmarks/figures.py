"""What the sections of `benchmarks/accelerator.py` share: figures, sizes of the work, timing, random weights."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import memory
from tpu.presets import model_of
from train.models.config import ModelConfig
from train.models.decoder import draw_normal, init_leaf, shapes


class Skip(Exception):
    """Why a section has nothing to measure here, in a line."""


class Figure(NamedTuple):
    """One measured number, or None with the reason in the note."""

    name: str
    value: float | None
    unit: str = ""
    note: str = ""


class Size(NamedTuple):
    """How large a section's work is."""

    model: ModelConfig
    dtype: str
    rows: tuple[int, ...]
    """Of a step of fine-tuning; the first that fits into the memory is taken."""
    length: int
    steps: tuple[tuple[Literal["stacked", "unrolled"], Literal["none", "full"], Literal["auto", "xla"]], ...]
    """`layers`, `remat` and `attention` of `sft.step` that a step is measured with."""
    rules: tuple[str, ...]
    """Of the library."""
    attention: tuple[tuple[int, int], ...]
    """(rows, positions) that attention is computed for."""
    slots: int
    sequences: int
    prompt: int
    new: tuple[int, int]
    """Fewest and most tokens that a sequence gets."""
    copied: int
    """Bytes of the array that is copied."""
    product: int
    """Rows and columns of the matrices that are multiplied."""
    improved: dict[str, Any]
    """`model.random` of the round of self-improvement."""
    questions: int
    repeats: int
    platform: str
    """What jax runs on: cpu, gpu, tpu."""


TOY = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip


def size_of(name: str, platform: str) -> Size:
    """`full` for an accelerator, `toy` for seconds on a CPU."""
    if name == "toy":
        return Size(
            model=TOY, dtype="float32", rows=(2,), length=64, steps=(("stacked", "none", "auto"),),
            rules=("average", "imm", "dare", "ties"), attention=((2, 63),), slots=8, sequences=24, prompt=16,
            new=(4, 16), copied=1 << 24, product=256, improved=widths(hidden=32, layers=2, heads=4), questions=8,
            repeats=2, platform=platform,
        )  # fmt: skip
    return Size(
        model=model_of("llama-3.2-1b"), dtype="bfloat16", rows=(8, 4, 2, 1), length=2048,
        steps=(
            ("stacked", "none", "auto"), ("stacked", "full", "auto"), ("stacked", "full", "xla"),
            ("unrolled", "none", "auto"),
        ),
        rules=tuple(memory.COEFFICIENTS), attention=((16, 1024), (4, 4096)), slots=128, sequences=512, prompt=64,
        new=(16, 256), copied=1 << 30, product=8192, improved=widths(hidden=1024, layers=12, heads=16), questions=256,
        repeats=5, platform=platform,
    )  # fmt: skip


def widths(*, hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """`model.random` of a Llama of characters."""
    return {
        "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": hidden // heads,
        "max_position_embeddings": 1024, "initializer_range": 0.02,
    }  # fmt: skip


def timed(run: Callable[[], Any], repeats: int, calls: int = 1) -> float:
    """Median seconds of a call, over turns of `calls` that are sent one behind the other; one turn before them."""
    found = []
    for _ in range(repeats + 1):
        result, start = None, time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found[1:])


def share(value: float, table: dict[str, float], what: str) -> str:
    """What part of the data sheet's figure a value is, or that there is none: nothing is made up."""
    kind = jax.devices()[0].device_kind
    return f"{value / table[kind]:.0%} of {what} {kind}" if kind in table else f"no data sheet of {kind} in the table"


def first_line(error: BaseException) -> str:
    """An error's name and its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def tried(name: str, measure: Callable[[], list[Figure]]) -> list[Figure]:
    """The figures of one case; where it fails, a figure without a value that says why, and the section goes on."""
    gc.collect()  # what the case before held on the device
    try:
        return measure()
    except (RuntimeError, ValueError, TypeError) as error:
        return [Figure(name, None, note=first_line(error))]


def compiled_of(function: Any, *arguments: Any, **keywords: Any) -> tuple[Any, float]:
    """A jitted function compiled for its arguments, and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    compiled = function.lower(*arguments, **keywords).compile()
    return compiled, time.perf_counter() - start


def random_params(config: ModelConfig, dtype: str = "float32") -> Any:
    """Random weights; one program for each shape."""
    draw = jax.jit(draw_normal, static_argnums=(0, 1))

    def leaf(path, shape):
        name = "/".join(entry.key for entry in path)
        return init_leaf(config, jax.random.key(0), name, shape.shape, draw).astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes(config))


def copy_bandwidth(size: Size) -> float:
    """Bytes a second, read and written."""
    case = memory.copies([jnp.ones(size.copied // 4, jnp.float32)])
    return case.moved / timed(case.run, size.repeats)
