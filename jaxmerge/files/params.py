r"""Checkpoints as pytrees: read one into nested dictionaries of arrays, write any pytree of arrays as one.

A tensor `model.layers.0.mlp.up_proj.weight` is the leaf `tree["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"]`, so
the rules see the path `model/layers/0/mlp/up_proj/weight`, and what they merge here is what `merge` merges on disk.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.files import disk
from jaxmerge.files.checkpoints import orbax, safetensors
from jaxmerge.files.checkpoints.beside import write_companions
from jaxmerge.files.checkpoints.heads import tied_pair, untied
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import Source, main_dtype, read
from jaxmerge.files.companions import as_json
from jaxmerge.files.documents import some
from jaxmerge.files.experts.layout import unstacked
from jaxmerge.tree import PyTree, is_array, named_leaves

FORMATS = ("safetensors", "orbax")
LISTED = 4  # names in a message
SHARD_BYTES = 5_000_000_000


def load(path: str | os.PathLike[str], *, dtype: Any = None, sharding: Any = None) -> dict[str, Any]:
    """Read a checkpoint as nested dictionaries of arrays, ready for the rules.

    Args:
      path: what a recipe may name: a Hugging Face folder, a `.safetensors` or `.gguf` file, an Orbax checkpoint,
        `model+adapter`, or a hub name `org/model`.
      dtype: floating leaves are cast to it; by default each keeps the dtype that it is stored in. (Quantised weights
        are floats once they are read.)
      sharding: where each leaf goes: a `jax.sharding.Sharding` for all, or a function of the leaf's path and shape. By
        default jax's default device.

    Returns:
      The parameters. Experts that are stored stacked are apart, a leaf for each matrix of each, where `merge` merges
      them so (docs/experts.md). A head that is tied to the embedding is left out, because it is the embedding. Leaves
      of 64 bits are NumPy arrays unless `jax_enable_x64` is set, because jax would halve their bits.

    Raises:
      ValueError: there is no checkpoint, or it is damaged or of a format not known.

    Example:
      >>> params = load("Qwen/Qwen2.5-0.5B", dtype=jnp.float32)  # doctest: +SKIP
      >>> params["model"]["norm"]["weight"].shape  # doctest: +SKIP
      (896,)
    """
    source = unstacked(open_source(os.fspath(path)), [])

    def leaf(name: str) -> Any:
        array = read(source.tensors[name])
        if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(dtype)
        if array.dtype.itemsize == 8 and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
            return array
        where = sharding(name.replace(".", "/"), array.shape) if callable(sharding) else sharding
        return jax.device_put(array, where)

    return orbax.nest({name: leaf(name) for name in source.tensors})


def save(
    params: PyTree,
    path: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    format: str = "safetensors",
    max_shard_bytes: int = SHARD_BYTES,
) -> pathlib.Path:
    """Write a pytree of arrays as a checkpoint, whole or not at all.

    Args:
      params: any pytree of arrays; a leaf's name is its path with dots. A flat dict of dotted names is the same as the
        nested one.
      path: of a new folder; with the ending `.safetensors`, of a new file.
      like: a model as in `load`, with its experts apart or as they are stored. Its config.json, tokenizer, chat
        template and generation config are copied, and names and shapes must be its own. A head that equals the
        embedding stays tied; a head that differs is written, and the config says that the two are not tied.
      dtype: floating leaves are cast to it; by default each keeps its own.
      format: "safetensors", or "orbax" for the layout that `jaxmerge merge … format=orbax` writes.
      max_shard_bytes: size above which a folder of safetensors is split into shards.

    Returns:
      The path.

    Raises:
      ValueError: the name is taken, a leaf is no array, or the parameters are not those of `like`.

    Example:
      >>> merged = jaxmerge.ties([one, two], base=base, density=0.2)  # doctest: +SKIP
      >>> save(merged, "merged", like="path/of/base")  # doctest: +SKIP
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}, wanted one of {', '.join(FORMATS)}")
    path = pathlib.Path(path)
    leaves = _named(params, dtype)
    if path.suffix == ".safetensors":
        if like is not None or format != "safetensors":
            raise ValueError(f"{path} is to be a file of weights alone; give the name of a folder, or leave out "
                             f"{'like' if like is not None else 'format'}=")  # fmt: skip
        with disk.new_file(path) as partial:
            safetensors.write_file(partial, leaves)
        return path
    files = {} if like is None else _beside(_like(os.fspath(like), leaves), leaves)
    places = safetensors.plan({name: (np.dtype(x.dtype), x.shape) for name, x in leaves.items()}, max_shard_bytes)
    with disk.new_folder(path, places.total) as partial:
        beside = partial
        if format == "orbax":
            beside = partial / "model"
            beside.mkdir()
            orbax.write_tree(orbax.nest({name: np.asarray(x) for name, x in leaves.items()}), partial / "weights")
        else:
            with contextlib.closing(safetensors.Writer(partial, places)) as writer:
                for name, leaf in leaves.items():
                    writer.write(name, np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
                writer.finish()
        write_companions(beside, files)
    return path


def _named(params: PyTree, dtype: Any) -> dict[str, Any]:
    """The leaves by dotted name, every one of them an array that this process holds whole."""
    found: dict[str, Any] = {}
    for name, leaf in ((path.replace("/", "."), leaf) for path, leaf in named_leaves(params).items()):
        if not is_array(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            found_there = " ".join(repr(leaf).split())
            raise ValueError(f"leaf {name!r} is {found_there:.60}, wanted an array; save the tree without it")
        if not getattr(leaf, "is_fully_addressable", True):
            raise ValueError(
                f"leaf {name!r} lies on devices of other processes too; gather it, then let one process save"
            )
        if name in found:
            raise ValueError(f"two leaves are both named {name!r} on disk; rename a key")
        cast = dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        found[name] = leaf.astype(dtype) if cast else leaf
        safetensors.check_dtype(np.dtype(found[name].dtype), name, "params")
    if not found:
        raise ValueError("params hold no array; give a pytree of arrays")
    return found


def _like(name: str, leaves: Mapping[str, Any]) -> Source:
    """The model that leaves are like, its experts apart unless a leaf has the name of stacked ones."""
    stored = open_source(name)
    apart = unstacked(stored, [])
    return stored if any(leaf in stored.tensors and leaf not in apart.tensors for leaf in leaves) else apart


def _beside(like: Source, leaves: dict[str, Any]) -> dict[str, bytes]:
    """config.json and companions of `like` for these leaves; a head that is the embedding is taken out of them."""
    config = like.config
    pair = tied_pair(like)
    if pair is not None and set(pair) <= leaves.keys():
        embedding, head = (np.asarray(leaves[name]) for name in pair)
        if head.dtype == embedding.dtype and head.tobytes() == embedding.tobytes():
            del leaves[pair[1]]
        else:
            config = untied(config)
    wrong = {
        "missing": [name for name in like.tensors if name not in leaves],
        "unknown": [name for name in leaves if name not in like.tensors and name not in (pair or ())],
        "of another shape": [
            f"{name} {list(leaves[name].shape)}, wanted {list(tensor.shape)}"
            for name, tensor in like.tensors.items()
            if name in leaves and tuple(leaves[name].shape) != tuple(tensor.shape)
        ],
    }
    if any(wrong.values()):
        listed = "; ".join(f"{kind}: {some(names, LISTED)}" for kind, names in wrong.items() if names)
        raise ValueError(f"params are not a model like {like.name}: {listed}; name the model that they come from")
    key = "dtype" if "dtype" in config else "torch_dtype"
    dtype = main_dtype((np.dtype(leaf.dtype), leaf.nbytes) for leaf in leaves.values())
    if key in config and dtype is not None:
        config = {**config, key: str(dtype)}
    return {**like.companions(), **({"config.json": as_json(config)} if config else {})}
