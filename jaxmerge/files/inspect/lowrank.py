r"""Extract a LoRA adapter: the best approximation of rank r to what training changed, written as PEFT reads it.

    Δ = W_tuned − W_base ≈ U_r S_r V_rᵀ,   B = U_r √(S_r/s),  A = √(S_r/s) V_rᵀ,   s = alpha/r

`jaxmerge.files.factors` decomposes a matrix and says how much of it the factors hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmerge import where
from jaxmerge.files import disk, model_card
from jaxmerge.files.checkpoints import safetensors
from jaxmerge.files.checkpoints.adapter import CONFIG, WEIGHTS
from jaxmerge.files.checkpoints.classes import is_embedding, is_transposed, name_in_memory
from jaxmerge.files.checkpoints.heads import tied_pair
from jaxmerge.files.checkpoints.source import Source, Tensor, read
from jaxmerge.files.factors import Cut, factor, ranks_in_config
from jaxmerge.files.inspect.compare import compare
from jaxmerge.where import Where

Progress = Callable[[int, int, str], None]
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": safetensors.DTYPES["BF16"], "float16": np.dtype(np.float16)}
COPIED = 1 << 24  # bytes of a whole tensor at a time
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
    rank: int | None = None,
    explained: float | None = None,
    ratio: float | None = None,
    alpha: float | None = None,
    targets: Where | None = None,
    exclude: Where = (),
    save: Where = "**",
    dtype: str = "float32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write what training changed as a LoRA adapter folder, which PEFT and `base+adapter` load.

    Args:
      base, tuned: open checkpoints of one architecture.
      out: folder to make; it appears under its name only when whole.
      rank: of the factors; no more than the largest matrix has. With `explained` or `ratio` it is the most that a
        matrix gets, and without them every matrix has it.
      explained: each matrix gets the smallest rank that holds this share of its change's squared norm.
      ratio: each matrix gets the singular values that are at least this share of its largest.
      alpha: written as lora_alpha; without it the rank, so that the scale is 1. The product does not depend on it.
      targets: patterns (see `jaxmerge.where`) of the weights to factor; without it every matrix in the layers
        but routers. An embedding that they match is factored too.
      exclude: patterns of weights that are not factored, although `targets` has them.
      save: patterns of changed tensors to keep whole where they are not factored (embeddings, head, norms, biases):
        "**" all, () none. What is not kept is listed with its size.
      dtype: of the factors: float32, bfloat16 or float16. What is kept whole keeps the dtype it has.
      progress: called with tensors done, tensors to do, and a tensor's name.

    Returns:
      {"out", "rank", "alpha", "tensors": {name: {"explained", "relative", "method", "rank", "gain"}},
      "whole": {name: relative}, "left_out": {name: relative}, "explained", "lost", "bytes", "seconds"}.
      rank: the largest that a matrix has. explained: share of ‖Δ‖² in the adapter, before factors are rounded to
      `dtype`. relative: ‖Δ‖/‖W‖. gain: what
      the last power iteration added to `explained`, 0 for an exact decomposition. In all: explained, and lost, the
      ‖Δ‖ that the adapter lacks over ‖W‖ of all tensors.

    Raises:
      ValueError: models unlike, nothing changed, a pattern that matches nothing, weights not finite.
    """
    begin, out = time.perf_counter(), pathlib.Path(out)
    cut = _cut_of(rank, explained, ratio)
    if dtype not in DTYPES:
        raise ValueError(f"extract-lora: dtype {dtype!r}; wanted one of {list(DTYPES)}")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"extract-lora: alpha is {alpha}, wanted a positive number")
    disk.check_free(out)
    found = _compared(base, tuned)
    sizes = {name: entry["models"][0] | {"base": entry["norm"]} for name, entry in found["tensors"].items()}
    split = _split(base, [name for name, size in sizes.items() if size["changed"]], targets, exclude, save)
    if not split.factored and not split.whole:
        what = f"only {len(split.left)} tensors that save= leaves out" if split.left else "nothing"
        raise ValueError(f"{tuned.name!r} differs from {base.name!r} in {what}; there is no adapter to write")
    report: dict[str, Any] = {}
    factors: dict[str, np.ndarray] = {}
    most = max((min(base.tensors[name].shape) for name in split.factored), default=1)
    uniform = None if cut.varies else min(cut.rank or most, most)
    for i, name in enumerate(split.factored):
        delta = _delta(base.tensors[name], tuned.tensors[name])
        delta = delta.T if _flipped(base, name) else delta
        a, b, facts = factor(delta, uniform or cut.rank, cut=cut if cut.varies else None)
        root = 1.0 if alpha is None else math.sqrt(alpha / len(a))
        pair = ((part / np.float32(root)).astype(DTYPES[dtype]) for part in (a, b))
        factors |= dict(zip(_keys(base, name), pair, strict=True))
        report[name] = facts | {"relative": sizes[name]["relative"]}
        if progress is not None:
            progress(i + 1, len(split.factored), name)
    lost = [sizes[name]["norm"] ** 2 * (1 - facts["explained"]) for name, facts in report.items()]
    lost += [sizes[name]["norm"] ** 2 for name in split.left]
    overall = found["overall"]
    held = 1 - math.fsum(lost) / overall["models"][0]["norm"] ** 2
    config = _config(base, split, {name: len(factors[_keys(base, name)[0]]) for name in split.factored}, alpha)
    size = _write(base, tuned, out, split, factors, config, held)
    return {
        "out": str(out), "rank": config["r"], "alpha": float(config["lora_alpha"]), "tensors": report,
        "whole": {name: sizes[name]["relative"] for name in split.whole},
        "left_out": {name: sizes[name]["relative"] for name in split.left},
        "explained": held,
        "lost": math.sqrt(math.fsum(lost)) / overall["norm"] if overall["norm"] else None,
        "bytes": size, "seconds": time.perf_counter() - begin,
    }  # fmt: skip


