r"""Extract a LoRA adapter: the best approximation of rank r to what training changed, written as PEFT reads it.

    Δ = W_tuned − W_base ≈ U_r S_r V_rᵀ,   B = U_r √(S_r/s),  A = √(S_r/s) V_rᵀ,   s = alpha/r

Small matrices are decomposed exactly. Large ones by a random projection with power iterations: Q an orthonormal
basis of (ΔΔᵀ)^q Δ Ω, then the decomposition of QᵀΔ, which is small. What the result explains of ‖Δ‖² is exact in
both cases: ‖Δ − Q(QᵀΔ)_r‖² = ‖Δ‖² − ‖(QᵀΔ)_r‖².

References:
  Eckart and Young, "The approximation of one matrix by another of lower rank", 1936
  Halko, Martinsson and Tropp, "Finding Structure with Randomness", https://arxiv.org/abs/0909.4061
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import where
from jaxmerge.files import disk, model_card
from jaxmerge.files.checkpoints import safetensors
from jaxmerge.files.checkpoints.adapter import CONFIG, WEIGHTS
from jaxmerge.files.checkpoints.classes import is_embedding, is_transposed, name_in_memory
from jaxmerge.files.checkpoints.heads import tied_pair
from jaxmerge.files.checkpoints.source import Source, Tensor, read
from jaxmerge.files.inspect.compare import compare
from jaxmerge.where import Where

Progress = Callable[[int, int, str], None]
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": safetensors.DTYPES["BF16"], "float16": np.dtype(np.float16)}
EXACT = 512  # up to this smaller side, or where the rank is a quarter of it, decompose exactly
COPIED = 1 << 24  # bytes of a whole tensor at a time
SPARE = 16  # columns of the projection beyond the rank
ITERATIONS = 8  # at most
SETTLED = 1e-4  # share of ‖Δ‖² that the last iteration may have added
ROUTERS = ("gate", "router")  # plain parameters in most models, no linear layers


@dataclasses.dataclass(frozen=True)
class Split:
    """Which changed tensors become factors, which are kept whole, which are left out."""

    factored: tuple[str, ...]
    whole: tuple[str, ...]
    left: tuple[str, ...]


def extract_lora(
    base: Source,
    tuned: Source,
    out: str | pathlib.Path,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Where | None = None,
    save: Where = "**",
    dtype: str = "float32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write what training changed as a LoRA adapter folder, which PEFT and `base+adapter` load.

    Args:
      base, tuned: open checkpoints of one architecture.
      out: folder to make; it appears under its name only when whole.
      rank: of the factors; no more than the largest matrix has.
      alpha: written as lora_alpha; without it the rank, so that the scale is 1. The product does not depend on it.
      targets: patterns (see `jaxmerge.where`) of the weights to factor; without it every matrix in the layers
        but routers.
      save: patterns of changed tensors to keep whole where they are not factored (embeddings, head, norms, biases):
        "**" all, () none. What is not kept is listed with its size.
      dtype: of the factors: float32, bfloat16 or float16. What is kept whole keeps the dtype it has.
      progress: called with tensors done, tensors to do, and a tensor's name.

    Returns:
      {"out", "rank", "alpha", "tensors": {name: {"explained", "relative", "method", "rank", "gain"}},
      "whole": {name: relative}, "left_out": {name: relative}, "explained", "lost", "bytes", "seconds"}.
      explained: share of ‖Δ‖² in the adapter, before factors are rounded to `dtype`. relative: ‖Δ‖/‖W‖. gain: what
      the last power iteration added to `explained`, 0 for an exact decomposition. In all: explained, and lost, the
      ‖Δ‖ that the adapter lacks over ‖W‖ of all tensors.

    Raises:
      ValueError: models unlike, nothing changed, a pattern that matches nothing, weights not finite.
    """
    begin, out = time.perf_counter(), pathlib.Path(out)
    if rank < 1 or dtype not in DTYPES:
        raise ValueError(f"extract-lora: rank {rank}, dtype {dtype!r}; wanted a rank ≥ 1 and one of {list(DTYPES)}")
    found = _compared(base, tuned)
    sizes = {name: entry["models"][0] | {"base": entry["norm"]} for name, entry in found["tensors"].items()}
    split = _split(base, [name for name, size in sizes.items() if size["changed"]], targets, save)
    if not split.factored and not split.whole:
        what = f"only {len(split.left)} tensors that save= leaves out" if split.left else "nothing"
        raise ValueError(f"{tuned.name!r} differs from {base.name!r} in {what}; there is no adapter to write")
    rank = min(rank, max((min(base.tensors[name].shape) for name in split.factored), default=rank))
    alpha = float(rank) if alpha is None else alpha
    if not alpha > 0:
        raise ValueError(f"extract-lora: alpha is {alpha}, wanted a positive number")
    layout = _layout(base, tuned, split, rank, DTYPES[dtype])
    places = safetensors.plan({key: (part.dtype, part.shape) for key, part in layout.items()}, 1 << 62)
    report: dict[str, Any] = {}
    with disk.new_folder(out, places.total) as folder:
        with contextlib.closing(safetensors.Writer(folder, places)) as writer:
            for i, name in enumerate(split.factored):
                flipped = _flipped(base, name)
                delta = _delta(base.tensors[name], tuned.tensors[name])
                a, b, facts = factor(delta.T if flipped else delta, rank, alpha / rank)
                for key, part in zip(_keys(base, name), (a, b), strict=True):
                    writer.write(key, np.ascontiguousarray(part.astype(DTYPES[dtype])).reshape(-1).view(np.uint8))
                report[name] = facts | {"relative": sizes[name]["relative"]}
                if progress is not None:
                    progress(i + 1, len(split.factored), name)
            for key, part in layout.items():
                if part.source is not None:
                    _copy(part.source, key, writer)
            writer.finish()
        (folder / safetensors.SINGLE).rename(folder / WEIGHTS)
        config = _config(base, split, rank, alpha)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        lost = [sizes[name]["norm"] ** 2 * (1 - facts["explained"]) for name, facts in report.items()]
        lost += [sizes[name]["norm"] ** 2 for name in split.left]
        overall = found["overall"]
        explained = 1 - math.fsum(lost) / overall["models"][0]["norm"] ** 2
        model_card.write_card(
            folder, model_card.extracted_card(base, tuned, out, rank=rank, alpha=alpha, explained=explained)
        )
    return {
        "out": str(out), "rank": rank, "alpha": alpha, "tensors": report,
        "whole": {name: sizes[name]["relative"] for name in split.whole},
        "left_out": {name: sizes[name]["relative"] for name in split.left},
        "explained": explained,
        "lost": math.sqrt(math.fsum(lost)) / overall["norm"] if overall["norm"] else None,
        "bytes": places.total, "seconds": time.perf_counter() - begin,
    }  # fmt: skip


