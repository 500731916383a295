"""Open what a recipe's model string names: the one place that knows the kinds of checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re

from jaxmerge.files.checkpoints import safetensors, shards
from jaxmerge.files.checkpoints.heads import drop_tied_head
from jaxmerge.files.checkpoints.quantised import dequantise
from jaxmerge.files.checkpoints.source import Source, Tensor, companions_of
from jaxmerge.files.documents import read_json

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")


def open_source(name: str) -> Source:
    """Open the checkpoint that a recipe's model string names; nothing but headers is read.

    Args:
      name: a Hugging Face folder; a GGUF file, or a folder of one; an Orbax checkpoint; `model+adapter`, split at
        the last plus sign; or a hub name `org/model`, if it has been downloaded.

    Raises:
      ValueError: there is no model, or it is damaged or of a format not known; says what was looked for and found.
    """
    path = pathlib.Path(name).expanduser()
    if name and path.exists():
        return _open_path(name, path)
    if "+" in name:
        return _open_adapted(name)
    if HUB_NAME.fullmatch(name) and path.suffix != ".gguf":
        return _open_path(name, _downloaded(name))
    raise ValueError(
        f"model {name!r} is no folder or file here; give a Hugging Face folder, a .gguf file, an Orbax checkpoint, or "
        "'model+adapter'"
    )


def _open_path(name: str, path: pathlib.Path) -> Source:
    if path.is_file():
        if path.suffix == ".gguf":
            return _gguf(name, path)
        raise ValueError(
            f"model {name!r} is a {path.suffix or 'plain'} file; give the folder that holds config.json and "
            "*.safetensors, or a .gguf file"
        )
    if any(path.glob("*.safetensors")) or (path / safetensors.INDEX).exists():
        return open_folder(name, path)
    from jaxmerge.files.checkpoints import orbax

    if checkpoint := orbax.find(path):
        return orbax.open_checkpoint(name, checkpoint)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _gguf(name, files[0])
    if files:
        raise ValueError(f"model {name!r} holds {len(files)} .gguf files; name one of {', '.join(map(str, files[:4]))}")
    raise ValueError(f"model {name!r} {_what_else(path)}")


def _what_else(path: pathlib.Path) -> str:
    """Why a folder is no model, for the user who thought it was."""
    others = sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack") for file in path.glob(pattern)
    )
    if others:
        return (
            f"holds {', '.join(others[:3])} but no *.safetensors; convert it to safetensors first, with transformers: "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
        )
    if (path / "adapter_config.json").exists():
        return "holds an adapter without *.safetensors; save it as safetensors, and write it as 'model+adapter'"
    found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
    return f"holds no *.safetensors, no .gguf file and no Orbax checkpoint; found {found}"


def _gguf(name: str, path: pathlib.Path) -> Source:
    from jaxmerge.files.checkpoints import gguf

    return gguf.open_file(name, path)


def open_folder(name: str, folder: pathlib.Path) -> Source:
    """Open a Hugging Face folder; quantised weights are floats when they are read.

    Raises:
      ValueError: as `open_source`.
    """
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        raise ValueError(f"model {name!r} is an adapter, without the model it adapts; write it as 'model+adapter'")
    stored, notes = shards.open_folder(folder)
    files = tuple(sorted({tensor.file for tensor in stored.values()}))
    plain = dequantise(name, stored, read_json(folder / "config.json"))
    tensors: dict[str, Tensor] = plain.tensors
    notes = (*notes, *plain.notes, *drop_tied_head(name, tensors, plain.config))
    if not plain.config:
        notes += (f"{name} has no config.json",)
    companions = functools.partial(companions_of, folder)
    return Source(name, folder, tensors, plain.config, files, notes, companions, plain.natural)


def _open_adapted(name: str) -> Source:
    base, _, adapter = name.rpartition("+")
    folder = pathlib.Path(adapter).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"model {name!r}: the adapter {adapter!r} is no folder here (and {name!r} is none); give the folder that "
            "holds adapter_config.json"
        )
    from jaxmerge.files.checkpoints import adapter as adapters

    return dataclasses.replace(adapters.apply(open_source(base), folder), name=name)


def _downloaded(name: str) -> pathlib.Path:
    """The snapshot of a hub model in the cache of its client; nothing is fetched, a merge works on local files."""
    how = f"download it first (`hf download {name.partition('@')[0]}`), or give the path of its folder"
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ValueError(f"model {name!r} is no folder here, and only local folders are read; {how}") from None
    model, _, revision = name.partition("@")
    try:
        return pathlib.Path(snapshot_download(model, revision=revision or None, local_files_only=True))
    except (OSError, errors.HFValidationError, errors.LocalEntryNotFoundError):
        raise ValueError(
            f"model {name!r} is no folder here and not among the downloaded models, and nothing is fetched; {how}"
        ) from None
