"""Copies are copies, bit for bit; and inputs that change while they are merged end it."""

import json
import os
import pathlib

import ml_dtypes
import numpy as np
import pytest

from jaxmerge.files import engine, merge
from jaxmerge.files.checkpoints import safetensors
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read

NAME = "model.layers.0.w.weight"


def folder(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> pathlib.Path:
    path.mkdir()
    safetensors.write_file(path / safetensors.SINGLE, arrays)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    return path


def every_value(dtype: type) -> np.ndarray:
    """All finite values of 8 and 16 bits; of float32 and float64 all powers of two down to the smallest."""
    if np.dtype(dtype).itemsize <= 2:
        bits = np.arange(2 ** (8 * np.dtype(dtype).itemsize)).astype(f"u{np.dtype(dtype).itemsize}").view(dtype)
        with np.errstate(invalid="ignore"):  # NaNs are cast, and left out
            return bits[np.isfinite(bits.astype(np.float64))]
    info = np.finfo(dtype)
    powers = np.ldexp(np.ones((), dtype), np.arange(info.minexp - info.nmant, info.maxexp))
    return np.concatenate([powers, -powers, [0.0, -0.0]]).astype(dtype)


DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float64]
RECIPES = {
    "passthrough": "merge_method: passthrough\nmodels:\n- model: {base}\n",
    "linear": "merge_method: linear\nmodels:\n- {{model: {base}, parameters: {{weight: 1}}}}\n",
    "a share of itself": "merge_method: linear\nmodels:\n- {{model: {base}, parameters: {{weight: 0.3}}}}\n",
    "the base alone": "merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n- model: {base}\n",
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_copy_keeps_numbers_below_the_normal_range(tmp_path, dtype, recipe):
    base = folder(tmp_path / "a", {NAME: every_value(dtype)})
    (tmp_path / "r.yaml").write_text(RECIPES[recipe].format(base=base))
    merge(tmp_path / "r.yaml", tmp_path / "out")
    found = read(open_source(str(tmp_path / "out")).tensors[NAME])
    assert np.array_equal(found.view(np.uint8), every_value(dtype).view(np.uint8))


def test_a_copy_into_a_wider_dtype_is_exact(tmp_path):
    base = folder(tmp_path / "a", {NAME: every_value(ml_dtypes.bfloat16)})
    (tmp_path / "r.yaml").write_text(RECIPES["passthrough"].format(base=base) + "out_dtype: float32\n")
    merge(tmp_path / "r.yaml", tmp_path / "out")
    found = read(open_source(str(tmp_path / "out")).tensors[NAME])
    assert np.array_equal(found, every_value(ml_dtypes.bfloat16).astype(np.float32))


CHANGES = {
    "written into": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\7"),
    "replaced": lambda file: os.replace(_copy(file), file),
    "gone": lambda file: file.unlink(),
    "another tokenizer": lambda file: (file.parent / "tokenizer.json").write_text("[]"),
    "another config": lambda file: (file.parent / "config.json").write_text("{}"),
}


def _copy(file: pathlib.Path) -> pathlib.Path:
    copied = file.with_suffix(".new")
    copied.write_bytes(file.read_bytes())
    return copied


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_while_it_is_merged_ends_the_merge(tmp_path, monkeypatch, change):
    arrays = {f"model.layers.0.{i}.weight": np.full(8, i, np.float32) for i in range(3)}
    one, two = folder(tmp_path / "a", arrays), folder(tmp_path / "b", arrays)
    (one / "tokenizer.json").write_text("{}")
    text = "merge_method: linear\nmodels:\n" + "".join(
        f"- {{model: {path}, parameters: {{weight: 1}}}}\n" for path in (one, two)
    )
    (tmp_path / "r.yaml").write_text(text)
    read_whole = engine.Engine.run

    def run(self, jobs, progress=None):
        read_whole(self, jobs[:1], progress)
        CHANGES[change](one / safetensors.SINGLE)
        read_whole(self, jobs[1:], progress)

    monkeypatch.setattr(engine.Engine, "run", run)
    with pytest.raises(ValueError, match=r"(has changed|is gone) since this merge opened it"):
        merge(tmp_path / "r.yaml", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "r.yaml"]


def test_reads_go_on_in_the_file_that_was_opened(tmp_path):
    base = folder(tmp_path / "a", {NAME: np.arange(8.0)})
    source = open_source(str(base))
    safetensors.write_file(tmp_path / "new", {NAME: np.zeros(8)})
    os.replace(tmp_path / "new", base / safetensors.SINGLE)
    assert np.array_equal(read(source.tensors[NAME]), np.arange(8.0))
