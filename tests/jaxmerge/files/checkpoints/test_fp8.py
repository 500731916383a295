"""FP8 folders: rounding, what is stored as codes, what is read back, and what transformers reads."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from helpers import llamas
from safetensors.numpy import load_file

from jaxmerge.files import merge
from jaxmerge.files.checkpoints import fp8
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.safetensors import read_header
from jaxmerge.files.checkpoints.source import read
from jaxmerge.files.verify import verify

WIDE, MLP = 96, 384  # one tile that is cut short, and three
CONFIG = {"hidden_size": WIDE, "intermediate_size": MLP, "num_attention_heads": 4, "num_key_value_heads": 4,
          "max_position_embeddings": 64, "vocab_size": llamas.VOCABULARY}  # fmt: skip
RECIPE = {"merge_method": "interpolate", "models": [{"model": "one"}, {"model": "two"}], "parameters": {"t": 0.4}}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llamas, "WIDE", WIDE)
    monkeypatch.setattr(llamas, "MLP", MLP)
    for seed, name in enumerate(("one", "two")):
        arrays = llamas.tensors(seed, layers=2)
        # Rows and columns of unlike size, so that one scale for a tensor would lose most of them.
        arrays = {n: a * np.float32(4.0) ** np.arange(-8, 8).repeat(24)[: len(a), None] if a.ndim == 2 else a
                  for n, a in arrays.items()}  # fmt: skip
        llamas.folder(name, {n: a.astype(np.float32) for n, a in arrays.items()}, layers=2, **CONFIG)
    return tmp_path


def within_rounding(found, wanted):
    """Half a step of e4m3: a sixteenth of the number, or half of the smallest code, 2⁻⁹, times the tile's scale."""
    scales = fp8.spread(fp8.quantise(wanted)[1], wanted.shape)
    assert (np.abs(found - wanted) <= np.maximum(np.abs(wanted) / 16, scales * 2.0**-10) * (1 + 1e-6)).all()


def test_codes_are_within_the_rounding_of_their_tile():
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((300, 200)) * 10.0 ** rng.integers(-4, 4, (300, 1))).astype(np.float32)
    matrix[:128, 128:] = 0  # a tile of zeros
    matrix[128:256, :128] = 1e-44  # one whose scale would be no normal number
    codes, scales = fp8.quantise(matrix)
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (fp8.CODES, (300, 200), np.float32, (3, 2))
    assert scales[0, 1] == 1
    for i in range(3):
        for j in range(2):
            tile = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            wanted = matrix[tile] / scales[i, j].astype(np.float64)
            np.testing.assert_array_equal(codes[tile], wanted.astype(np.float32).astype(ml_dtypes.float8_e4m3fn))
            assert np.abs(codes[tile].astype(np.float32)).max() in (0, 448)
    within_rounding(fp8.rounded(matrix), matrix)


@pytest.mark.parametrize(
    ("name", "is_stored"),
    [("model.layers.0.self_attn.q_proj.weight", True), ("model.layers.3.mlp.experts.7.w1.weight", True),
     ("model.layers.3.mlp.gate.weight", False), ("model.layers.3.mlp.shared_expert_gate.weight", False),
     ("model.layers.3.mlp.shared_expert.gate_proj.weight", True), ("model.embed_tokens.weight", False),
     ("lm_head.weight", False), ("model.layers.0.self_attn.q_proj.bias", False), ("h.0.attn.c_attn.weight", False),
     ("vision.blocks.0.pos_embed.weight", False)],
)  # fmt: skip
def test_which_matrices_are_stored_as_codes(name, is_stored):
    config = {"model_type": "gpt2"} if name.startswith("h.") else {}
    assert fp8.is_stored(name, np.dtype(np.float32), (8, 256), config) == is_stored
    assert not fp8.is_stored(name, np.dtype(np.float32), (8, 264), config)  # transformers would take 3 tiles of 88
    assert not fp8.is_stored(name, np.dtype(np.int8), (8, 256), config)


