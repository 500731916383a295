"""Open what a recipe's model string names: the one place that knows the kinds of checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from jaxmerge.files.checkpoints import adapter as adapters
from jaxmerge.files.checkpoints import hub, safetensors, shards
from jaxmerge.files.checkpoints.beside import companions_of
from jaxmerge.files.checkpoints.heads import drop_tied_head
from jaxmerge.files.checkpoints.quantised import dequantise
from jaxmerge.files.checkpoints.source import Source, Tensor, nothing
from jaxmerge.files.documents import read_json


def open_source(name: str, *, headers_only: bool = False) -> Source:
    """Open the checkpoint that a recipe's model string names; of what is here nothing but headers is read.

    Args:
      name: a Hugging Face folder; a file of safetensors or GGUF; a folder of one GGUF file; an Orbax checkpoint;
        `model+adapter`, split at the last plus sign; or a hub name `org/model` or `org/model@revision`, which is
        downloaded unless it has been. An adapter may be a hub name too.
      headers_only: of a hub's model or adapter that is not here, what lies beside the weights and the headers of the
        weights are fetched. Its tensors cannot be read.

    Raises:
      ValueError: there is no model, or it is damaged or of a format not known; says what was looked for and found.
    """
    if "+" in name and not pathlib.Path(name).expanduser().exists():
        return _open_adapted(name, headers_only)
    path = find_here(name)
    if path is None and headers_only and hub.is_hub_name(name):
        return _open_described_on_the_hub(name)
    path = path or find(name)
    if path is not None:
        return _open_path(name, path)
    raise ValueError(
        f"model {name!r} is no folder or file here; give a Hugging Face folder, a .gguf file, an Orbax checkpoint, or "
        "'model+adapter'"
    )


def find(name: str, *, weights: bool = True) -> pathlib.Path | None:
    """Return the file or folder that a name stands for, a hub's model downloaded; None if there is none such.

    Without `weights`, of a hub's model what lies beside them is downloaded alone.
    """
    here = find_here(name)
    return hub.fetch(name, weights=weights) if here is None and hub.is_hub_name(name) else here


def find_here(name: str) -> pathlib.Path | None:
    """Return the file or folder of that name.

    A revision after the name of a folder that is here has no effect: a folder has one state.
    """
    for text in dict.fromkeys((name, name.partition("@")[0])):
        path = pathlib.Path(text).expanduser()
        if text and path.exists():
            return path
    return None


def _open_path(name: str, path: pathlib.Path) -> Source:
    if path.is_file():
        if path.suffix == ".gguf":
            return _gguf(name, path)
        if path.suffix == ".safetensors":
            return _file(name, path)
        raise ValueError(
            f"model {name!r} is a {path.suffix or 'plain'} file; give the folder that holds config.json and "
            "*.safetensors, or a .safetensors or .gguf file"
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
    _check_no_adapter(name, folder)
    stored, notes = shards.open_folder(folder)
    return _described(name, folder, stored, notes)


def _open_described_on_the_hub(name: str) -> Source:
    """Open a hub's model by its headers; if it lies in the cache of the hub's client, as it is there."""
    folder, weights = hub.describe(name)
    _check_no_adapter(name, folder)
    if weights is None:
        return open_folder(name, folder)
    stored, notes = shards.open_folder(folder, weights)
    return _described(name, folder, stored, (*notes, _not_downloaded(name, stored)))


def _not_downloaded(name: str, stored: Mapping[str, Tensor]) -> str:
    size = sum(tensor.size for tensor in stored.values())
    said = f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
    return f"{name} is not downloaded: its headers alone were read; it has {said} of weights"


def _file(name: str, path: pathlib.Path) -> Source:
    """Open a single file of safetensors; what describes a model is taken from beside it only if it is its folder's."""
    folder = path.parent
    _check_no_adapter(name, folder)
    index = read_json(folder / safetensors.INDEX).get("weight_map")
    if isinstance(index, dict) and path.name in index.values():
        raise ValueError(f"model {name!r} is one of the shards that {safetensors.INDEX} names; give the folder")
    stored = shards.check_elements(path, safetensors.read_header(path))
    if path.name == safetensors.SINGLE or list(folder.glob("*.safetensors")) == [path]:
        return _described(name, folder, stored, ())
    plain = dequantise(name, stored, {})
    notes = (*plain.notes, f"{name} is a file alone, without config.json")
    return Source(name, folder, plain.tensors, {}, (path,), notes, nothing, plain.natural)


def _check_no_adapter(name: str, folder: pathlib.Path) -> None:
    if not (folder / "config.json").exists() and (folder / adapters.CONFIG).exists():
        raise ValueError(
            f"model {name!r} is an adapter, without the model it adapts; write it as 'model+adapter', or "
            "merge adapters alone with adapter: core in the recipe"
        )


def _described(
    name: str, folder: pathlib.Path, stored: Mapping[str, safetensors.Stored], notes: tuple[str, ...]
) -> Source:
    """The tensors with what lies in their folder: config, tokenizer and the like."""
    files = tuple(sorted({tensor.file for tensor in stored.values()}))
    plain = dequantise(name, stored, read_json(folder / "config.json"))
    tensors: dict[str, Tensor] = plain.tensors
    notes = (*notes, *plain.notes, *drop_tied_head(name, tensors, plain.config))
    if not plain.config:
        notes += (f"{name} has no config.json",)
    companions = functools.partial(companions_of, folder)
    return Source(name, folder, tensors, plain.config, files, notes, companions, plain.natural)


def _open_adapted(name: str, headers_only: bool) -> Source:
    base, _, adapter = name.rpartition("+")
    found = find_adapter(adapter, name, headers_only=headers_only)
    adapted = adapters.apply(open_source(base, headers_only=headers_only), found.folder, found.weights)
    return dataclasses.replace(adapted, name=name, notes=(*adapted.notes, *found.notes))


class FoundAdapter(NamedTuple):
    """Where an adapter lies, the headers of its weights, and a note where these alone are here."""

    folder: pathlib.Path
    weights: shards.Weights
    notes: tuple[str, ...] = ()


def find_adapter(adapter: str, name: str, *, headers_only: bool) -> FoundAdapter:
    """Find the adapter in the model string `name`; of a hub's adapter that is not here, headers or all is fetched."""
    if headers_only and find_here(adapter) is None and hub.is_hub_name(adapter):
        folder, weights = hub.describe(adapter, adapters.WEIGHTS)
        if weights is not None:
            stored = weights.header(adapters.WEIGHTS) if weights.has(adapters.WEIGHTS) else {}
            return FoundAdapter(folder, weights, (_not_downloaded(adapter, stored),))
        return FoundAdapter(folder, shards.weights_in(folder))
    folder = find(adapter)
    if folder is None or not folder.is_dir():
        raise ValueError(
            f"model {name!r}: the adapter {adapter!r} is no folder here (and {name!r} is none); give the folder that "
            "holds adapter_config.json, or the adapter's hub name org/name"
        )
    return FoundAdapter(folder, shards.weights_in(folder))
