"""Hugging Face folders: config.json and safetensors to (ModelConfig, Params) and back, bit for bit.

Unknown, missing and mis-shaped tensors are refused by name. Tensors go from the file
to their sharding one at a time: host memory holds one tensor, never the model.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.files import documents
from jaxmerge.files.checkpoints.open import open_folder
from jaxmerge.files.checkpoints.quantised import CONFIG_KEYS
from jaxmerge.files.checkpoints.safetensors import CODES, write_file
from jaxmerge.files.checkpoints.source import read
from jaxmerge.files.experts.layout import unstacked

from ..log import UserError, is_first_process, mistakes, say
from ..runtime.disk import new_folder
from ..runtime.mesh import put
from ..runtime.processes import broadcast, on_first, to_host
from .config import ModelConfig
from .decoder import Params, shapes
from .hf_config import config_from_hf, config_to_hf
from .stacked import unstack_layers
from .stored import Part, by_leaf, numbers, parts

# --- reading -----------------------------------------------------------------------------------------------

LISTED = 8  # names in a message
FLOATS = {"F64", "F32", "F16", "BF16"}
# Buffers that Llama 1 and 2 conversions stored; they follow from the config.
COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object, or raise a UserError that names the file."""
    if not path.exists():
        raise UserError(f"{path}: no such file; a Hugging Face model folder holds one")
    with mistakes():
        return documents.read_json(path)


def config_of_folder(folder: pathlib.Path) -> ModelConfig:
    """Read config.json, with the EOS ids of generation_config.json where it names any."""
    attributes = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.exists() and (eos := read_json(generation).get("eos_token_id")) is not None:
        attributes["eos_token_id"] = eos
    # Quantised weights are floats once they are read (`open_folder`).
    plain = {key: value for key, value in attributes.items() if key not in CONFIG_KEYS}
    return config_from_hf(plain, source=folder / "config.json")


def load_hf(
    folder: str | os.PathLike[str], *, sharding=None, dtype=jnp.float32, check_finite: bool = True
) -> tuple[ModelConfig, Params]:
    """Load a Hugging Face folder: config.json and safetensors, single or sharded with an index.

    Args:
      folder: holds config.json; generation_config.json, where present, has the last word on the EOS ids.
      sharding: where each tensor goes: None (the default device), one Sharding, a nested dict of them shaped
        like the parameters, or a function of a path (`model/norm/weight`) and its shape.
      dtype: of the parameters; a stored bfloat16 is exact in float32.
      check_finite: refuse NaN and infinity, by name.

    Returns:
      The config, and parameters under their Hugging Face names, `[out, in]`; of experts `[E, out, in]`.
    """
    folder = pathlib.Path(folder)
    config = config_of_folder(folder)
    with mistakes():
        source = open_folder(str(folder), folder)
        notes = list(source.notes)
        source = unstacked(source, notes)
        for note in notes:
            say(f"note: {note}")
        tensors = {name: tensor for name, tensor in source.tensors.items() if not COMPUTED.fullmatch(name)}
        for name, tensor in tensors.items():
            if CODES.get(tensor.dtype) not in FLOATS:
                raise UserError(f"{folder}: {name} is stored as {tensor.dtype}; known: {', '.join(sorted(FLOATS))}")
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if config.num_hidden_layers > len(tensors):
            raise UserError(
                f"{folder}: config.json says num_hidden_layers {config.num_hidden_layers}, and the files hold "
                f"{len(tensors)} tensors; copy the whole folder"
            )
        params = place(
            config,
            found,
            lambda name: read(tensors[name]),
            source=folder,
            sharding=sharding,
            dtype=dtype,
            check_finite=check_finite,
        )
    return config, params


def place(
    config: ModelConfig,
    found: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    *,
    source,
    sharding=None,
    dtype=jnp.float32,
    check_finite: bool = True,
) -> Params:
    """Read the tensors a config asks for one by one, each straight to its sharding.

    Args:
      found: Hugging Face name → shape of every tensor there is; checked before any is read.
      read: Hugging Face name → the tensor in host memory.
    """
    wanted = _wanted(config, found, source)
    leaves: dict[str, jax.Array] = {}
    finite: dict[str, jax.Array] = {}
    for name, files in by_leaf(wanted).items():
        host = _host(files, wanted, read, dtype)
        leaves[name] = put(host, _sharding_of(sharding, name, host.shape))
        del host
        if check_finite:
            finite[name] = _all_finite(leaves[name])
    bad = [name for name, good in jax.device_get(finite).items() if not good]
    if bad:
        raise UserError(
            f"{source}: NaN or infinity in {documents.some(bad, LISTED)}; damaged, or the training diverged"
        )
    return _nested(leaves)


def _host(files: list[str], wanted: Mapping[str, Part], read: Callable[[str], np.ndarray], dtype) -> np.ndarray:
    """A leaf in host memory; of experts the tensors of all, one behind the other."""
    if wanted[files[0]].expert is None:
        return np.asarray(read(files[0])).astype(dtype, copy=False)
    stack = np.empty((len(files), *wanted[files[0]].shape), dtype)
    for i, name in enumerate(files):
        stack[i] = read(name)
    return stack


