"""mergekit-moe run in process, and what it writes in the layout of one tensor an expert."""

from __future__ import annotations

import pathlib
import re

import numpy as np
import yaml

from jaxmerge.files.checkpoints import shards, source

MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
STACKED = re.compile(r"(.*mlp\.experts)\.(gate_up|down)_proj")


def run(recipe: pathlib.Path, out: str) -> dict[str, np.ndarray]:
    """Run mergekit-moe on a recipe and return the tensors it writes."""
    from mergekit.io import tasks
    from mergekit.merge import MergeOptions
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.scripts.moe import build

    tasks.LoaderCache().loaders.clear()  # by path: another test's models have the same
    config = MoEMergeConfig.model_validate(yaml.safe_load(recipe.read_text()))
    build(config, out, MergeOptions(copy_tokenizer=False, quiet=True), device="cpu")
    return {name: source.read(tensor) for name, tensor in shards.open_folder(pathlib.Path(out))[0].items()}


def unstacked(arrays: dict[str, np.ndarray], *, mixtral: bool) -> dict[str, np.ndarray]:
    """Return mergekit's tensors under the names of published checkpoints, one an expert."""
    found = {}
    for name, array in arrays.items():
        match = STACKED.fullmatch(name)
        if match is None:
            found[name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if mixtral else name] = array
            continue
        front = match[1].replace(".mlp.", ".block_sparse_moe.") if mixtral else match[1]
        for e, matrix in enumerate(array):
            parts = {"down_proj": matrix}
            if match[2] == "gate_up":
                parts = dict(zip(("gate_proj", "up_proj"), np.split(matrix, 2), strict=True))
            for part, value in parts.items():
                found[f"{front}.{e}.{MIXTRAL[part] if mixtral else part}.weight"] = value
    return found
