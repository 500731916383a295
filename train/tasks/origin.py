"""Where the questions of a family stand, for each split of a run: `path` and `split` of its args.

args: {path: FILE.jsonl}                                    one file for all splits of a run
args: {path: hf:openai/gsm8k/main}                          train from its train, test from its test
args: {path: hf:openai/gsm8k/main:test}                     all from its test
args: {path: DATASET, split: {train: train, test: dev}}     by name; of a TFDS version too
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data import hub
from ..log import UserError
from .task import SPLITS, Split


def args_of(args: Mapping[str, Any], split: Split, family: str) -> Mapping[str, Any]:
    """The args with the one split of the source from which the questions of a run's split are taken.

    A dataset of the hub for which none is named gives each split of a run from its own of that name; if it has no
    validation split, validation questions are taken from train.
    """
    path, given = args.get("path"), args.get("split")
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(SPLITS))
        if unknown or not all(isinstance(name, str) for name in given.values()):
            raise UserError(
                f"tasks: family {family}: split is {dict(given)}; wanted a name for each of {', '.join(SPLITS)}"
            )
        if split not in given:
            raise UserError(f"tasks: family {family}: split says nothing of {split}, of which questions are asked for")
        given = given[split]
    elif given is not None and not isinstance(given, str):
        raise UserError(f"tasks: family {family}: split is {given!r}; a name is wanted, or a map of names")
    if not hub.is_hub(path):
        return args if given is None else {**args, "split": given}
    if given is None and not hub.parse(path).split:
        known = hub.splits_of(path)
        given = "train" if split == "validation" and split not in known and "train" in known else split
    return {**args, "split": hub.one_split(path, given, default=given or "train")}


def stamp(path: str) -> int:
    """When a file was last written: read once, it is read again if that changes. 0 of a dataset at its commit."""
    return 0 if hub.is_hub(path) or not Path(path).exists() else Path(path).stat().st_mtime_ns