def _compared(base: Source, tuned: Source) -> dict[str, Any]:
    """Measure every tensor; raise unless both models have the same, finite."""
    found = compare(base, tuned)
    missing, extra = found["missing"][tuned.name], found["extra"][tuned.name]
    if missing or extra:
        raise ValueError(
            f"{tuned.name!r} lacks {len(missing)} tensors of {base.name!r} ({', '.join(missing[:3])}) and has "
            f"{len(extra)} that it lacks ({', '.join(extra[:3])}); give the model that it was trained from"
        )
    for entry in found["unlike"]:
        raise ValueError(
            f"tensor {entry['tensor']!r} of {tuned.name!r} has shape {entry['found']}, wanted {entry['wanted']} as in "
            f"{base.name!r}; bring both to one vocabulary first"
        )
    for entry in found["nonfinite"]:
        raise ValueError(
            f"tensor {entry['tensor']!r} of {entry['model']!r} has {entry['nan']} NaN and {entry['infinite']} infinite "
            "elements; wanted finite weights"
        )
    return found


def _split(base: Source, changed: Sequence[str], targets: Where | None, save: Where) -> Split:
    paths = {name: name.replace(".", "/") for name in base.tensors}
    matrices = {
        n for n, t in base.tensors.items()
        if n.endswith(".weight") and len(t.shape) == 2 and jnp.issubdtype(t.dtype, jnp.floating)
    }  # fmt: skip
    if targets is None:
        wanted = {n for n in matrices if where.layer_index(paths[n]) is not None and n.split(".")[-2] not in ROUTERS}
    else:
        wanted = {n for n in matrices if where.matches(targets, paths[n])}
        if not wanted:
            raise ValueError(
                f"targets={targets!r} matches none of the {len(matrices)} weight matrices of {base.name!r}"
            )
    factored = tuple(n for n in changed if n in wanted)
    rest = [n for n in changed if n not in wanted]
    whole = tuple(n for n in rest if where.matches(save, paths[n]) and _has_own_module(n, factored))
    return Split(factored, whole, tuple(n for n in rest if n not in whole))


