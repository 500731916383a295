r"""LoRA adapters, as PEFT saves them, applied to an open checkpoint without writing the result.

    W' = W + s·B·A,   s = alpha/r, or alpha/√r with use_rslora
    W' = m ⊙ (W + s·B·A)/‖W + s·B·A‖ by row, with DoRA's magnitudes m

A tensor that is adapted stays a `Tensor`: rows are made when they are read. Arithmetic is float32 (float64 for
float64 weights), then one rounding to the weight's dtype. PEFT's `merge_and_unload` adds the same product in
the weight's dtype, so that a low-precision result may differ from it in the last place.

Law: any run of elements has the bits that it has in the whole tensor, on every processor. So B·A is made of tiles of
one shape (`multiply_rows`). Another processor may round the product otherwise in the last place.

References:
  Hu et al., "LoRA", https://arxiv.org/abs/2106.09685
  Kalajdzievski, "Rank-Stabilized LoRA", https://arxiv.org/abs/2312.03732
  Liu et al., "DoRA", https://arxiv.org/abs/2402.09353
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmerge.files.checkpoints import safetensors
from jaxmerge.files.checkpoints.source import EMBEDDING, HEAD, Source, Tensor, fill_by_rows, is_tied, read, read_json
from jaxmerge.files.patterns import matches_module

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.(?P<leaf>weight|bias))?"
)
# Keys that make an adapter more than W + s·B·A.
_UNKNOWN_KINDS = (
    "layer_replication", "use_qalora", "use_bdlora", "kasa_config", "arrow_config", "alora_invocation_tokens",
    "trainable_token_indices", "target_parameters", "megatron_config",
)  # fmt: skip
TILE_ROWS, TILE_RANK = 32, 256
TILE_PRODUCTS = 1 << 18  # multiplications in a tile: OpenBLAS gives no second thread to a product as small as this
# Initialisations that also change the base's weights, which the adapter then does not fit as they are.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def apply(source: Source, adapter: pathlib.Path) -> Source:
    """Apply a PEFT LoRA adapter to a checkpoint; nothing is read but headers.

    Args:
      source: the model it was trained on.
      adapter: folder with adapter_config.json and adapter_model.safetensors.

    Returns:
      The source with the adapter's modules as virtual tensors, its `modules_to_save` and biases as stored, in the
      source's dtypes. A tied head that the adapter changes by itself becomes a tensor of its own, the config untied.

    Raises:
      ValueError: the adapter is of another kind, or has tensors that fit none of the source's: all are named.
    """
    folder = pathlib.Path(adapter)
    config = _read_config(folder)
    path = folder / WEIGHTS
    if not path.exists():
        raise ValueError(f"adapter {str(folder)!r} has no {WEIGHTS}; save it as safetensors (PEFT's default)")
    tensors = dict(source.tensors)
    lent = None
    if is_tied(source):
        # The adapter may name the head all the same.
        lent = tensors[HEAD] = Renamed(tensors[EMBEDDING], HEAD)
    factors, unmatched = _place(safetensors.read_header(path), tensors)
    for module, parts in factors.items():
        unmatched += _adapt(tensors, module, parts, config, path)
    if unmatched:
        shown = ", ".join(unmatched[:4]) + (f" and {len(unmatched) - 4} more" if len(unmatched) > 4 else "")
        raise ValueError(
            f"{path}: {len(unmatched)} tensors fit no tensor of {source.name!r}: {shown}; give the model that the "
            f"adapter was trained on ({config.get('base_model_name_or_path') or 'its config does not say which'})"
        )
    untied, notes = _settle_head(tensors, lent, source, str(folder)) if lent else ({}, ())
    return dataclasses.replace(
        source, name=f"{source.name}+{adapter}", tensors=tensors, config=source.config | untied,
        files=(*source.files, folder / CONFIG, path), notes=(*source.notes, *notes),
    )  # fmt: skip


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise ValueError(f"adapter {str(folder)!r} has no {CONFIG}; give the folder of a PEFT LoRA adapter")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, only 'LORA' is known here")
    for key in _UNKNOWN_KINDS:
        if config.get(key):
            raise ValueError(f"{path}: {key}={config[key]!r} is not known here; merge the adapter with PEFT first")
    start = str(config.get("init_lora_weights", ""))
    if start.lower().startswith(_CHANGE_BASE):
        raise ValueError(
            f"{path}: init_lora_weights={start!r} changed the base's weights too, so the adapter does not fit the "
            "base as it is stored; convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


Parts = dict[str, Tensor]  # kind → tensor: lora_A, lora_B, lora_B.bias, lora_embedding_A, …


def _place(stored: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> tuple[dict[str, Parts], list[str]]:
    """Put what replaces tensors in their place; gather the factors of each module; list what is left."""
    factors: dict[str, Parts] = {}
    unmatched = []
    for key, tensor in stored.items():
        name = key.removeprefix("base_model.model.")
        found = _FACTOR.fullmatch(name)
        if found:
            leaf = ".bias" if found["leaf"] == "bias" else ""
            factors.setdefault(found["module"], {})[found["kind"] + leaf] = tensor
            continue
        target = _find(re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)", "", name), tensors)
        if target is None:
            unmatched.append(key)
            continue
        _check_shape(target, tensor, tensors[target].shape)
        tensors[target] = Replaced(tensors[target], tensor)
    return factors, unmatched


def _find(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Find the tensor of the model: adapters of a bare decoder lack the `model.` of one with a head."""
    return next((n for n in (name, f"model.{name}", name.removeprefix("model.")) if n in tensors), None)


