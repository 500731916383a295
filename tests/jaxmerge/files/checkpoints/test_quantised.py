"""Quantised checkpoints: each layout packed here by its definition, and read back as float64 says."""

import json

import ml_dtypes
import numpy as np
import pytest
from helpers.quantised import check, folder

from jaxmerge.files.checkpoints import adapter, safetensors
from jaxmerge.files.checkpoints.codes import FP4
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read
from jaxmerge.files.stream import merge

Q = "model.layers.0.self_attn.q_proj"
R = np.random.default_rng(0)


def fp8(shape, dtype=ml_dtypes.float8_e4m3fn) -> np.ndarray:
    return R.standard_normal(shape).astype(np.float32).astype(dtype)


# --- FP8 ---

BLOCK = {"quant_method": "fp8", "weight_block_size": [4, 3]}
CHANNEL = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}


@pytest.mark.parametrize(
    ("ending", "said", "shape", "scale", "repeats"),
    [
        ("_scale_inv", BLOCK, (8, 6), (2, 2), (4, 3)),
        ("_scale_inv", BLOCK, (10, 7), (3, 3), (4, 3)),  # the last blocks are cut short
        ("_scale_inv", BLOCK, (3, 2), (1, 1), (3, 2)),
        ("_scale_inv", BLOCK, (2, 8, 6), (2, 2, 2), (1, 4, 3)),  # experts
        ("_scale_inv", {"quant_method": "fp8"}, (6, 4), (), (6, 4)),
        ("_scale", CHANNEL, (6, 4), (6, 1), (1, 4)),
        ("_scale", CHANNEL, (6, 4), (6,), (1, 4)),
        ("_scale", {"quant_method": "modelopt"}, (6, 4), (1,), (6, 4)),
        ("_scale", {"quant_method": "fbgemm_fp8"}, (6, 4), (6, 1), (1, 4)),
        ("_scale", None, (6, 4), (6, 1), (1, 4)),  # a scale counts even if the config says nothing of it
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_fp8(tmp_path, ending, said, shape, scale, repeats, dtype):
    codes, scales = fp8(shape), (R.random(scale) + 0.5).astype(dtype)
    arrays = {f"{Q}.weight": codes, f"{Q}.weight{ending}": scales, f"{Q}.input_scale": np.ones(1, np.float32)}
    grid = scales.astype(np.float64).reshape(scale if len(scale) == len(shape) else (-1,) + (1,) * (len(shape) - 1))
    for axis, times in enumerate(repeats):
        grid = np.repeat(grid, times, axis)
    grid = grid[tuple(slice(length) for length in shape)]
    check(folder(tmp_path / "a", arrays, said), {f"{Q}.weight": codes.astype(np.float64) * grid})


@pytest.mark.parametrize("stored", [np.uint8, ml_dtypes.float8_e8m0fnu])
def test_scales_that_are_powers_of_two(tmp_path, stored):
    codes, bits = fp8((8, 6)), R.integers(120, 133, (2, 2)).astype(np.uint8)
    arrays = {f"{Q}.weight": codes, f"{Q}.weight_scale_inv": bits.view(stored)}
    grid = np.repeat(np.repeat(2.0 ** (bits.astype(np.float64) - 127), 4, 0), 3, 1)
    check(folder(tmp_path / "a", arrays, BLOCK), {f"{Q}.weight": codes.astype(np.float64) * grid})


def test_int8_with_zero_points(tmp_path):
    codes = R.integers(-128, 128, (6, 4)).astype(np.int8)
    scales, zeros = (R.random((6, 1)) + 0.5).astype(np.float32), R.integers(-9, 9, (6, 1)).astype(np.int8)
    arrays = {f"{Q}.weight": codes, f"{Q}.weight_scale": scales, f"{Q}.weight_zero_point": zeros}
    wanted = (codes.astype(np.float64) - zeros) * scales.astype(np.float64)
    check(folder(tmp_path / "a", arrays, {**CHANNEL, "format": "int-quantized"}), {f"{Q}.weight": wanted})


# --- GPTQ and AWQ ---


def pack(codes: np.ndarray, bits: int, axis: int, order=None) -> np.ndarray:
    """Words of 32 bits of codes along an axis: code k at bit `bits`·k, or where `order` says."""
    codes = np.moveaxis(codes, axis, -1).astype(np.uint64)
    groups = codes.reshape(*codes.shape[:-1], -1, 32 // bits)
    words = np.zeros(groups.shape[:-1], np.uint64)
    for k in range(32 // bits):
        words |= groups[..., (order or range(32 // bits))[k]] << np.uint64(bits * k)
    return np.moveaxis(words, -1, axis).astype(np.uint32).view(np.int32)


def gptq(bits: int, v2: bool, g_idx: np.ndarray | None, groups: int = 4) -> tuple[dict[str, np.ndarray], np.ndarray]:
    inputs, outputs = 64, 16
    codes = R.integers(0, 2**bits, (inputs, outputs))
    zeros = R.integers(0 if v2 else 1, 2**bits, (groups, outputs))
    scales = (R.random((groups, outputs)) + 0.5).astype(np.float16)
    at = np.arange(inputs) // (inputs // groups) if g_idx is None else g_idx
    arrays = {
        f"{Q}.qweight": pack(codes, bits, 0),
        f"{Q}.qzeros": pack(zeros if v2 else zeros - 1, bits, 1),
        f"{Q}.scales": scales,
    } | ({} if g_idx is None else {f"{Q}.g_idx": g_idx.astype(np.int32)})
    return arrays, (scales.astype(np.float64)[at] * (codes - zeros[at])).T


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_gptq(tmp_path, bits, v2, ordered):
    arrays, wanted = gptq(bits, v2, R.permutation(np.arange(64) // 16) if ordered else None)
    said = {"quant_method": "gptq", "bits": bits, "group_size": 16, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    check(folder(tmp_path / "a", arrays, said), {f"{Q}.weight": wanted})


def test_gptq_of_one_group_of_a_conv1d_stays_in_by_out(tmp_path):
    arrays, wanted = gptq(4, False, None, groups=1)
    arrays = {name.replace(Q, "h.0.attn.c_attn"): array for name, array in arrays.items()}
    path = folder(tmp_path / "a", arrays, {"quant_method": "gptq", "bits": 4}, model_type="gpt2")
    check(path, {"h.0.attn.c_attn.weight": wanted.T})


def test_awq(tmp_path):
    inputs, outputs, groups = 16, 24, 2
    codes, zeros = R.integers(0, 16, (inputs, outputs)), R.integers(0, 16, (groups, outputs))
    scales = (R.random((groups, outputs)) + 0.5).astype(np.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    arrays = {f"{Q}.qweight": pack(codes, 4, 1, order), f"{Q}.qzeros": pack(zeros, 4, 1, order), f"{Q}.scales": scales}
    at = np.arange(inputs) // 8
    wanted = (scales.astype(np.float64)[at] * (codes - zeros[at])).T
    said = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}
    check(folder(tmp_path / "a", arrays, said), {f"{Q}.weight": wanted})


# --- MXFP4 ---


def mxfp4(name: str = "model.layers.0.mlp.experts.gate_up_proj") -> tuple[dict[str, np.ndarray], np.ndarray]:
    codes, bits = R.integers(0, 256, (2, 6, 3, 16)).astype(np.uint8), R.integers(120, 130, (2, 6, 3)).astype(np.uint8)
    values = np.empty((2, 6, 3, 32))
    values[..., 0::2], values[..., 1::2] = FP4.astype(np.float64)[codes % 16], FP4.astype(np.float64)[codes // 16]
    wanted = (values * 2.0 ** (bits.astype(np.float64) - 127)[..., None]).reshape(2, 6, 96).transpose(0, 2, 1)
    return {f"{name}_blocks": codes, f"{name}_scales": bits}, wanted


def test_mxfp4(tmp_path):
    arrays, wanted = mxfp4()
    bias = np.ones((2, 6), ml_dtypes.bfloat16)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    path = folder(tmp_path / "a", arrays, {"quant_method": "mxfp4"}, model_type="gpt_oss")
    check(path, {name: wanted})
    (path / safetensors.SINGLE).unlink()
    safetensors.write_file(path / safetensors.SINGLE, {**arrays, f"{name}_bias": bias})
    assert set(open_source(str(path)).tensors) == {name, f"{name}_bias"}


@pytest.mark.torch
def test_mxfp4_is_what_transformers_makes_of_it(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    arrays, wanted = mxfp4()
    theirs = convert_moe_packed_tensors(*map(torch.from_numpy, arrays.values()), dtype=torch.float32)
    assert np.array_equal(theirs.numpy(), wanted.astype(np.float32))


# --- what is refused, and what follows ---

BYTES = {f"{Q}.weight": R.integers(0, 255, (8, 1)).astype(np.uint8)}
WRONG = {
    "bnb4": ({**BYTES, f"{Q}.weight.absmax": np.ones(2, np.float32)}, {"quant_method": "bitsandbytes"}, "of bits"),
    "bnb8 unsaid": ({f"{Q}.weight": BYTES[f"{Q}.weight"], f"{Q}.SCB": np.ones(8, np.float32)}, None, r"SCB .*uint8"),
    "nvfp4": (
        {**BYTES, f"{Q}.weight_scale_2": np.ones(1, np.float32)}, {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "codes of modelopt, NVFP4",
    ),
    "packed": ({f"{Q}.weight_packed": np.ones((2, 2), np.int32)}, CHANNEL, "weight_packed"),
    "no scale": ({f"{Q}.weight": fp8((4, 4))}, BLOCK, "stored as float8_e4m3fn codes"),
    "3 bits": (gptq(4, False, None)[0], {"quant_method": "gptq", "bits": 3}, "3 bits"),
    "marlin": (
        gptq(4, False, None)[0], {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'",
    ),
    "no words": (gptq(4, False, None)[0], None, "quant_method None"),
    "grid": ({f"{Q}.weight": fp8((8, 6)), f"{Q}.weight_scale": np.ones((3, 5), np.float32)}, CHANNEL, "no scale of"),
    "half": ({f"{Q}.qweight": np.zeros((8, 16), np.int32)}, {"quant_method": "gptq", "bits": 4}, r"no .*qzeros"),
    "mxfp4 elsewhere": (mxfp4()[0], {"quant_method": "mxfp4"}, "another model"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(tmp_path, case):
    arrays, said, match = WRONG[case]
    with pytest.raises(ValueError, match=match):
        open_source(str(folder(tmp_path / "a", arrays, said)))


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_merge_is_of_the_weights_and_drops_the_stale_config(tmp_path, dtype):
    wanted = 0.0
    for name, size in (("a", 1.0), ("b", 0.05)):
        codes, scale = fp8((8, 8)), np.float32(size * 0.3)
        arrays = {f"{Q}.weight": codes, f"{Q}.weight_scale_inv": np.array([[scale]])}
        folder(tmp_path / name, arrays, {"quant_method": "fp8", "weight_block_size": [128, 128]})
        wanted = wanted + 0.5 * codes.astype(np.float64) * np.float64(scale)
    text = f"merge_method: linear\nmodels:\n- {{model: {tmp_path}/a, parameters: {{weight: 1}}}}\n"
    text += f"- {{model: {tmp_path}/b, parameters: {{weight: 1}}}}\n" + (f"dtype: {dtype}\n" if dtype else "")
    (tmp_path / "r.yaml").write_text(text)
    report = merge(tmp_path / "r.yaml", tmp_path / "out")
    assert any("dequantised" in note for note in report["notes"])
    tensor = open_source(str(tmp_path / "out")).tensors[f"{Q}.weight"]
    assert tensor.dtype == np.dtype(dtype or ml_dtypes.bfloat16)
    error = np.abs(read(tensor).astype(np.float64) - wanted).max() / np.abs(wanted).max()
    assert error < (2**-23 if dtype else 2**-8)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config


def test_an_adapter_on_quantised_weights(tmp_path):
    codes = fp8((8, 8))
    arrays = {f"{Q}.weight": codes, f"{Q}.weight_scale_inv": np.full((1, 1), 0.05, np.float32)}
    base = folder(tmp_path / "a", arrays, {"quant_method": "fp8"})
    a, b = (R.standard_normal(s).astype(np.float32) for s in ((2, 8), (8, 2)))
    (tmp_path / "lora").mkdir()
    factors = {f"base_model.model.{Q}.lora_A.weight": a, f"base_model.model.{Q}.lora_B.weight": b}
    safetensors.write_file(tmp_path / "lora" / adapter.WEIGHTS, factors)
    (tmp_path / "lora" / adapter.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    found = read(open_source(f"{base}+{tmp_path}/lora").tensors[f"{Q}.weight"])
    wanted = codes.astype(np.float64) * np.float64(np.float32(0.05)) + b.astype(np.float64) @ a
    assert np.allclose(found, wanted, rtol=0, atol=4e-6)