def _flipped(base: Source, name: str) -> bool:
    """Whether the stored weight is (B·A)ᵀ."""
    return is_embedding(name) or is_transposed(base.config, name)


def _has_own_module(name: str, factored: Sequence[str]) -> bool:
    """Whether PEFT can keep a tensor whole: it keeps modules, and none that holds others with an adapter."""
    module = name.rpartition(".")[0]
    return bool(module) and not any(
        other.startswith(f"{module}.") and other != f"{module}.weight" for other in factored
    )


def _in_memory(base: Source, name: str) -> str:
    return name_in_memory(name, base.tensors, base.config)


def _keys(base: Source, name: str) -> tuple[str, str]:
    module = f"base_model.model.{_in_memory(base, name).removesuffix('.weight')}"
    if is_embedding(name):
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


@dataclasses.dataclass(frozen=True)
class _Part:
    """A tensor of the adapter's file; `source`, if it is a copy."""

    dtype: np.dtype
    shape: tuple[int, ...]
    source: Tensor | None = None


def _layout(base: Source, tuned: Source, split: Split, rank: int, dtype: np.dtype) -> dict[str, _Part]:
    layout = {}
    for name in split.factored:
        rows, columns = base.tensors[name].shape[:: -1 if _flipped(base, name) else 1]
        a, b = _keys(base, name)
        layout |= {a: _Part(dtype, (rank, columns)), b: _Part(dtype, (rows, rank))}
    modules = {name.removesuffix(".weight") for name in split.factored}
    for name in split.whole:
        tensor, module = tuned.tensors[name], name.rpartition(".")[0]
        safetensors.check_dtype(tensor.dtype, name, tensor.where)
        # PEFT keeps the bias of a module that it adapts inside the layer it wraps.
        key = f"{module}.base_layer.bias" if module in modules else name
        layout[f"base_model.model.{_in_memory(base, key)}"] = _Part(tensor.dtype, tensor.shape, tensor)
        if (pair := tied_pair(tuned)) is not None and name == pair[0]:
            layout[f"base_model.model.{_in_memory(base, pair[1])}"] = _Part(tensor.dtype, tensor.shape, tensor)
    return layout


def _config(base: Source, split: Split, rank: int, alpha: float) -> dict[str, Any]:
    every = {_in_memory(base, name).rpartition(".")[0] for name in base.tensors}
    factored = {_in_memory(base, name).removesuffix(".weight") for name in split.factored}
    whole = {_in_memory(base, name).rpartition(".")[0] for name in split.whole} - factored
    pair = tied_pair(base)
    tied = pair is not None and pair[0] in split.whole
    if pair is not None and tied:
        whole.add(_in_memory(base, pair[1]).removesuffix(".weight"))
    biases = any(name.rpartition(".")[0] in factored for name in split.whole)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": _shortened(factored, every),
        "modules_to_save": _shortened(whole, every) or None,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": any(is_transposed(base.config, name) for name in split.factored),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "inference_mode": True,
    } | ({"ensure_weight_tying": True} if tied else {})


