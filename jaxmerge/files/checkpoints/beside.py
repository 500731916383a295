r"""What stands beside the weights of a model and belongs to it: tokenizers, processors, remote code, modules.

A file is told by its name alone, as the programs that read it tell it. The list below holds what tokenizers, processors
and generation settings are called; two kinds of file are named by another file:

  *.py                 the model's own code, copied while an `auto_map` of one of its configs names code in its folder
  1_Pooling/… and such the modules of a sentence-transformers model, each a folder that modules.json names
"""

from __future__ import annotations

import fnmatch
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from jaxmerge.files.documents import read_text

# What tokenizer.json says in an older form, or in another program's: once the vocabulary changes it would be wrong.
VOCABULARIES = (
    "vocab.*", "merges.txt", "added_tokens.json", "*.model", "tokenizer.model.*", "*.spm", "*.bpe", "*.codes",
    "*.tiktoken", "tekken.json", "dict.txt",
)  # fmt: skip
TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", *VOCABULARIES,
)  # fmt: skip
SETTINGS = (
    "generation_config.json", "*processor_config.json", "normalizer.json", "modules.json", "sentence_*_config.json",
    "config_sentence_transformers.json",
)  # fmt: skip
COMPANIONS = (*TOKENIZERS, *SETTINGS)
CONFIGS = ("tokenizer_config.json", "*processor_config.json")  # those that may name code, beside config.json
CODE = "*.py"
MODULES = "modules.json"
WEIGHTS = (".safetensors", ".bin")


def is_tokenizer(name: str) -> bool:
    """Whether a companion is of the tokenizer, the code of one included."""
    return _fits(name, (*TOKENIZERS, "tokenization*.py"))


def is_vocabulary(name: str) -> bool:
    """Whether a companion holds the vocabulary beside tokenizer.json, which another vocabulary makes wrong."""
    return _fits(name, VOCABULARIES)


def is_weights(name: str) -> bool:
    """Whether a companion holds weights of its own, as the dense layer of a sentence-transformers model does."""
    return name.endswith(WEIGHTS)


def companions_of(folder: pathlib.Path) -> dict[str, bytes]:
    """Read the companions that lie in a folder, as name (below the folder, with slashes) → content."""
    return {name: path.read_bytes() for name, path in companion_paths(folder).items()}


def companion_paths(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the companions that lie in a folder, as name → file."""
    files = {name: folder / name for name in sorted(_named(folder)) if _fits(name, COMPANIONS)}
    files |= {f"{module}/{path.name}": path for module in _modules(folder) for path in _files(folder / module)}
    configs = [folder / "config.json", *(path for name, path in files.items() if _fits(name, CONFIGS))]
    if any(_names_code(_read(path)) for path in configs):
        files |= {path.name: path for path in sorted(folder.glob(CODE)) if path.is_file()}
    return files


def write_companions(folder: pathlib.Path, files: Mapping[str, bytes]) -> None:
    """Write companions into a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    # `*` also stands for slashes here, so a pattern of one folder must not take another's files.
    return any(fnmatch.fnmatchcase(name, p) and name.count("/") == p.count("/") for p in patterns)


def _named(folder: pathlib.Path) -> Iterator[str]:
    yield from (path.name for path in _files(folder))
    yield from (f"additional_chat_templates/{path.name}" for path in _files(folder / "additional_chat_templates"))


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def _read(path: pathlib.Path) -> Any:
    """What a JSON file holds; None if it cannot be read: who needs it says so, here it only names others."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError):
        return None


def _names_code(config: Any) -> bool:
    """Whether a config's auto_map names code of its own folder; `org/name--module.Class` is another's."""
    found = config.get("auto_map") if isinstance(config, Mapping) else None
    values = found.values() if isinstance(found, Mapping) else [found]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return any(isinstance(name, str) and "--" not in name for name in names)


def _modules(folder: pathlib.Path) -> list[str]:
    """The folders below this one that modules.json names, and those called as its modules are called."""
    if not (folder / MODULES).is_file():
        return []
    found = _read(folder / MODULES)
    paths = [module.get("path") for module in found if isinstance(module, Mapping)] if isinstance(found, list) else []
    inside = [pathlib.PurePosixPath(path) for path in paths if isinstance(path, str) and path]
    named = [str(path) for path in inside if not path.is_absolute() and ".." not in path.parts]
    return list(dict.fromkeys([*named, *(path.name for path in sorted(folder.glob("[0-9]_*")) if path.is_dir())]))
