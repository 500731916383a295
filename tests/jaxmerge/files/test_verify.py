"""`verify`: what a folder is, compared with what its recipe makes; and one checkpoint described from its headers."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

from jaxmerge.files import merge, verify
from jaxmerge.files.checkpoints import adapter, safetensors
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read
from jaxmerge.files.inspect.contents import contents, describe
from jaxmerge.files.verdict import Unsure, as_json, table

Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
SHAPES = {"model.embed_tokens.weight": (30, 8), Q: (8, 8), UP: (12, 8), "model.norm.weight": (8,)}


def tensors(seed: int, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def folder(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> pathlib.Path:
    path.mkdir(exist_ok=True)
    (path / safetensors.SINGLE).unlink(missing_ok=True)
    safetensors.write_file(path / safetensors.SINGLE, arrays)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    return path


def changed(out: pathlib.Path, name: str, change) -> None:
    """Write the folder again with one tensor changed."""
    arrays = {n: read(t) for n, t in open_source(str(out)).tensors.items()}
    for new, array in change(arrays.pop(name)).items():
        arrays[new] = array
    folder(out, arrays)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "one", "two")):
        folder(tmp_path / name, tensors(seed))
    return tmp_path


PAIR = "models: [{model: one}, {model: two}]\n"
TASK = f"merge_method: task_arithmetic\nbase_model: base\n{PAIR}parameters: {{weight: 0.4}}\n"
RECIPES = {
    "task_arithmetic": TASK,
    "ties": TASK.replace("task_arithmetic", "ties").replace("0.4", "0.4, density: 0.5"),
    "dare_ties": TASK.replace("task_arithmetic", "dare_ties").replace("0.4", "0.4, density: 0.5") + "seed: 7\n",
    "linear bf16": f"merge_method: linear\n{PAIR}parameters: {{weight: 1}}\ndtype: bfloat16\n",
    "slerp": "merge_method: slerp\nbase_model: base\nmodels: [{model: base}, {model: one}]\nparameters: {t: 0.3}\n",
    "passthrough": "merge_method: passthrough\nmodels: [{model: one}]\n",
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_what_a_recipe_made_is_right(here, case):
    pathlib.Path("r.yaml").write_text(RECIPES[case])
    merge("r.yaml", "out")
    for everything in (False, True):
        report = verify.verify("out", everything=everything)
        assert (report["code"], report["tensors"], report["wrong"]) == (0, {"right": 4}, [])
    assert verify.verify("out", of="r.yaml")["code"] == 0


WRONG = {
    "not applied": lambda g, r, w: r,
    "wrong strength": lambda g, r, w: r + 0.5 * (w - r),
    "transposed": lambda g, r, w: w.T,
    "different": lambda g, r, w: g + np.random.default_rng(5).standard_normal(g.shape).astype(g.dtype),
}


@pytest.mark.parametrize("verdict", WRONG)
def test_a_tensor_that_is_not_what_the_recipe_says_is_named(here, verdict):
    pathlib.Path("r.yaml").write_text(TASK)
    merge("r.yaml", "out")
    base = read(open_source("base").tensors[Q])
    changed(here / "out", Q, lambda g: {Q: WRONG[verdict](g, base, g)})
    report = verify.verify("out", of="r.yaml")
    assert (report["code"], report["tensors"]) == (1, {"right": 3, verdict: 1})
    (wrong,) = report["wrong"]
    assert (wrong.tensor, wrong.verdict) == (Q, verdict)
    if verdict == "wrong strength":
        assert wrong.strength == pytest.approx(0.5, abs=1e-3)
    assert f"{verdict}: {Q}" in table(report)
    assert json.loads(as_json(report))["wrong"][0]["tensor"] == Q


def test_another_prefix_and_a_wrong_shape(here):
    pathlib.Path("r.yaml").write_text(TASK)
    merge("r.yaml", "out")
    other = Q.replace("model.", "model.language_model.")
    changed(here / "out", Q, lambda g: {other: g})
    changed(here / "out", UP, lambda g: {UP: g.T})
    report = verify.verify("out", of="r.yaml")
    said = {wrong.tensor: wrong for wrong in report["wrong"]}
    assert said[Q].verdict == "missing"
    assert other in said[Q].detail
    assert report["extra"] == [other]
    assert said[UP].verdict == "transposed"


def lora(path: pathlib.Path) -> tuple[np.ndarray, pathlib.Path]:
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 8), (8, 2)))
    path.mkdir()
    module = f"base_model.model.{Q.removesuffix('.weight')}"
    safetensors.write_file(path / adapter.WEIGHTS, {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b})
    (path / adapter.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return 2 * b @ a, path


@pytest.mark.parametrize(
    ("share", "verdict"), [(1.0, "right"), (0.0, "not applied"), (2.0, "wrong strength"), (None, "transposed")]
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_an_adapter_that_somebody_else_merged(here, share, verdict, dtype):
    delta, path = lora(here / "lora")
    folder(here / "base", tensors(0, dtype))
    arrays = tensors(0, dtype)
    moved = delta.T if share is None else share * delta
    arrays[Q] = (arrays[Q].astype(np.float32) + moved).astype(dtype)
    folder(here / "out", arrays)
    report = verify.verify("out", of=f"base+{path}")
    assert report["tensors"] == ({"right": 4} if verdict == "right" else {"right": 3, verdict: 1})


def test_what_cannot_be_told_and_what_cannot_be_read(here):
    with pytest.raises(Unsure, match=r"has neither merge\.json nor mergekit_config\.yml"):
        verify.verify("one")
    pathlib.Path("one/mergekit_config.yml").write_text("merge_method: linear\nmodels: [{model: gone}]\n")
    with pytest.raises(Unsure, match="'gone' is no folder"):
        verify.verify("one")
    with pytest.raises(ValueError, match="no folder or file here"):
        verify.verify("nowhere")


def test_a_folder_of_mergekits_is_compared_with_its_own_recipe(here):
    folder(here / "out", {n: (t + tensors(2)[n]) / 2 for n, t in tensors(1).items()})
    pathlib.Path("out/mergekit_config.yml").write_text(f"merge_method: linear\n{PAIR}parameters: {{weight: 1}}\n")
    assert verify.verify("out")["code"] == 0
    pathlib.Path("out/mergekit_config.yml").write_text(RECIPES["dare_ties"].replace("seed: 7\n", ""))
    report = verify.verify("out")  # its masks are drawn from another generator
    assert (report["code"], len(report["skipped"])) == (2, 4)


def test_masks_of_an_earlier_generator_cannot_be_told(here):
    pathlib.Path("r.yaml").write_text(RECIPES["dare_ties"])
    merge("r.yaml", "out")
    assert verify.verify("out")["code"] == 0
    path = pathlib.Path("out/merge.json")
    record = json.loads(path.read_text())
    del record["versions"]["masks"]
    path.write_text(json.dumps(record))
    report = verify.verify("out")
    assert (report["code"], len(report["skipped"])) == (2, 4)


def test_the_command_exits_with_what_it_found(here, capsys):
    from train.cli.__main__ import main

    pathlib.Path("r.yaml").write_text(TASK)
    merge("r.yaml", "out")
    assert main(["verify", "out", "json=found.json"]) == 0
    assert json.loads(pathlib.Path("found.json").read_text())["tensors"] == {"right": 4}
    changed(here / "out", Q, lambda g: {Q: g + 1})
    assert main(["verify", "out"]) == 1
    assert main(["verify", "one"]) == 2
    pathlib.Path("out/model.safetensors").write_bytes(b"no")
    assert main(["verify", "out"]) == 3
    assert "cannot tell" in capsys.readouterr().out


# --- one checkpoint alone ---


def test_one_checkpoint_is_described_from_its_headers(here, capsys):
    arrays = {f"model.layers.{l}.w.weight": np.ones((4, 4), ml_dtypes.bfloat16) for l in range(12)}
    folder(here / "many", arrays | {"model.embed_tokens.weight": np.ones((10, 4), np.float32)})
    found = describe(open_source("many"))
    assert (found["tensors"], found["parameters"], found["bytes"]) == (13, 12 * 16 + 40, 12 * 32 + 160)
    assert found["dtypes"] == {"bfloat16": 192, "float32": 40}
    assert found["layers"]["model.layers.3"] == {
        "tensors": 1, "parameters": 16, "bytes": 32, "dtypes": {"bfloat16": 16},
    }  # fmt: skip
    text = contents(found)
    assert "232 parameters" in text
    assert "model.layers.0–11" in text
    from train.cli.__main__ import main

    assert main(["inspect", "many", "json=found.json"]) == 0
    assert json.loads(pathlib.Path("found.json").read_text()) == found
    assert main(["inspect", "many", "picture=p.svg"]) == 2
    file = here / "many/model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert main(["inspect", "many"]) == 2
    assert "is truncated" in capsys.readouterr().err
