"""bitsandbytes' eight and four bits: each layout written here by its definition, and layers that it stored itself."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from helpers import goldens
from helpers.quantised import check, folder

from jaxmerge.files.checkpoints import safetensors
from jaxmerge.files.checkpoints.bitsandbytes import four_bits
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import Tensor, read
from jaxmerge.files.stream import merge

Q = "model.layers.0.self_attn.q_proj.weight"
R = np.random.default_rng(0)
SAID = {"quant_method": "bitsandbytes", "load_in_4bit": True}
TABLE = np.sort(R.standard_normal(16)).astype(np.float32)


def four(shape, block: int, nested: int = 0, name: str = Q, **state) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tensors of a weight in four bits, and the floats by the formula in float64, element by element."""
    count = int(np.prod(shape))
    blocks = -(-count // block)
    codes = R.integers(0, 16, count)
    padded = np.append(codes, [0] * (count % 2))
    said = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    arrays = {name: (padded[0::2] * 16 + padded[1::2]).astype(np.uint8)[:, None], f"{name}.quant_map": TABLE}
    if nested:
        coded, table = R.integers(0, 256, blocks).astype(np.uint8), R.random(256).astype(np.float32)
        largest = R.random(-(-blocks // nested)).astype(np.float32)
        arrays |= {f"{name}.absmax": coded, f"{name}.nested_absmax": largest, f"{name}.nested_quant_map": table}
        said |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.25}
        scales = [float(table[coded[j]]) * float(largest[j // nested]) + 0.25 for j in range(blocks)]
    else:
        arrays[f"{name}.absmax"] = R.random(blocks).astype(np.float32)
        scales = arrays[f"{name}.absmax"].astype(np.float64)
    text = json.dumps(said | state).encode()
    arrays[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    return arrays, np.array([float(TABLE[codes[k]]) * scales[k // block] for k in range(count)]).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "block", "nested"),
    [((8, 64), 64, 0), ((6, 24), 32, 0), ((5, 7), 4, 0), ((6, 40), 32, 3), ((2, 3, 5), 4, 2), ((3, 3), 64, 256)],
)
def test_four_bits(tmp_path, shape, block, nested):
    """Blocks run over the ends of rows, and the last one may be short."""
    arrays, wanted = four(shape, block, nested)
    check(folder(tmp_path / "a", arrays, SAID), {Q: wanted})


def test_codes_may_be_stored_as_floats(tmp_path):
    arrays, wanted = four((8, 64), 64, 2)
    arrays[Q] = arrays[Q].reshape(-1).view(ml_dtypes.bfloat16)[:, None]
    check(folder(tmp_path / "a", arrays, SAID), {Q: wanted})


def eight(shape, name: str = Q) -> tuple[dict[str, np.ndarray], np.ndarray]:
    codes, largest = R.integers(-127, 128, shape).astype(np.int8), (R.random(shape[0]) + 0.5).astype(np.float32)
    module = name.removesuffix("weight")
    arrays = {name: codes, f"{module}SCB": largest, f"{module}weight_format": np.array(0, np.uint8)}
    return arrays, codes.astype(np.float64) * (largest.astype(np.float64) / 127)[:, None]


def test_eight_bits(tmp_path):
    arrays, wanted = eight((6, 5))
    check(folder(tmp_path / "a", arrays, {"quant_method": "bitsandbytes", "load_in_8bit": True}), {Q: wanted})


@pytest.mark.parametrize("make", [eight, lambda shape, name: four(shape, 32, 0, name)])
def test_a_conv1d_is_turned_back(tmp_path, make):
    name = "h.0.attn.c_attn.weight"
    arrays, wanted = make((8, 8), name=name)
    check(folder(tmp_path / "a", arrays, SAID, model_type="gpt2"), {name: wanted.T})


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nested", "stored as bfloat16", "int8"])
def test_layers_that_bitsandbytes_stored(tmp_path, kind):
    with np.load(pathlib.Path(goldens.__file__).parent / "bitsandbytes.npz") as stored:
        found = {name.partition("/")[2]: stored[name] for name in stored if name.startswith(f"{kind}/")}
    wanted = found.pop("floats")
    module = Q.removesuffix("weight")
    path = folder(tmp_path / "a", {module + name: array for name, array in found.items()}, SAID)
    made = read(open_source(str(path)).tensors[Q])
    assert np.abs(made - wanted).max() <= 2**-22 * np.abs(wanted).max()
    assert kind in ("nested", "stored as bfloat16", "int8") or np.array_equal(made, wanted)


def changed(case: str) -> dict[str, np.ndarray]:
    arrays, _ = eight((6, 5)) if case in ("order", "rows", "floats") else four((6, 40), 32, 3)
    module = Q.removesuffix("weight")
    state = f"{Q}.quant_state.bitsandbytes__nf4"
    if case == "order":
        arrays[f"{module}weight_format"] = np.array(1, np.uint8)
    elif case == "rows":
        arrays[f"{module}SCB"] = np.ones(5, np.float32)
    elif case == "floats":
        arrays[Q] = arrays[Q].astype(np.float32)
    elif case == "json":
        arrays[state] = np.frombuffer(b"{", np.uint8)
    elif case == "shape":
        arrays[state] = np.frombuffer(b'{"shape": [6, 41], "blocksize": 32, "nested_offset": 0.1}', np.uint8)
    elif case == "offset":
        arrays[state] = np.frombuffer(b'{"shape": [6, 40], "blocksize": 32, "nested_offset": NaN}', np.uint8)
    elif case == "block":
        arrays[state] = np.frombuffer(b'{"shape": [6, 40], "blocksize": 0}', np.uint8)
    elif case == "half":
        del arrays[f"{Q}.nested_quant_map"]
    else:
        arrays[f"{Q}.absmax"] = arrays[f"{Q}.absmax"].astype(np.float32)
    return arrays


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("order", r"weight_format is 1, an order of codes"),
        ("rows", r"SCB has shape \[5\] .*int8\[6, 5\]"),
        ("floats", r"float32\[6, 5\], wanted a matrix of int8"),
        ("json", r"bitsandbytes__nf4 is no JSON"),
        ("shape", r"'codes \(bytes\)': 120.* wanted .*123.* for \[6, 41\]"),
        ("offset", r"wanted shape, blocksize"),
        ("block", r"wanted shape, blocksize"),
        ("half", r"not .*nested_quant_map; copy the whole folder"),
        ("scales", r"floats but for codes"),
    ],
)
def test_what_is_refused(tmp_path, case, match):
    with pytest.raises(ValueError, match=match):
        open_source(str(folder(tmp_path / "a", changed(case), SAID)))


def test_a_merge_is_of_the_weights(tmp_path):
    (a, first), (b, second) = four((8, 64), 64, 2), eight((8, 64))
    folder(tmp_path / "a", a, SAID), folder(tmp_path / "b", b, SAID)
    models = "".join(f"- {{model: {tmp_path}/{name}, parameters: {{weight: 0.5}}}}\n" for name in "ab")
    (tmp_path / "r.yaml").write_text(f"merge_method: linear\ndtype: float32\nmodels:\n{models}")
    merge(tmp_path / "r.yaml", tmp_path / "out")
    found = read(open_source(str(tmp_path / "out")).tensors[Q])
    assert np.allclose(found, (first + second) / 2, rtol=0, atol=2**-22)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_shapes_that_are_not_here(tmp_path):
    """A dry run of a hub's model reads headers, and these shapes stand among the data."""
    arrays, _ = four((8, 64), 64)
    file = folder(tmp_path / "a", arrays, SAID) / safetensors.SINGLE
    remote: dict[str, Tensor] = {}
    for name, tensor in safetensors.read_header(file).items():
        remote[name] = dataclasses.replace(tensor, opened=None)
    with pytest.raises(safetensors.NotHere, match="download it before a dry run"):
        four_bits("org/model", remote, {})
