"""JSON and YAML that strangers wrote: read with bounds, and refused in one line that names the file.

One reader for the whole project. It bounds the bytes of a file, the depth of a document and how many values it has;
YAML's aliases count as often as they are used, because a page of them can stand for more values than memory holds.
Pipes, devices and folders are refused before anything is read, and so is text that no file can hold again (halves of
surrogate pairs). What a document must hold is the caller's to check: `wanted` says in one line what was found instead.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from jaxmerge.files.checkpoints.handles import read_bytes

MOST_BYTES = 1 << 28  # the largest tokenizer.json is a tenth of it
MOST_VALUES = 5_000_000
DEEPEST = 100


def read_text(path: pathlib.Path) -> str:
    """Read a file of UTF-8 text.

    Raises:
      ValueError: it is no plain file, too large, or no text.
    """
    try:
        return read_bytes(path, MOST_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: byte {error.start} is not UTF-8; copy it again") from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object, or {} if there is no such file."""
    return parse_json(read_text(path), path) if os.path.lexists(path) else {}


def parse_json(text: str | bytes, where: Any) -> dict[str, Any]:
    """Parse a JSON object; `where` names it in errors."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {_line(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {wanted(found, 'a JSON object')}")
    _check_values(found, where)
    return found


def read_yaml(path: pathlib.Path) -> list[Any]:
    """Read the documents of a YAML file; those that are empty are left out."""
    return parse_yaml(read_text(path), path)


def parse_yaml(text: str, where: Any) -> list[Any]:
    """Parse the documents of a YAML text; `where` names it in errors."""
    documents = []
    try:
        loader = yaml.SafeLoader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                _count_nodes(node, where)
                documents.append(_construct(loader, node))
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is no YAML: {_line(error)}") from None
    for document in documents:
        _check_values(document, where)
    return [document for document in documents if document is not None]


def written(source: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """Write a recipe that is given as data as the YAML file that says the same.

    Example:
      >>> print(written({"merge_method": "linear", "models": [{"model": pathlib.Path("a")}]}), end="")
      merge_method: linear
      models:
      - model: a
    """
    documents = [source] if isinstance(source, Mapping) else source
    try:
        plain = json.loads(json.dumps(documents, default=os.fspath))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"the recipe holds what YAML cannot ({error}); give dictionaries, lists, texts, numbers and paths"
        ) from None
    return yaml.safe_dump_all(plain, sort_keys=False, allow_unicode=True)


def _construct(loader: yaml.SafeLoader, node: yaml.Node | None) -> Any:
    try:
        return loader.construct_document(node)
    except ValueError as error:  # a date that no calendar has, a number of thousands of digits
        raise yaml.YAMLError(str(error)) from None


def wanted(found: Any, what: str) -> str:
    """Say what was found where something else was wanted: `null, wanted a number`."""
    return f"{shown(found)}, wanted {what}"


def shown(value: Any, most: int = 60) -> str:
    """Write a value as JSON would, cut to `most` characters."""
    names = {dict: "an object", list: "a list"}
    for kind, name in names.items():
        if isinstance(value, kind) and len(value) > 3:
            return f"{name} of {len(value)}"
    text = json.dumps(value, default=str, ensure_ascii=True)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def some(names: Sequence[str], most: int) -> str:
    """List names for a message, at most so many, and how many more there are.

    Example:
      >>> some(["a", "b", "c"], 2)
      'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"


def _count_nodes(root: yaml.Node | None, where: Any) -> None:
    """Raise if a YAML document stands for too many values: a node counts as often as aliases name it."""
    sizes: dict[int, int] = {}
    path: set[int] = set()
    stack: list[tuple[yaml.Node, bool]] = [] if root is None else [(root, False)]
    while stack:
        node, is_done = stack.pop()
        children = _children(node)
        if is_done:
            path.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
            if sizes[id(node)] > MOST_VALUES:
                raise ValueError(
                    f"{where} stands for more than {MOST_VALUES:,} values by its aliases; write it plainly"
                )
        elif id(node) in path:
            raise ValueError(f"{where} holds itself by an alias (line {node.start_mark.line + 1}); write it plainly")
        elif id(node) not in sizes:
            path.add(id(node))
            if len(path) > DEEPEST:
                raise ValueError(f"{where} is nested more than {DEEPEST} deep (line {node.start_mark.line + 1})")
            stack.append((node, True))
            stack += [(child, False) for child in children]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _check_values(document: Any, where: Any) -> None:
    """Raise if a document is too deep or too large, or holds text that cannot be written."""
    count = 0
    stack: list[tuple[Any, int]] = [(document, 0)]
    while stack:
        value, depth = stack.pop()
        count += 1
        if depth > DEEPEST or count > MOST_VALUES:
            what = f"is nested more than {DEEPEST} deep" if depth > DEEPEST else f"has over {MOST_VALUES:,} values"
            raise ValueError(f"{where} {what}; it is no such file")
        if isinstance(value, str):
            _check_text(value, where)
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                if isinstance(key, str):
                    _check_text(key, where)
                stack.append((inner, depth + 1))
        elif isinstance(value, list | tuple | set):
            stack += [(inner, depth + 1) for inner in value]


def _check_text(text: str, where: Any) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half of a surrogate pair, {text[error.start]!a}, in {text[:40]!a}; no file can hold that text"
        ) from None