def _cut_of(rank: int | None, explained: float | None, ratio: float | None) -> Cut:
    if rank is None and explained is None and ratio is None:
        raise ValueError("extract-lora: no rank; give rank=16, or explained=0.9 or ratio=0.01 to choose each")
    try:
        return Cut(rank, explained, ratio)
    except ValueError as error:
        raise ValueError(f"extract-lora: {error}") from None


def _write(
    base: Source, tuned: Source, out: pathlib.Path, split: Split, factors: Mapping[str, np.ndarray],
    config: Mapping[str, Any], explained: float,
) -> int:  # fmt: skip
    """Write the folder; bytes of its weights."""
    copied = _copied(base, tuned, split)
    entries: dict[str, Any] = {**factors, **copied}
    places = safetensors.plan({key: (part.dtype, tuple(part.shape)) for key, part in entries.items()}, 1 << 62)
    with disk.new_folder(out, places.total) as folder:
        with contextlib.closing(safetensors.Writer(folder, places)) as writer:
            for key, part in factors.items():
                writer.write(key, np.ascontiguousarray(part).reshape(-1).view(np.uint8))
            for key, tensor in copied.items():
                _copy(tensor, key, writer)
            writer.finish()
        (folder / safetensors.SINGLE).rename(folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        rank, alpha = config["r"], float(config["lora_alpha"])
        model_card.write_card(
            folder, model_card.extracted_card(base, tuned, out, rank=rank, alpha=alpha, explained=explained)
        )
    return places.total


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


def _split(base: Source, changed: Sequence[str], targets: Where | None, exclude: Where, save: Where) -> Split:
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
    wanted = {n for n in wanted if not where.matches(exclude, paths[n])}
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


def _copied(base: Source, tuned: Source, split: Split) -> dict[str, Tensor]:
    """What is kept whole, by its name in the adapter's file."""
    copied: dict[str, Tensor] = {}
    modules = {name.removesuffix(".weight") for name in split.factored}
    for name in split.whole:
        tensor, module = tuned.tensors[name], name.rpartition(".")[0]
        safetensors.check_dtype(tensor.dtype, name, tensor.where)
        # PEFT keeps the bias of a module that it adapts inside the layer it wraps.
        key = f"{module}.base_layer.bias" if module in modules else name
        copied[f"base_model.model.{_in_memory(base, key)}"] = tensor
        if (pair := tied_pair(tuned)) is not None and name == pair[0]:
            copied[f"base_model.model.{_in_memory(base, pair[1])}"] = tensor
    return copied


def _config(base: Source, split: Split, ranks: Mapping[str, int], alpha: float | None) -> dict[str, Any]:
    """What PEFT reads. Without an alpha, that of each matrix is its rank."""
    said = ranks_in_config({_in_memory(base, name).removesuffix(".weight"): rank for name, rank in ranks.items()})
    alphas = {"alpha_pattern": said["rank_pattern"]} if alpha is None else {}
    alpha = float(said["r"]) if alpha is None else alpha
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
        **said,
        **alphas,
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