def tree_of(
    config: ModelConfig, tensors: Mapping[str, Any], *, source: Any, stack: Callable[[list[Any]], Any] = jnp.stack
) -> Params:
    """Parameters of tensors that lie where they should, by their Hugging Face names; refused as `place` refuses.

    stack: makes one leaf of the matrices of all experts.
    """
    used = {name: tensor for name, tensor in tensors.items() if not COMPUTED.fullmatch(name)}
    wanted = _wanted(config, {n: t.shape for n, t in used.items()}, source)

    def leaf(files: list[str]) -> Any:
        return used[files[0]] if wanted[files[0]].expert is None else stack([used[name] for name in files])

    return _nested({name: leaf(files) for name, files in by_leaf(wanted).items()})


def _wanted(config: ModelConfig, found: Mapping[str, tuple[int, ...]], source: Any) -> dict[str, Part]:
    """The tensors that a config asks for, by name; raise unless those found are just these."""
    wanted = parts(config, dict(named(shapes(config))))
    complaints = {
        "missing": [name for name in wanted if name not in found],
        "unknown": [name for name in found if name not in wanted],
        "mis-shaped": [
            f"{name} {list(found[name])} (the config says {list(leaf.shape)})"
            for name, leaf in wanted.items()
            if name in found and tuple(found[name]) != tuple(leaf.shape)
        ],
    }
    if any(complaints.values()):
        listed = "; ".join(f"{kind}: {documents.some(names, LISTED)}" for kind, names in complaints.items() if names)
        raise UserError(f"{source}: the tensors do not fit the config; {listed}")
    return wanted


def _nested(leaves: Mapping[str, Any]) -> Params:
    params: Params = {}
    for name, leaf in leaves.items():
        *branches, last = name.split(".")
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), branches, params)[last] = leaf
    return params


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def named(params: Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested parameters with their dotted Hugging Face names, in numeric order of layers."""
    for key in sorted(params, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0, key)):
        if isinstance(params[key], Mapping):
            yield from named(params[key], f"{prefix}{key}.")
        else:
            yield prefix + key, params[key]


def _sharding_of(sharding, name: str, shape: tuple[int, ...]):
    if callable(sharding):
        return sharding(name.replace(".", "/"), shape)
    if isinstance(sharding, Mapping):
        return functools.reduce(lambda tree, key: tree[key], name.split("."), sharding)
    return sharding


# --- writing -----------------------------------------------------------------------------------------------


class SavesTokenizer(Protocol):
    def save(self, folder: str | os.PathLike[str]) -> None: ...


def save_hf(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    dtype=jnp.float32,
    tokenizer_from: SavesTokenizer | None = None,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write a Hugging Face folder that transformers loads, whole or not at all; stacked layers are unstacked.

    Args:
      folder: must not exist, or be empty. Everything is written beside it, synced, then renamed into place.
      dtype: the weights are stored in; float32 masters cast once.
      tokenizer_from: a `Tokenizer`; its files go into the folder.
      max_shard_bytes: of one safetensors file, and of host memory; more becomes shards with an index.
    """
    folder, params = pathlib.Path(folder), unstack_layers(params)
    first = is_first_process()
    check_fit(config, params, str(folder))
    # Every process takes part in reading an array that is spread over their devices; the first one writes.
    with new_folder(folder) if first else contextlib.nullcontext(folder) as temporary:
        stored = np.dtype(dtype).name
        attributes = {**config_to_hf(config), "dtype": stored, "torch_dtype": stored}
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        on_first(write_json, temporary / "config.json", attributes)
        on_first(write_json, temporary / "generation_config.json", {name: attributes[name] for name in tokens})
        _write_tensors(temporary, config, params, dtype, max_shard_bytes)
        if tokenizer_from is not None:
            on_first(tokenizer_from.save, temporary)
    broadcast(None)


def check_fit(config: ModelConfig, params: Params, where: str) -> None:
    """Refuse parameters whose names or shapes are not those of a config; the layers are apart."""
    have, want = ({n: tuple(leaf.shape) for n, leaf in named(tree)} for tree in (params, shapes(config)))
    if have != want:
        differ = [name for name in {**want, **have} if have.get(name) != want.get(name)]
        raise UserError(f"{where}: the parameters do not fit the config: {documents.some(differ, LISTED)}")


def _write_tensors(folder: pathlib.Path, config: ModelConfig, params: Params, dtype, max_shard_bytes: int) -> None:
    leaves = dict(named(params))
    stored = parts(config, leaves)
    size = {name: numbers(part) * np.dtype(dtype).itemsize for name, part in stored.items()}
    shards: list[list[str]] = [[]]
    for name in size:
        if shards[-1] and sum(size[n] for n in shards[-1]) + size[name] > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    where = {}

    def host(name: str) -> np.ndarray:
        part = stored[name]
        leaf = leaves[part.leaf]
        return to_host((leaf if part.expert is None else leaf[part.expert]).astype(dtype))

    for i, names in enumerate(shards, start=1):
        many = len(shards) > 1
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        on_first(write_file, folder / file, {name: host(name) for name in names})
        where.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": where}
        on_first(write_json, folder / "model.safetensors.index.json", index)


def write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