def _adapt(
    tensors: dict[str, Tensor], module: str, parts: Parts, config: Mapping[str, Any], path: pathlib.Path
) -> list[str]:
    """Replace a module's weight and bias by adapted ones; names of the parts that fit none."""
    target = _find(f"{module}.weight", tensors)
    if target is None:
        return [part.name for part in parts.values()]
    bias, magnitude = parts.pop("lora_B.bias", None), parts.pop("lora_magnitude_vector", None)
    embedding = "lora_embedding_A" in parts
    kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if set(parts) != set(kinds):
        found = sorted(part.name for part in parts.values())
        raise ValueError(f"{path}: module {module!r} has {found}, wanted its A and its B; the file is incomplete")
    a, b = (parts[kind] for kind in kinds)
    base = tensors[target]
    if not (len(base.shape) == len(a.shape) == len(b.shape) == 2 and jnp.issubdtype(base.dtype, jnp.floating)):
        raise ValueError(
            f"{path}: {a.name} {list(a.shape)} adapts {target} {base.dtype}{list(base.shape)}; only matrices of "
            "floats are known here, merge the adapter with PEFT first"
        )
    flipped = embedding or (bool(config.get("fan_in_fan_out")) and target != HEAD)
    rank = b.shape[1]
    _check_shape(target, b, (base.shape[1] if flipped else base.shape[0], rank))
    _check_shape(target, a, (rank, base.shape[0] if flipped else base.shape[1]))
    if magnitude is not None:
        if flipped:
            raise ValueError(f"{path}: {magnitude.name}: DoRA of embeddings and transposed weights is not known here")
        _check_shape(target, magnitude, (base.shape[0],))
    scale = _scale(config, module, rank, path)
    tensors[target] = Adapted(base, a, b, scale, flipped, magnitude)
    if bias is not None:
        name = _find(f"{module}.bias", tensors)
        if name is None:
            return [bias.name]
        _check_shape(name, bias, tensors[name].shape)
        tensors[name] = Shifted(tensors[name], bias, scale)
    return []


def _scale(config: Mapping[str, Any], module: str, rank: int, path: pathlib.Path) -> float:
    def of(patterns: str, default: str) -> Any:
        """As PEFT matches: the end of the module's name, from a dot on, in full."""
        table = config.get(patterns) or {}
        where = f"{path.parent / CONFIG}: {patterns}"
        if not isinstance(table, dict):
            raise ValueError(f"{where} is {table!r:.60}, wanted patterns with their values")
        return next((v for key, v in table.items() if matches_module(key, module, where)), config.get(default))

    said, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    if said is not None and said != rank:
        raise ValueError(f"{path}: module {module!r} has rank {rank}, {CONFIG} says {said}; the two do not go together")
    if not isinstance(alpha, int | float):
        raise ValueError(f"{path.parent / CONFIG}: lora_alpha is {alpha!r}, wanted a number")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _check_shape(target: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(wanted):
        more = "; its vocabulary was extended, extend the base's first" if "embed" in target or target == HEAD else ""
        raise ValueError(
            f"{tensor.where}: {tensor.name} has shape {list(tensor.shape)}, wanted {list(wanted)} for {target}{more}"
        )


def _settle_head(
    tensors: dict[str, Tensor], lent: Tensor, source: Source, adapter: str
) -> tuple[dict, tuple[str, ...]]:
    """Keep the head of a tied model tied where the adapter does not change it by itself; (config, notes)."""
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    if head is lent:
        del tensors[HEAD]
        if embedding is source.tensors[EMBEDDING]:
            return {}, ()
        return {}, (f"{adapter} adapts the embedding, to which the head of {source.name} is tied: both change",)
    if isinstance(head, Replaced) and isinstance(embedding, Replaced) and _same(head.tensor, embedding.tensor):
        del tensors[HEAD]
        return {}, ()
    note = f"{adapter} adapts the head of {source.name} apart from the embedding, to which it was tied; now it is not"
    return {"tie_word_embeddings": False}, (note,)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two stored tensors have the same bits."""
    same = (a.dtype, a.shape) == (b.dtype, b.shape)
    return same and np.array_equal(read(a).reshape(-1).view(np.uint8), read(b).reshape(-1).view(np.uint8))


def _wide(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class _Like:
    """A tensor in the place, and with the name, dtype and shape, of `base`."""

    base: Tensor

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def size(self) -> int:
        return self.base.size

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.base,)

    @property
    def where(self) -> str:
        return " and ".join(dict.fromkeys(part.where for part in self._parts()))

    @property
    def chunked(self) -> bool:
        return all(part.chunked for part in self._parts())


@dataclasses.dataclass(frozen=True, eq=False)
class Renamed(_Like):
    """The same tensor under another name."""

    title: str

    @property
    def name(self) -> str:
        return self.title

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        self.base.read_into(buffer, start)


@dataclasses.dataclass(frozen=True, eq=False)
class Replaced(_Like):
    """`tensor`, cast to the dtype of the one it stands for."""

    tensor: Tensor

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        own, wanted = self.tensor.dtype, self.dtype
        if own == wanted:
            self.tensor.read_into(buffer, start)
            return
        held = np.empty(buffer.size // wanted.itemsize, own)
        self.tensor.read_into(held.view(np.uint8), start // wanted.itemsize * own.itemsize)
        buffer.view(wanted)[:] = held.astype(wanted)


@dataclasses.dataclass(frozen=True, eq=False)
class Shifted(_Like):
    """A bias b + s·β."""

    shift: Tensor
    scale: float

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.base, self.shift)

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        wide = _wide(self.dtype)
        made = (read(self.base).astype(wide) + self.scale * read(self.shift).astype(wide)).astype(self.dtype)
        buffer[:] = made.view(np.uint8)[start : start + buffer.size]


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted(_Like):
    """W + s·B·A, or W + s·(B·A)ᵀ where the stored weight is [in, out]; with magnitudes, DoRA's rows."""

    a: Tensor
    b: Tensor
    scale: float
    flipped: bool
    magnitude: Tensor | None

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.base, self.a, self.b)

    @property
    def chunked(self) -> bool:
        return self.base.chunked

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        wide, columns = _wide(self.dtype), self.shape[1]
        left, right, magnitude = _factors(self)
        # Where any run costs as much as all, all is read once and kept while its rows are made.
        held = None if self.base.chunked else read(self.base)

        def rows(first: int, last: int) -> np.ndarray:
            if held is None:
                stored = np.empty((last - first, columns), self.dtype)
                self.base.read_into(stored.reshape(-1).view(np.uint8), first * columns * self.dtype.itemsize)
            else:
                stored = held[first:last]
            made = multiply_rows(left, right, first, last)
            made *= self.scale
            made += stored.astype(wide)
            if magnitude is not None:
                made *= (magnitude[first:last] / np.linalg.norm(made, axis=1))[:, None]
            return made.astype(self.dtype)

        fill_by_rows(self, buffer, start, rows)


