r"""Merge checkpoints on disk, tensor by tensor, with the very functions that merge in memory.

Law: merging on disk equals loading the folders, merging on the mesh and writing the result, random masks
included: a tensor `model.layers.0.mlp.up_proj.weight` is the leaf `model/layers/0/mlp/up_proj/weight`, and a
model's name is its string in the recipe. Memory: the inputs' and the result's copy of one tensor at a time.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import where
from jaxmerge.delta import check_compat
from jaxmerge.files import card, recipe, safetensors
from jaxmerge.files.safetensors import Stored
from jaxmerge.rules import RULES
from jaxmerge.tree import wide

Progress = Callable[[int, int, str], None]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def merge(
    recipe_path: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    progress: Progress | None = None,
    seed: int | None = None,
    compat: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Merge the Hugging Face folders of a recipe into a new one.

    Args:
      recipe_path: a YAML recipe (see `jaxmerge.files.recipe`).
      out: folder to make; it appears under its name only when whole.
      progress: called after every tensor with bytes read so far, bytes to read, and the tensor's name.
      seed: overrides the recipe's seed.
      compat: "mergekit" switches off where a rule differs from mergekit by default (sce, model_stock).
      max_shard_bytes: size above which the result is split into shards.
      dry_run: check everything and return the plan, without reading a tensor or writing a file.

    Returns:
      {"out", "merge_method", "tensors", "bytes_in", "bytes_out", "files", "seconds", "notes"}.

    Raises:
      ValueError: one line that names what is wrong, where, and the way out; nothing is left behind.
    """
    start = time.perf_counter()
    out = pathlib.Path(out)
    plan = recipe.read(pathlib.Path(recipe_path))
    seed = plan.seed if seed is None else seed
    notes: list[str] = []
    folders = {name: pathlib.Path(name) for name in plan.sources}
    inputs = {name: _tensors(folder, notes) for name, folder in folders.items()}
    _check_alike(inputs)
    _check_tokenizers(folders, notes)
    first = inputs[plan.models[0].model]
    layout = {
        name: (plan.out_dtype or plan.dtype or stored.dtype if _is_float(stored.dtype) else stored.dtype, stored.shape)
        for name, stored in first.items()
    }
    places = safetensors.plan(layout, max_shard_bytes)
    bytes_in = sum(stored.size for tensors in inputs.values() for stored in tensors.values())
    report = {
        "out": str(out), "merge_method": plan.merge_method, "tensors": len(first), "bytes_in": bytes_in,
        "bytes_out": places.total, "files": list(places.sizes), "seconds": 0.0, "notes": notes,
    }  # fmt: skip
    paths = {name: name.replace(".", "/") for name in first}
    depth = where.depths(list(paths.values()))
    check_compat(compat)
    extra = {"compat": compat} if plan.method.compat else {}
    coefficients = {name: plan.coefficients(name, depth[path]) | extra for name, path in paths.items()}
    if dry_run:
        return report
    with safetensors.new_folder(out, places.total) as folder:
        with contextlib.closing(safetensors.Writer(folder, places)) as writer:
            done = 0
            for name, path in paths.items():
                arrays = {source: tensors[name].read() for source, tensors in inputs.items()}
                for source, array in arrays.items():
                    _check_finite(array, name, inputs[source][name].file)
                merged = _merge_one(plan, arrays, path, coefficients[name], layout[name][0], seed)
                _check_finite(merged, name, f"the result of {plan.merge_method}")
                writer.write(name, merged)
                done += sum(tensors[name].size for tensors in inputs.values())
                if progress is not None:
                    progress(done, bytes_in, name)
            writer.finish()
        _copy_rest(folders[plan.base or plan.models[0].model], folder, plan, notes)
        card.write(folder, card.provenance(plan, inputs, seed, notes))
    return report | {"seconds": time.perf_counter() - start}


