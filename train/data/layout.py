"""Which files of a dataset on the hub are which subset and split: by what its card declares, else by their names.

    main/train-00000-of-00001.parquet   subset main, split train
    data/test-*.parquet                 subset default, split test
    arc/validation/0000.parquet         subset arc, split validation: the hub's own conversion
    test.jsonl                          subset default, split test

Names of files go in, names come out; nothing is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmerge.files.patterns import is_found

from ..log import UserError, mistakes

Splits = dict[str, list[str]]
KINDS = ((".parquet",), (".jsonl", ".ndjson"), (".json",))
"""Endings of files that are read, the first kind that a dataset has; others of it are copies."""
NO_DATA = frozenset({"dataset_infos.json", "dataset_dict.json", "state.json", "config.json"})
WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
"""Words in the name of a file that say its split, as the hub reads them."""
_WORD = re.compile(rf"(?:^|[\W_\d])({'|'.join(WORDS)})(?=$|[\W_\d])")
_SHARD = re.compile(r"(?P<split>.+?)[-_.](?P<number>\d{5})-of-(?P<of>\d{5})(?:-[0-9a-f]+)?")
_FRONT = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


class Layout(NamedTuple):
    """What a dataset holds.

    Attributes:
      subsets: subset → split → its files, in order.
      default: the subset that is meant where none is named; None where there are several and none is the default.
    """

    subsets: dict[str, Splits]
    default: str | None


def lay_out(files: Sequence[str], card: str, where: str) -> Layout:
    """Tell subsets and splits.

    Args:
      files: names of all files of the dataset.
      card: the text of its README.md; its `configs:` declare subsets.
      where: names the dataset in errors.

    Raises:
      UserError: the card is no YAML, or a split lacks some of its numbered files.
    """
    declared, default = read_card(card, where)
    subsets: dict[str, Splits] = {}
    for name, told in declared.items():
        splits = declared_splits(told, files, where)
        if splits:
            subsets[name] = splits
    if not subsets:
        subsets, default = infer(readable(files)), None
    for subset, splits in subsets.items():
        for split, names in splits.items():
            check_whole(names, f"{where}: {subset}, {split}")
    if default not in subsets:
        default = "default" if "default" in subsets else next(iter(subsets)) if len(subsets) == 1 else None
    return Layout(subsets, default)


def read_card(text: str, where: str) -> tuple[dict[str, Mapping[str, Any]], str | None]:
    """The `configs:` of a dataset card by their names, and which is the default."""
    front = _FRONT.match(text)
    if front is None:
        return {}, None
    from jaxmerge.files import documents  # the command's help answers without yaml

    try:
        found = documents.parse_yaml(front.group(1), f"{where}: the head of README.md")
    except ValueError as error:
        raise UserError(str(error)) from None
    configs = found[0].get("configs") if found and isinstance(found[0], Mapping) else None
    listed = [c for c in configs if isinstance(c, Mapping)] if isinstance(configs, list) else []
    named = {str(c.get("config_name", "default")): c for c in listed if "data_files" in c or "data_dir" in c}
    return named, next((str(c.get("config_name")) for c in listed if c.get("default") is True), None)


def declared_splits(told: Mapping[str, Any], files: Sequence[str], where: str) -> Splits:
    """The files of one entry of `configs:`: `data_files` (a pattern, patterns, or a pattern for each split)."""
    folder = str(told.get("data_dir") or "").strip("/")
    prefix = f"{folder}/" if folder else ""
    given = told.get("data_files")
    if given is None:
        inside = [file for file in files if file.startswith(prefix)]
        return merged(infer(readable(inside)).values())
    entries = given if isinstance(given, list) else [given]
    if all(isinstance(entry, str) for entry in entries):
        return merged(infer(readable(chosen(entries, files, prefix, where))).values())
    splits: Splits = {}
    for entry in entries:
        if isinstance(entry, Mapping) and "split" in entry:
            paths = entry.get("path")
            patterns = [paths] if isinstance(paths, str) else paths
            pairs = [(str(entry["split"]), patterns)]
        else:  # {train: pattern, test: [patterns]}
            pairs = [(str(k), [v] if isinstance(v, str) else v) for k, v in dict(entry).items()]
        for split, patterns in pairs:
            names = readable(chosen([p for p in patterns or () if isinstance(p, str)], files, prefix, where))
            if names:
                splits.setdefault(split, []).extend(names)
    return splits


def chosen(patterns: Iterable[str], files: Sequence[str], prefix: str, where: str) -> list[str]:
    """Files that any pattern matches, in the order of the patterns, then by name; matched in linear time."""
    found: dict[str, None] = {}
    for pattern in patterns:
        whole = f"^(?:{as_regex(prefix + pattern.removeprefix('./'))})$"
        with mistakes():
            found |= dict.fromkeys(file for file in sorted(files) if is_found(whole, file, f"{where}: data_files"))
    return list(found)


def as_regex(pattern: str) -> str:
    """A pattern of the hub as a regular expression: `*` stays in one folder, `**` does not.

    Example:
      >>> bool(re.fullmatch(as_regex("main/train-*"), "main/train-00000-of-00001.parquet"))
      True
      >>> bool(re.fullmatch(as_regex("*.jsonl"), "a/b.jsonl")), bool(re.fullmatch(as_regex("**/*.jsonl"), "b.jsonl"))
      (False, True)
    """
    named = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[\w-]+\])", pattern)
    return "".join(named.get(p, p if i % 2 else re.escape(p)) for i, p in enumerate(parts))


def readable(files: Iterable[str]) -> list[str]:
    """Of the files those of the first kind there is, by name."""
    names = sorted(file for file in files if file.rpartition("/")[2] not in NO_DATA and not file.startswith("."))
    kinds = ([name for name in names if name.endswith(kind)] for kind in KINDS)
    return next((found for found in kinds if found), [])


def infer(files: Iterable[str]) -> dict[str, Splits]:
    """Subsets and splits by the names of files and their folders."""
    found: dict[str, Splits] = {}
    for file in files:
        *folders, base = file.split("/")
        stem = base.rpartition(".")[0]
        shard = _SHARD.fullmatch(stem)
        word = _WORD.search(stem)
        if shard and re.fullmatch(r"\w+(\.\w+)*", shard["split"]):
            split = shard["split"]
        elif word:
            split = WORDS[word.group(1)]
        elif folders and stem.isdigit():
            split = folders.pop()
        elif folders and folders[-1] in WORDS:
            split = WORDS[folders.pop()]
        else:
            split = "train"
        if folders and folders[0] == "data":
            folders = folders[1:]
        found.setdefault("/".join(folders) or "default", {}).setdefault(split, []).append(file)
    return found


def merged(parts: Iterable[Splits]) -> Splits:
    whole: Splits = {}
    for part in parts:
        for split, names in part.items():
            whole.setdefault(split, []).extend(names)
    return whole


def check_whole(names: Sequence[str], where: str) -> None:
    """Refuse a split of which numbered files are missing, as after a download that was cut off."""
    counted: dict[str, set[int]] = {}
    for name in names:
        if shard := _SHARD.fullmatch(name.rpartition("/")[2].rpartition(".")[0]):
            counted.setdefault(f"{shard['split']}-…-of-{shard['of']}", set()).add(int(shard["number"]))
    for name, numbers in counted.items():
        if len(numbers) != int(name[-5:]):
            raise UserError(f"{where}: {len(numbers)} of the {int(name[-5:])} files {name} are here")