def _shortened(modules: set[str], every: set[str]) -> list[str]:
    """Name modules by their last component where that means just them, in full where not."""
    names: dict[str, None] = {}
    for module in sorted(modules):
        last = module.rpartition(".")[2]
        meant = {other for other in every if other.endswith(last)}
        names[last if meant <= modules else module] = None
    return list(names)


def _copy(tensor: Tensor, key: str, writer: safetensors.Writer) -> None:
    step = COPIED if tensor.chunked else max(tensor.size, 1)
    buffer = np.empty(min(step, tensor.size), np.uint8)
    for start in range(0, tensor.size, step):
        part = buffer[: min(step, tensor.size - start)]
        tensor.read_into(part, start)
        writer.write(key, part, start)


def _delta(base: Tensor, tuned: Tensor) -> np.ndarray:
    delta = read(tuned).astype(np.float32)
    delta -= read(base).astype(np.float32)
    return delta


def factor(delta: np.ndarray, rank: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Factor Δ [out, in] into A [rank, in] and B [out, rank] with scale·B·A ≈ Δ; float32.

    Returns:
      A, B and {"explained", "method", "rank", "gain"}; columns beyond the smaller side of Δ are zero.
    """
    small = min(delta.shape)
    used = min(rank, small)
    # Scaled, so that squares stay in float32's range.
    unit = float(np.abs(delta).max()) or 1.0
    delta = delta / np.float32(unit)
    square = float(np.vecdot(delta, delta).sum(dtype=np.float64))
    if small <= EXACT or 4 * used >= small:
        method, gain = "exact", 0.0
        u, s, v = (np.asarray(part) for part in np.linalg.svd(delta, full_matrices=False))
    else:
        method = "randomised"
        u, s, v, gain = _randomised(jnp.asarray(delta), used)
    s = s[:used]
    root = np.sqrt(s) * math.sqrt(unit / scale)
    a, b = np.zeros((rank, delta.shape[1]), np.float32), np.zeros((delta.shape[0], rank), np.float32)
    a[:used], b[:, :used] = root[:, None] * v[:used], u[:, :used] * root
    explained = min(float(np.sum(np.square(s, dtype=np.float64))) / square, 1.0) if square else 1.0
    return a, b, {"explained": explained, "method": method, "rank": used, "gain": gain}


def _randomised(delta: jax.Array, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Iterate until the energy in the first `rank` directions settles; (U, S, Vᵀ, last gain)."""
    total = float(jnp.vdot(delta, delta))
    sketch = jax.random.normal(jax.random.key(0), (delta.shape[1], rank + SPARE), delta.dtype)
    basis = _basis(delta, sketch)
    found = _project(delta, basis)
    energy, gain = float(jnp.sum(found.s[:rank] ** 2)), total
    for _ in range(ITERATIONS):
        basis = _basis(delta, found.other)
        found = _project(delta, basis)
        now = float(jnp.sum(found.s[:rank] ** 2))
        gain, energy = (now - energy) / total, now
        if gain < SETTLED:
            break
    u, v = _exactly(basis, found.u), _exactly(found.v, found.other.T)
    return np.asarray(u), np.asarray(found.s), np.asarray(v), max(gain, 0.0)


class _Projected(NamedTuple):
    """QᵀΔ = u·diag(s)·v·otherᵀ, with u and v square and small."""

    u: jax.Array
    s: jax.Array
    v: jax.Array
    other: jax.Array


# In float32 to the last digit also on devices whose products default to less.
_exactly = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _basis(delta: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.linalg.qr(_exactly(delta, other))[0]


@jax.jit
def _project(delta: jax.Array, basis: jax.Array) -> _Projected:
    other, r = jnp.linalg.qr(_exactly(delta.T, basis))
    u, s, v = jnp.linalg.svd(r.T)
    return _Projected(u, s, v, other)
