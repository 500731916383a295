"""The format, held to all that it demands; and the one writer of arrays, whatever their layout in memory."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as library
from helpers.goldens.cases import BASE
from helpers.tiny_models import config_of

from jaxmerge.files.checkpoints.safetensors import DTYPES, read_header, write_file
from jaxmerge.files.checkpoints.source import read
from train.models import lora_files
from train.models.config import Lora
from train.models.decoder import init
from train.models.hf import load_hf, named, save_hf
from train.models.lora import init_lora


def raw(path: pathlib.Path, header: object, data: bytes = b"") -> pathlib.Path:
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data)
    return path


def entry(start: int, end: int, shape=None, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


A = json.dumps(entry(0, 4))
WRONG = {
    "a hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "begins at byte"),
    "an overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "begins at byte"),
    "not from the start": ({"a": entry(4, 8)}, 8, "begins at byte"),
    "bytes behind": ({"a": entry(0, 4)}, 6, "2 bytes behind"),
    "cut short": ({"a": entry(0, 8)}, 6, "truncated: tensor 'a'"),
    "a name twice": (f'{{"a": {A}, "a": {A}}}', 4, "'a' stands there twice"),
    "a key twice": ('{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 4, "twice"),
    "a negative size": ({"a": entry(0, 4, [-1])}, 4, "shape"),
    "a fraction": ({"a": entry(0, 4, [1.0])}, 4, "shape"),
    "a truth value": ({"a": entry(0, 4, [True])}, 4, "shape"),
    "backwards": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, 4, "data_offsets"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4, "data_offsets"),
    "another size": ({"a": entry(0, 4, [2])}, 4, "is given 4 bytes"),
    "a dtype unknown": ({"a": entry(0, 4, [1], "F31")}, 4, "has dtype 'F31'"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4, "is described by"),
    "a list": ([1], 0, "is a list"),
    "no JSON": ("{", 0, "unreadable safetensors header"),
    "a deep one": ("[" * 5000, 0, "unreadable safetensors header"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_header_that_the_format_does_not_allow_is_refused(tmp_path, case):
    header, size, match = WRONG[case]
    with pytest.raises(ValueError, match=match):
        read_header(raw(tmp_path / "x.safetensors", header, bytes(size)))


def test_no_more_than_a_length(tmp_path):
    for data in (b"", b"\1", (1 << 40).to_bytes(8, "little")):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(ValueError, match="no whole safetensors file"):
            read_header(tmp_path / "x")


def test_tensors_may_stand_in_any_order_and_be_empty(tmp_path):
    header = {"b": entry(4, 8), "a": entry(0, 4), "none": entry(4, 4), "__metadata__": {"format": "pt"}}
    assert list(read_header(raw(tmp_path / "x", header, bytes(8)))) == ["a", "none", "b"]


def layouts(values: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays [6, 4] that lie in memory in every way that NumPy has."""
    wide = np.zeros((12, 8), values.dtype)
    wide[::2, ::2] = values
    return {
        "plain": values,
        "transposed": np.ascontiguousarray(values.T).T,
        "fortran": np.asfortranarray(values),
        "strided": wide[::2, ::2],
        "backwards": np.ascontiguousarray(values[::-1])[::-1],
        "one": values[:1, :1].reshape(()),
    }


@pytest.mark.parametrize("code", DTYPES)
def test_what_is_written_is_what_is_read(tmp_path, code):
    """Every layout, every dtype: the bytes on disk are the array's elements in C order."""
    dtype = DTYPES[code]
    values = (np.arange(24).reshape(6, 4) % 7).astype(np.float32)
    arrays = layouts(np.exp2(values).astype(dtype) if code == "F8_E8M0" else values.astype(dtype))
    write_file(tmp_path / "x.safetensors", arrays)
    found = read_header(tmp_path / "x.safetensors")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert np.array_equal(read(found[name]), array), name
    if code in ("F64", "F32", "F16", "I64", "U8", "BOOL"):
        theirs = library.load_file(tmp_path / "x.safetensors")
        assert all(np.array_equal(theirs[name], array) for name, array in arrays.items())


def test_jax_arrays_of_another_layout_are_written_as_they_are_indexed(tmp_path):
    from jax.experimental.layout import Format, Layout

    x = jnp.arange(24.0).reshape(6, 4)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    turned = jax.device_put(x, Format(Layout(major_to_minor=(1, 0)), device))
    write_file(tmp_path / "x.safetensors", {"x": turned, "y": x.astype(ml_dtypes.bfloat16)})
    found = read_header(tmp_path / "x.safetensors")
    assert np.array_equal(read(found["x"]), np.asarray(x))
    assert np.array_equal(read(found["y"]), np.asarray(x.astype(ml_dtypes.bfloat16)))


def test_every_writer_of_the_house_makes_arrays_contiguous(tmp_path):
    """Models and adapters whose leaves are transposed views are on disk what they are in memory."""
    config = config_of({**BASE, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    params = init(config, jax.random.key(0))
    views = jax.tree.map(lambda leaf: np.asarray(leaf).T.copy().T if leaf.ndim == 2 else np.asarray(leaf), params)
    save_hf(tmp_path / "model", config, views)
    _, again = load_hf(tmp_path / "model")
    for (name, wanted), (_, found) in zip(named(params), named(again), strict=True):
        assert np.array_equal(wanted, found), name
    lora = Lora(2, 4.0, ("q_proj$",))
    adapter = init_lora(lora, params, jax.random.key(1))
    turned = jax.tree.map(lambda leaf: np.asarray(leaf).T.copy().T, adapter)
    lora_files.save_lora(tmp_path / "lora", lora, turned, params)
    _, read_again = lora_files.load_lora(tmp_path / "lora")
    for (name, wanted), (_, found) in zip(named(adapter), named(read_again), strict=True):
        assert np.array_equal(wanted, found), name
