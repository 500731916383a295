"""Which tensors a folder holds: the index is the word, a single file comes before it, and nothing lies outside."""

import json
import os
import pathlib

import numpy as np
import pytest

from jaxmerge.files.checkpoints import safetensors, shards
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read
from train.log import UserError
from train.models.hf import load_hf

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def array(value: float) -> np.ndarray:
    return np.full((2, 3), value, np.float32)


def written(folder: pathlib.Path, files: dict[str, dict[str, np.ndarray]], placed=None) -> pathlib.Path:
    folder.mkdir()
    for name, arrays in files.items():
        safetensors.write_file(folder / name, arrays)
    if placed is not None:
        (folder / safetensors.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def values(folder: pathlib.Path) -> dict[str, float]:
    return {name: float(read(tensor)[0, 0]) for name, tensor in open_source(str(folder)).tensors.items()}


def test_a_tensor_in_two_shards_is_the_named_ones(tmp_path):
    files = {ONE: {"a": array(1), "b": array(2)}, TWO: {"b": array(3), "c": array(4)}}
    for shard, b in ((ONE, 2), (TWO, 3)):
        folder = written(tmp_path / shard, files, {"a": ONE, "b": shard, "c": TWO})
        assert values(folder) == {"a": 1, "b": b, "c": 4}
        assert "b of" in open_source(str(folder)).notes[0]


def test_what_the_index_does_not_name_is_left_out_and_said(tmp_path):
    files = {ONE: {"a": array(1), "stray": array(9)}, TWO: {"b": array(2)}}
    folder = written(tmp_path / "x", files, {"a": ONE, "b": TWO})
    assert values(folder) == {"a": 1, "b": 2}
    note = open_source(str(folder)).notes[0]
    assert f"stray of {ONE}" in note
    assert "left out" in note


@pytest.mark.parametrize("whole", [True, False])
def test_a_single_file_comes_before_what_an_earlier_save_left(tmp_path, whole):
    old = {ONE: {"a": array(1)}, TWO: {"b": array(2)}} if whole else {}
    folder = written(tmp_path / "x", {**old, safetensors.SINGLE: {"a": array(5), "b": array(6)}}, {"a": ONE, "b": TWO})
    assert values(folder) == {"a": 5, "b": 6}
    note = open_source(str(folder)).notes[0]
    assert "left over from an earlier save" in note
    assert safetensors.INDEX in note


@pytest.mark.parametrize("outside", ["../x/other.safetensors", "/etc/hosts", "a/../../b.safetensors", "", "a\0b", 3])
def test_paths_outside_the_folder_are_refused(tmp_path, outside):
    safetensors.write_file(tmp_path / "other.safetensors", {"a": array(1)})
    folder = written(tmp_path / "x", {ONE: {"b": array(2)}}, {"a": outside, "b": ONE})
    with pytest.raises(ValueError, match="wanted the name of a file in this folder"):
        open_source(str(folder))


def test_links_are_followed_as_in_the_hubs_cache(tmp_path):
    folder = written(tmp_path / "x", {ONE: {"a": array(1)}}, {"a": ONE})
    (folder / ONE).rename(tmp_path / "blob")
    (folder / ONE).symlink_to(tmp_path / "blob")
    assert values(folder) == {"a": 1}


WRONG = {
    "lost": ({ONE: {"a": array(1)}}, {"a": ONE, "b": ONE}, "names 1 tensors that their shards do not hold, first 'b'"),
    "missing": ({ONE: {"a": array(1)}}, {"a": ONE, "b": TWO}, f"{TWO} is missing"),
    "no map": ({ONE: {"a": array(1)}}, [], "has no weight_map"),
    "zero3": ({ONE: {"a": array(1), "b": np.zeros(0, np.float32)}}, {"a": ONE, "b": ONE}, "DeepSpeed ZeRO-3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(tmp_path, case):
    files, placed, match = WRONG[case]
    folder = written(tmp_path / "x", files, placed)
    with pytest.raises(ValueError, match=match):
        shards.open_folder(folder)


def test_both_halves_of_the_house_read_through_it(tmp_path):
    """A model to train is read by the reader that merges use: the same shard counts, the same errors."""
    folder = written(tmp_path / "x", {ONE: {"a": array(1)}}, {"a": ONE, "b": TWO})
    llama = {
        "model_type": "llama", "vocab_size": 4, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 8, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(llama))
    with pytest.raises(UserError, match=f"{TWO} is missing"):
        load_hf(folder)


def test_what_is_no_plain_file_is_refused_at_once(tmp_path):
    folder = written(tmp_path / "x", {})
    os.mkfifo(folder / safetensors.SINGLE)
    with pytest.raises(ValueError, match="is no plain file"):
        open_source(str(folder))