@functools.lru_cache(maxsize=8)
def _factors(tensor: Adapted) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Read the small factors (left [rows, r], right [r, columns], magnitudes); kept for a tensor's other chunks.

    Left repeats its last row up to a whole number of tiles.
    """
    wide = _wide(tensor.dtype)
    a, b = read(tensor.a).astype(wide), read(tensor.b).astype(wide)
    magnitude = None if tensor.magnitude is None else read(tensor.magnitude).astype(wide)
    left, right = (a.T, b.T) if tensor.flipped else (b, a)
    return np.pad(left, ((0, -len(left) % TILE_ROWS), (0, 0)), "edge"), np.ascontiguousarray(right), magnitude


def multiply_rows(left: np.ndarray, right: np.ndarray, first: int, last: int) -> np.ndarray:
    """Return rows [first, last) of left @ right, bit for bit those of the whole product.

    BLAS chooses its kernel, and with it the order of sums, by the shapes it is given and by the processor. So a product
    of a few rows may differ in the last place from the same rows of the whole. Here every product is a tile whose
    shape depends on the factors alone: tiles begin at multiples of TILE_ROWS rows, and those that hold a wanted row are
    computed whole. Tiles are so small that BLAS keeps to one thread, so the number of threads changes nothing either.

    Args:
      left: [n, r], n a multiple of TILE_ROWS.
      right: [r, columns].
      first, last: 0 ≤ first < last ≤ n.
    """
    begin, end = first // TILE_ROWS, -(-last // TILE_ROWS)
    rows = left.reshape(-1, TILE_ROWS, left.shape[1])[begin:end]
    ranks = range(0, left.shape[1], TILE_RANK)
    parts = (_multiply_tiles(rows[..., k : k + TILE_RANK], right[k : k + TILE_RANK]) for k in ranks)
    made = functools.reduce(operator.iadd, parts).reshape(-1, right.shape[1])
    return made[first - begin * TILE_ROWS : last - begin * TILE_ROWS]


def _multiply_tiles(rows: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiply [blocks, TILE_ROWS, r] by [r, columns], r at most TILE_RANK."""
    blocks, (rank, columns) = len(rows), right.shape
    made = np.empty((blocks, TILE_ROWS, columns), right.dtype)
    width = TILE_PRODUCTS // (TILE_ROWS * rank)
    count = columns // width
    whole = count * width
    tiles = right[:, :whole].reshape(rank, count, width).swapaxes(0, 1)
    out = made[:, :, :whole].reshape(blocks, TILE_ROWS, count, width).swapaxes(1, 2)
    np.matmul(rows[:, None], tiles, out=out)
    if whole < columns:
        np.matmul(rows, right[:, whole:], out=made[:, :, whole:])
    return made
