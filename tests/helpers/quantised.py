"""Folders of quantised weights, and what must be read from them."""

import json
import pathlib

import ml_dtypes
import numpy as np

from jaxmerge.files.checkpoints import safetensors
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read

NORM = "model.norm.weight"


def folder(path: pathlib.Path, arrays: dict[str, np.ndarray], said: dict | None, **config) -> pathlib.Path:
    path.mkdir()
    safetensors.write_file(path / safetensors.SINGLE, {NORM: np.ones(4, ml_dtypes.bfloat16), **arrays})
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": False} | config
    (path / "config.json").write_text(json.dumps(config | ({"quantization_config": said} if said else {})))
    return path


def check(path: pathlib.Path, wanted: dict[str, np.ndarray]) -> None:
    """Read whole tensors and runs of elements; float32 is the one rounding of float64's product."""
    source = open_source(str(path))
    assert set(source.tensors) == {*wanted, NORM}
    assert "quantization_config" not in source.config
    for name, array in wanted.items():
        tensor = source.tensors[name]
        found = read(tensor)
        assert np.array_equal(found, array.astype(np.float32)), name
        for first, count in ((1, 3), (found.size // 2, 2), (found.size - 2, 2)):
            run = np.empty(count * 4, np.uint8)
            tensor.read_into(run, first * 4)
            assert np.array_equal(run.view(np.float32), found.reshape(-1)[first : first + count])
        assert source.natural[name] == ml_dtypes.bfloat16
