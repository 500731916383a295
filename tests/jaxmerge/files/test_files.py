"""Merging on disk: the law that it equals merging in memory, round trips, and what is refused."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import jaxmerge
from jaxmerge.files import journal, merge
from jaxmerge.files.checkpoints import safetensors, shards
from jaxmerge.files.checkpoints.source import read
from jaxmerge.files.methods import METHODS

NAMES = {
    "model.embed_tokens.weight": (16, 6),
    **{f"model.layers.{l}.mlp.up_proj.weight": (8, 6) for l in range(3)},
    **{f"model.layers.{l}.self_attn.q_proj.weight": (6, 6) for l in range(3)},
    "model.norm.weight": (6,),
    "lm_head.weight": (16, 6),
}


def tensors(seed, dtype: type = np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in NAMES.items()}


def folder(path, arrays, shards=1, **config):
    path.mkdir()
    names = list(arrays)
    if shards == 1:
        save_file(arrays, path / "model.safetensors")
    else:
        placed = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {name: arrays[name] for name in names[i::shards]}
            save_file(part, path / file)
            placed |= dict.fromkeys(part, file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32", **config}))
    (path / "tokenizer.json").write_text("{}")
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["base", "one", "two"]):
        folder(tmp_path / name, tensors(i), shards=i + 1)
    return tmp_path


def write(text, name="recipe.yaml"):
    pathlib.Path(name).write_text(text)
    return name


def load(path):
    return {name: read(stored) for name, stored in shards.open_folder(pathlib.Path(path))[0].items()}


def in_memory(path, dtype=None):
    tree = {name.replace(".", "/"): jnp.asarray(array) for name, array in load(path).items()}
    return tree if dtype is None else jaxmerge.cast(tree, dtype)


def same(out, tree):
    found = load(out)
    assert {name.replace(".", "/") for name in found} == set(tree)
    for name, array in found.items():
        wanted = np.asarray(tree[name.replace(".", "/")])
        assert array.dtype == wanted.dtype
        assert np.array_equal(array.view(np.uint8), wanted.view(np.uint8)), name


MODELS = "models:\n  - {model: one, parameters: {%s}}\n  - {model: two, parameters: {%s}}\n"
CASES = {
    "linear": (MODELS % ("weight: 0.3", "weight: 0.9"), {"weights": [0.3, 0.9]}),
    "task_arithmetic": (
        "base_model: base\nparameters: {lambda: 0.7}\n" + MODELS % ("weight: 0.3", "weight: 0.9"),
        {"weights": [0.3, 0.9], "scale": 0.7},
    ),
    "dare_linear": (
        "base_model: base\nseed: 5\n" + MODELS % ("weight: 0.3, density: 0.5", "weight: 0.9, density: 0.7"),
        {"weights": [0.3, 0.9], "density": [0.5, 0.7], "rescale": "l1", "key": 5, "names": ["one", "two"]},
    ),
    "slerp": ("base_model: two\nmodels: [{model: one}, {model: two}]\nparameters: {t: 0.2}\n", {"t": 0.2}),
    "nuslerp": (MODELS % ("weight: 0.3", "weight: 0.9"), {"weights": [0.3, 0.9]}),
    "multislerp": ("base_model: base\n" + MODELS % ("weight: 0.3", "weight: 0.9"), {"weights": [0.3, 0.9]}),
    "karcher": ("models: [{model: one}, {model: two}]\nparameters: {max_iter: 3}\n", {"max_iter": 3}),
    "ties": (
        "base_model: base\nparameters: {lambda: 0.7, density: 0.4, int8_mask: true}\n"
        "models:\n  - model: base\n  - {model: one, parameters: {weight: 0.3}}\n"
        "  - {model: two, parameters: {weight: 0.9, density: 0.6}}\n",
        {"weights": [0.3, 0.9], "density": [0.4, 0.6], "scale": 0.7},
    ),
    "dare_ties": (
        "base_model: base\nparameters: {density: 0.4}\n" + MODELS % ("weight: 0.3", "weight: 0.9"),
        {"weights": [0.3, 0.9], "density": 0.4, "rescale": "l1", "key": 0, "names": ["one", "two"]},
    ),
    "della": (
        "base_model: base\nparameters: {density: 0.4, epsilon: 0.1, rescale: false}\n"
        + MODELS % ("weight: 0.3", "weight: 0.9"),
        {"weights": [0.3, 0.9], "density": 0.4, "epsilon": 0.1, "rescale": None, "key": 0, "names": ["one", "two"]},
    ),
    "breadcrumbs": (
        "base_model: base\nparameters: {density: 0.4}\n" + MODELS % ("weight: 0.3", "weight: 0.9"),
        {"weights": [0.3, 0.9], "density": 0.4},
    ),
    "sce": (
        "base_model: base\nmodels: [{model: one}, {model: two}]\nparameters: {select_topk: 0.4}\n",
        {"select_topk": 0.4},
    ),
    "model_stock": (
        "base_model: base\nmodels: [{model: one}, {model: two}]\nparameters: {filter_wise: true}\n",
        {"filter_wise": True},
    ),
    "arcee_fusion": ("base_model: base\nmodels: [{model: one}]\n", {}),
    "nearswap": ("base_model: base\nmodels: [{model: one}]\nparameters: {t: 0.01}\n", {"t": 0.01}),
    "ram": ("base_model: base\nmodels: [{model: one}, {model: two}]\nparameters: {epsilon: 0.5}\n", {"epsilon": 0.5}),
    "passthrough": ("models: [{model: one, parameters: {scale: 0.5}}]\n", {"scale": 0.5}),
    "interpolate": ("models: [{model: one}, {model: two}]\nparameters: {t: 0.2}\n", {"t": 0.2}),
    "extrapolate": ("base_model: base\nmodels: [{model: one}]\nparameters: {alpha: 0.4}\n", {"alpha": 0.4}),
    "extrapolation_merge": (
        "base_model: base\n" + MODELS % ("alpha: 0.4", "alpha: 0.1, weight: 2"),
        {"alphas": [0.4, 0.1], "weights": [1.0, 2.0]},
    ),
    "imm": (
        "base_model: base\nmodels: [{model: one}]\nparameters: {alpha: [0.2, 0.8], drop: 0.3}\nseed: 5\n",
        {"alpha": [0.2, 0.8], "drop": 0.3, "key": 5, "names": ["one"]},
    ),
}


@pytest.mark.parametrize("method", CASES)
def test_merging_on_disk_is_merging_in_memory(here, method):
    text, keywords = CASES[method]
    report = merge(write(f"merge_method: {method}\n{text}"), "out")
    assert report["tensors"] == len(NAMES)
    rule = jaxmerge.rule(METHODS[method].rule)
    keywords = dict(keywords)
    if "key" in keywords:
        keywords["key"] = jax.random.key(keywords["key"])
    names = ["one", "two"] if "two" in text else ["one"]
    if method == "slerp":  # from the base, wherever the recipe lists it
        names = ["two", "one"]
    elif "base_model" in text:
        keywords["base"] = in_memory("base")
    same("out", rule([in_memory(name) for name in names], **keywords))


def test_filters_gradients_and_precedence(here):
    text = """