def _merge_one(
    plan: recipe.Recipe, arrays: Mapping[str, np.ndarray], path: str, coefficients: dict, out: np.dtype, seed: int
) -> np.ndarray:
    """Merge one tensor: inputs cast to `dtype`, arithmetic in float32, one cast to the output's dtype."""
    stored = arrays[plan.models[0].model].dtype
    is_float = _is_float(stored)
    # 64-bit floats would be halved on their way into jax.
    double = any(array.dtype == np.float64 for array in arrays.values()) or plan.dtype == np.float64
    with jax.enable_x64(True) if double else contextlib.nullcontext():
        leaves = {}
        for source, array in arrays.items():
            leaf = jnp.asarray(array) if is_float else array
            if is_float and plan.dtype is not None:
                leaf = leaf.astype(plan.dtype)
            # Rounded once: where the result is of another dtype, the rule must not round to the input's.
            leaves[source] = leaf.astype(wide(leaf.dtype)) if is_float and leaf.dtype != out else leaf
        needs = RULES[plan.method.rule].needs
        keywords = dict(coefficients)
        if needs.base != "none" and plan.base is not None:
            keywords["base"] = {path: leaves[plan.base]}
        if needs.key != "none":
            keywords |= {"key": jax.random.key(seed), "names": [entry.model for entry in plan.models]}
        models = [{path: leaves[entry.model]} for entry in plan.models]
        merged = RULES[plan.method.rule](models, **keywords)[path]
        return np.asarray(jnp.asarray(merged).astype(out) if is_float else merged)


def _is_float(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _check_finite(array: np.ndarray, name: str, source: Any) -> None:
    if _is_float(array.dtype) and not bool(_all_finite(array)):
        bad = int(np.sum(~np.isfinite(array.astype(np.float64))))
        raise ValueError(f"tensor {name!r} of {source} has {bad} NaN or infinite elements; wanted finite weights")


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _tensors(folder: pathlib.Path, notes: list[str]) -> dict[str, Stored]:
    """Open a folder; a head that the config ties to the embedding is left out, as it is written only once."""
    tensors = safetensors.open_folder(folder)
    tied = read_json(folder / "config.json").get("tie_word_embeddings", False)
    if tied and HEAD in tensors and EMBEDDING in tensors:
        if not np.array_equal(tensors[HEAD].read().view(np.uint8), tensors[EMBEDDING].read().view(np.uint8)):
            raise ValueError(
                f"{folder}: config.json says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}; set it "
                "to false to merge both, or remove the head"
            )
        notes.append(f"{folder}: {HEAD} is tied to the embedding and stored twice; written once")
        del tensors[HEAD]
    return tensors


def _check_alike(inputs: Mapping[str, Mapping[str, Stored]]) -> None:
    """Raise unless all models have the same tensors in the same shapes."""
    (first_name, first), *others = inputs.items()
    for name, tensors in others:
        missing = [t for t in first if t not in tensors]
        unknown = [t for t in tensors if t not in first]
        if missing or unknown:
            lost = [f"lacks {len(missing)} tensors of it ({', '.join(missing[:3])})"] if missing else []
            more = [f"has {len(unknown)} that it lacks ({', '.join(unknown[:3])})"] if unknown else []
            raise ValueError(
                f"model {name!r} does not match {first_name!r}: {' and '.join(lost + more)}; "
                "merge models of one architecture"
            )
        for tensor, stored in first.items():
            found = tensors[tensor]
            if found.shape != stored.shape:
                raise ValueError(
                    f"tensor {tensor!r} of {name!r} has shape {list(found.shape)}, wanted {list(stored.shape)} as "
                    f"in {first_name!r}; merge models of one architecture and one vocabulary"
                )
            if _is_float(found.dtype) != _is_float(stored.dtype):
                raise ValueError(
                    f"tensor {tensor!r} of {name!r} is {found.dtype}, wanted {stored.dtype} as in {first_name!r}"
                )


def _check_tokenizers(folders: Mapping[str, pathlib.Path], notes: list[str]) -> None:
    found = {name: (folder / "tokenizer.json") for name, folder in folders.items()}
    texts = {name: file.read_bytes() for name, file in found.items() if file.exists()}
    for name in sorted(set(found) - set(texts)):
        notes.append(f"{name} has no tokenizer.json")
    if len(set(texts.values())) > 1:
        notes.append("the tokenizers of the models differ; rows of the embeddings are merged by number all the same")


def _copy_rest(source: pathlib.Path, folder: pathlib.Path, plan: recipe.Recipe, notes: list[str]) -> None:
    if (source / "config.json").exists():
        config = read_json(source / "config.json")
        dtype = plan.out_dtype or plan.dtype
        if dtype is not None:
            config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    else:
        notes.append(f"{source} has no config.json")
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON file, or {} if there is none."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
