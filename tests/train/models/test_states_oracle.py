"""Mixtures of experts against mergekit-moe 0.1.5: the same weights bit for bit, and its gates.

Run by hand or in CI on Python 3.11 with the extra `oracle`:
`pytest -m oracle tests/train/models/test_states_oracle.py`.
"""

import pathlib

import ml_dtypes
import numpy as np
import pytest
from helpers import mergekit_moe
from helpers.tiny_experts import HEAD, HEADS, WIDE, recipe, three

from jaxmerge.files import merge
from jaxmerge.files.checkpoints import shards, source
from train.models.states import read_states

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


def ours(out="out"):
    merge("moe.yaml", out, states=read_states)
    return {name: source.read(tensor) for name, tensor in shards.open_folder(pathlib.Path(out))[0].items()}


def is_gate(name):
    return name.endswith(("moe.gate.weight", "mlp.gate.weight", "shared_expert_gate.weight"))


@pytest.mark.parametrize(
    ("kind", "mode", "dtype", "more"),
    [
        ("mistral", "cheap_embed", np.float32, ""),
        ("mistral", "hidden", np.float32, ""),
        ("llama", "cheap_embed", ml_dtypes.bfloat16, ""),
        ("llama", "hidden", np.float32, "dtype: float16\n"),
        ("qwen2", "cheap_embed", np.float32, "dtype: bfloat16\n"),
        ("qwen2", "hidden", np.float32, ""),
        ("llama", "cheap_embed", np.float32, "architecture: qwen\n"),
        ("qwen3", "cheap_embed", np.float32, ""),
        ("qwen3", "hidden", np.float32, ""),
    ],
)
def test_experts_are_equal_bit_for_bit_and_gates_are_near(kind, mode, dtype, more, tmp_path, monkeypatch):
    pytest.importorskip("mergekit")
    monkeypatch.chdir(tmp_path)
    # mergekit makes the biases that a Llama lacks of hidden_size numbers, whatever the size of its heads.
    three(kind, dtype=dtype, heads=HEADS if kind.startswith("qwen") or "qwen" not in more else WIDE // HEAD)
    recipe(mode, shared=kind == "qwen2" or "qwen" in more, more=more)
    mixtral = kind in ("llama", "mistral") and "qwen" not in more
    wanted = mergekit_moe.unstacked(mergekit_moe.run(pathlib.Path("moe.yaml"), "theirs"), mixtral=mixtral)
    found = ours()
    assert set(found) == set(wanted)
    for name, array in found.items():
        assert array.dtype == wanted[name].dtype, name
        if is_gate(name):
            rounding = max(1e-5 if mode == "cheap_embed" else 1e-2, 2 * float(ml_dtypes.finfo(array.dtype).eps))
            error = np.linalg.norm(array.astype(np.float64) - wanted[name].astype(np.float64))
            assert error < rounding * np.linalg.norm(wanted[name].astype(np.float64)), (name, error)
        else:
            np.testing.assert_array_equal(array.view(np.uint8), wanted[name].view(np.uint8), err_msg=name)


def test_a_scale_is_rounded_once_as_theirs(tmp_path, monkeypatch):
    pytest.importorskip("mergekit")
    monkeypatch.chdir(tmp_path)
    three("llama", dtype=ml_dtypes.bfloat16)
    recipe("random")
    wanted = mergekit_moe.unstacked(mergekit_moe.run(pathlib.Path("moe.yaml"), "theirs"), mixtral=True)
    name = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    np.testing.assert_array_equal(ours()[name].view(np.uint16), wanted[name].view(np.uint16))