merge_method: linear
models:
  - model: one
    parameters:
      weight:
        - {filter: mlp, value: [0, 1, 0.5]}
        - {filter: layers.1, value: 0.25}
  - model: two
parameters:
  weight: 0.75
"""
    merge(write(text), "out")
    found, one, two = load("out"), load("one"), load("two")
    wanted = {"model.layers.0.mlp.up_proj.weight": 0.0, "model.layers.1.mlp.up_proj.weight": 1.0,
              "model.layers.2.mlp.up_proj.weight": 0.5, "model.layers.1.self_attn.q_proj.weight": 0.25}  # fmt: skip
    for name in NAMES:
        w = wanted.get(name, 0.75)  # no filter of the model's own matches: the global value
        np.testing.assert_allclose(found[name], (w * one[name] + 0.75 * two[name]) / (w + 0.75), rtol=1e-5, atol=1e-6)


def test_dtype_and_out_dtype(here):
    folder(here / "half", tensors(7, ml_dtypes.bfloat16), torch_dtype="bfloat16")
    text = "merge_method: interpolate\nmodels: [{model: half}, {model: one}]\nparameters: {t: 0.3}\n"
    merge(write(text), "plain")
    same("plain", jaxmerge.interpolate([in_memory("half"), in_memory("one")], t=0.3))
    merge(write(text + "out_dtype: float32\n"), "wide")
    same("wide", jaxmerge.interpolate([in_memory("half", jnp.float32), in_memory("one")], t=0.3))
    assert json.loads((here / "wide" / "config.json").read_text())["torch_dtype"] == "float32"
    merge(write(text + "dtype: bfloat16\nout_dtype: float16\n"), "both")
    rounded = [in_memory(name, jnp.bfloat16) for name in ("half", "one")]
    merged = jaxmerge.interpolate([jaxmerge.cast(t, jnp.float32) for t in rounded], t=0.3)
    same("both", jaxmerge.cast(merged, jnp.float16))


def test_integers_and_doubles_survive(here):
    extra = {"steps": np.array([2**40], np.int64), "precise": np.array([1 / 3])}
    for i, name in enumerate(["a", "b"]):
        folder(here / name, {**tensors(i), "steps": extra["steps"] + i, "precise": extra["precise"] + i})
    merge(write("merge_method: interpolate\nmodels: [{model: a}, {model: b}]\n"), "out")
    found = load("out")
    assert found["steps"][0] == 2**40
    assert found["precise"][0] == pytest.approx(1 / 3 + 0.5, abs=1e-15)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 700])
def test_the_folder_is_a_hugging_face_folder(here, max_shard_bytes):
    seen = []
    text = "merge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\n"
    report = merge(write(text), "out", max_shard_bytes=max_shard_bytes, progress=lambda *a: seen.append(a))
    assert seen[-1][0] == seen[-1][1] == report["bytes_in"]
    files = sorted(path.name for path in (here / "out").glob("*.safetensors"))
    assert files == sorted(report["files"])
    assert (len(files) == 1) == (max_shard_bytes > 10**6)
    found = {}
    for file in files:
        with safe_open(here / "out" / file, "np") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert set(found) == set(NAMES)
    for name, array in load("out").items():
        assert np.array_equal(array, found[name])
    if len(files) > 1:
        index = json.loads((here / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
        assert set(index["weight_map"]) == set(NAMES)
    record = json.loads((here / "out" / "merge.json").read_text())
    assert record["recipe"] == text
    assert set(record["inputs"]) == {"one", "two"}
    assert "merge_method: linear" in (here / "out" / "README.md").read_text()
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (here / "out" / name).exists()
    assert sorted(path.name for path in here.iterdir()) == ["base", "one", "out", "recipe.yaml", "two"]


def test_compat_reaches_the_rule(here):
    text = "merge_method: sce\nbase_model: base\nmodels: [{model: one}, {model: two}]\n"
    merge(write(text), "out", compat="mergekit")
    models = [in_memory("one"), in_memory("two")]
    same("out", jaxmerge.sce(models, base=in_memory("base"), compat="mergekit", select_topk=1.0))
    with pytest.raises(ValueError, match="compat='paper', wanted None or 'mergekit'"):
        merge(write(text), "no", compat="paper")


def test_dry_run_writes_nothing(here):
    text = "merge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\n"
    plan = merge(write(text), "out", dry_run=True)
    assert plan["bytes_out"] > 0
    assert not (here / "out").exists()


def test_tied_heads_stay_tied(here):
    for i, name in enumerate(["tied", "copy"]):
        arrays = tensors(i)
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
        if name == "tied":
            del arrays["lm_head.weight"]
        folder(here / name, arrays, tie_word_embeddings=True)
    report = merge(write("merge_method: interpolate\nmodels: [{model: tied}, {model: copy}]\n"), "out")
    assert "lm_head.weight" not in load("out")
    assert "stored twice" in report["notes"][0]
    folder(here / "torn", tensors(3), tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"torn: config.json says tie_word_embeddings, but lm_head.weight differs"):
        merge(write("merge_method: interpolate\nmodels: [{model: tied}, {model: torn}]\n"), "no")


LINEAR = "merge_method: linear\nmodels: [{model: one, parameters: {weight: 1}}]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_methd: linear", "unknown key 'merge_methd'; did you mean 'merge_method'"),
        ("merge_method: lienar", "unknown merge_method 'lienar'; did you mean 'linear'"),
        ("models: []", "no 'merge_method'; there are linear"),
        ("merge_method: linear\nmodels: []", "'models' must be a list"),
        ("merge_method: linear\nmodels: [{modl: one}]", "unknown key of a model 'modl'; did you mean 'model'"),
        (LINEAR + "parameters: {wieght: 1}", "unknown parameter of linear 'wieght'; did you mean 'weight'"),
        (LINEAR + "parameters: {weight: heavy}", "parameter 'weight' is 'heavy', wanted a number"),
        (LINEAR + "parameters: {normalize: often}", "parameter 'normalize' is 'often', wanted true or false"),
        (LINEAR + "parameters: {weight: [{filter: mlp}]}", "a condition of 'weight' has no 'value'"),
        (LINEAR + "dtype: float31", "unknown dtype 'float31'; did you mean 'float32'"),
        (LINEAR + "slices: [1]", "exactly one of 'models', 'slices' and 'modules' is wanted"),
        (LINEAR + "tokenizer_source: union", "one: tokenizer.json names no model with a vocabulary"),
        (LINEAR + "seed: many", "seed is 'many', wanted an integer"),
        (LINEAR + f"seed: {2**64}", "wanted an integer of 64 bits"),
        (LINEAR + "---\na: 1", "unknown key 'a'; there are merge_method"),
        ("merge_method: [", "is no YAML"),
        ("merge_method: linear\nmodels: [{model: one}]", "linear needs the parameter 'weight' of model 'one'"),
        ("merge_method: imm\nmodels: [{model: one}]", "imm needs a base_model"),
        ("merge_method: interpolate\nmodels: [{model: one}]", "interpolate needs 2 models; found 1"),
        (
            "merge_method: linear\nmodels: [{model: one+lora, parameters: {weight: 1}}]",
            "'one\\+lora': the adapter 'lora' is no folder",
        ),
        (
            "merge_method: linear\nmodels: [{model: none, parameters: {weight: 1}}]",
            "model 'none' is no folder or file here",
        ),
        (LINEAR.replace("1}", "0}"), r"the weights \[0.0\] of linear sum to zero, .* or set normalize: false"),
    ],
)
def test_recipes_that_are_refused(here, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        merge(write(text), "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in here.iterdir()) == ["base", "one", "recipe.yaml", "two"]


def rewrite(path, change):
    arrays = tensors(9)
    change(arrays)
    return folder(path, arrays)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model 'bad' does not match 'one': lacks 1 tensors"),
        (lambda t: t.update(extra=np.ones(2)), r"has 1 that it lacks \(extra\)"),
        (lambda t: t.update({"model.norm.weight": np.ones(7)}), r"'model.norm.weight' of 'bad' has shape \[7\]"),
        (lambda t: t.update({"model.norm.weight": np.ones(6, np.int32)}), "of 'bad' is int32, wanted float32"),
        (lambda t: t["model.norm.weight"].__setitem__(2, np.nan), r"'model.norm.weight' of bad/.* has 1 NaN"),
    ],
)  # fmt: skip
def test_models_that_are_refused(here, change, words):
    rewrite(here / "bad", change)
    with pytest.raises(ValueError, match=words):
        merge(write("merge_method: interpolate\nmodels: [{model: one}, {model: bad}]\n"), "out")
    assert sorted(path.name for path in here.iterdir()) == ["bad", "base", "one", "recipe.yaml", "two"]


def test_broken_files_are_named(here):
    text = "merge_method: interpolate\nmodels: [{model: one}, {model: base}]\n"
    whole = (here / "base" / "model.safetensors").read_bytes()
    for content, words in [
        (whole[:-10], "model.safetensors is truncated: tensor"),
        (whole[:4], "is no whole safetensors file"),
        (whole[:8] + b"x" + whole[9:], "unreadable safetensors header"),
    ]:
        (here / "base" / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            merge(write(text), "out")
    (here / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="'base' holds no"):
        merge(write(text), "out")
    (here / "one" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is missing"):
        merge(write(text), "out")


def test_no_space_and_no_place(here, monkeypatch):
    write(LINEAR)
    with pytest.raises(ValueError, match="one exists already"):
        merge("recipe.yaml", "one")
    (here / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        merge("recipe.yaml", "file/out")
    monkeypatch.setattr(journal.shutil, "disk_usage", lambda path: _Usage())
    with pytest.raises(ValueError, match=r"no space left for out: it needs 0\.00 GB, 0\.00 GB are free"):
        merge("recipe.yaml", "out")
    monkeypatch.undo()
    monkeypatch.chdir(here)

    def full(handle, data, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.os, "pwrite", full)
    with pytest.raises(ValueError, match="no space left while writing out; free some and give the same command again"):
        merge("recipe.yaml", "out")
    assert not (here / "out").exists()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert merge("recipe.yaml", "out")["tensors"] == len(NAMES)
    assert not [path for path in here.iterdir() if path.name.startswith(".out")]


class _Usage:
    free = 10