def test_a_merge_as_fp8_is_the_merge_within_rounding(here):
    plain = merge(RECIPE, "plain")
    planned = merge(RECIPE, "out", format="fp8", dry_run=True)
    made = merge(RECIPE, "out", format="fp8", max_shard_bytes=200_000)
    assert planned["bytes_out"] < 0.3 * plain["bytes_out"]
    assert not pathlib.Path(".out.stages").exists()
    merged = load_file("plain/model.safetensors")
    stored = {
        name: t for file in sorted(pathlib.Path("out").glob("*.safetensors")) for name, t in read_header(file).items()
    }
    codes = [name for name, tensor in stored.items() if tensor.dtype == fp8.CODES]
    assert len(codes) == 14
    assert set(stored) == set(merged) | {name + "_scale_inv" for name in codes}
    assert len(made["files"]) > 1
    opened = open_source("out")
    assert set(opened.tensors) == set(merged)
    for name, wanted in merged.items():
        found = read(opened.tensors[name])
        if name in codes:
            np.testing.assert_array_equal(found, fp8.rounded(wanted))
            within_rounding(found, wanted)
        else:
            np.testing.assert_array_equal(found, wanted)
    said = json.loads(pathlib.Path("out/config.json").read_text())["quantization_config"]
    assert said["weight_block_size"] == [128, 128]
    assert {"lm_head", "model.embed_tokens"} <= set(said["modules_to_not_convert"])
    assert json.loads(pathlib.Path("out/merge.json").read_text())["format"] == "fp8"
    assert "out is there already" in merge(RECIPE, "out", format="fp8", max_shard_bytes=200_000)["notes"][-1]


def test_verify_replays_the_rounding_too(here):
    merge(RECIPE, "out", format="fp8")
    assert verify("out")["code"] == 0
    found = open_source("one")
    file = pathlib.Path("out/model.safetensors")
    place = read_header(file)["model.layers.1.mlp.up_proj.weight"]
    other = fp8.quantise(read(found.tensors["model.layers.1.mlp.up_proj.weight"]))[0]
    data = bytearray(file.read_bytes())
    data[place.offset : place.offset + place.size] = other.tobytes()
    file.write_bytes(data)
    report = verify("out")
    assert (report["code"], [verdict.tensor for verdict in report["wrong"]]) == (
        1,
        ["model.layers.1.mlp.up_proj.weight"],
    )


def test_merging_fp8_again_gives_floats_again(here):
    merge(RECIPE, "out", format="fp8")
    again = {"merge_method": "passthrough", "models": [{"model": "out"}]}
    merge(again, "again")
    assert "quantization_config" not in json.loads(pathlib.Path("again/config.json").read_text())
    opened = open_source("out")
    for name, array in load_file("again/model.safetensors").items():
        np.testing.assert_array_equal(array, read(opened.tensors[name]))


def test_what_is_refused(here):
    with pytest.raises(ValueError, match=r"format='int8', wanted one of safetensors, orbax, fp8, gguf; .*no int8"):
        merge(RECIPE, "out", format="int8")
    with pytest.raises(ValueError, match=r"format='gguf': the decoder of the extra 'train' writes it: .*\[train\]"):
        merge(RECIPE, "out", format="gguf")
    shapes = {"model.layers.0.q_proj.weight": (576, 576), "model.layers.0.o_proj.weight": (576, 576)}
    tensors = {name: (np.dtype(np.float32), shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"whose sizes 128 divides; model\.layers\.0\.q_proj\.weight is \[576, 576\]"):
        fp8.check(tensors, {"model_type": "llama"})
    tensors["model.layers.0.up_proj.weight"] = (np.dtype(np.float32), (512, 512))
    assert fp8.check(tensors, {"model_type": "llama"}) == [
        "2 matrices whose sizes 128 does not divide stay as they are: "
        "model.layers.0.q_proj.weight, model.layers.0.o_proj.weight"
    ]
    kept = fp8.described({}, tensors)["quantization_config"]["modules_to_not_convert"]
    assert kept == ["model.layers.0.q_proj", "model.layers.0.o_proj", "lm_head"]
    pathlib.Path("one/config.json").unlink()
    with pytest.raises(ValueError, match=r"the result has no config\.json, which says how codes are read"):
        merge(RECIPE, "out", format="fp8", dry_run=True)
    assert not list(here.glob("*out*"))


@pytest.mark.torch
def test_transformers_reads_the_same_numbers(here):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    merge({**RECIPE, "dtype": "float32"}, "out", format="fp8")
    how = transformers.FineGrainedFP8Config(dequantize=True)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        "out", quantization_config=how, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    state, opened = model.state_dict(), open_source("out")
    for name, tensor in opened.tensors.items():
        np.testing.assert_array_equal(state[name].to(torch.float32).numpy(), read(tensor), err_msg=name)
