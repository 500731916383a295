"""Checkpoints of experts merge expert by expert, in the old layout, the new one, or one of each."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmerge.files
from jaxmerge.files import merge, verify
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.inspect.compare import compare
from jaxmerge.files.inspect.spectrum import spectra
from jaxmerge.tree import named_leaves

WIDE, MLP, EXPERTS = 8, 12, 3
NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
RULES = {
    "linear": ("", "weight: 0.3"),
    "slerp": ("base_model: base\nparameters: {t: 0.4}\n", None),
    "ties": ("base_model: base\n", "weight: 0.6, density: 0.3"),
    "dare_ties": ("base_model: base\nseed: 2\n", "weight: 0.6, density: 0.5"),
}


def one_by_one(kind, seed):
    """The tensors of a mixture of experts in the layout of published checkpoints."""
    rng, near = np.random.default_rng(seed), np.random.default_rng(0)
    block, (gate, up, down) = NAMES[kind]
    shapes = {"model.embed_tokens.weight": (16, WIDE)}
    for front in ("model.layers.0.", "model.layers.1."):
        shapes |= {f"{front}input_layernorm.weight": (WIDE,), f"{front}{block}.gate.weight": (EXPERTS, WIDE)}
        for e in range(EXPERTS):
            own = f"{front}{block}.experts.{e}."
            shapes |= {f"{own}{gate}.weight": (MLP, WIDE), f"{own}{up}.weight": (MLP, WIDE)}
            shapes |= {f"{own}{down}.weight": (WIDE, MLP)}
    return {
        name: (near.standard_normal(shape) + (seed > 0) * 0.2 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def stacked(kind, arrays):
    """The same tensors as transformers holds them."""
    block, (gate, up, down) = NAMES[kind]
    found = {n.replace(f".{block}.", ".mlp."): a for n, a in arrays.items() if ".experts." not in n}
    for front in ("model.layers.0.", "model.layers.1."):
        own = [f"{front}{block}.experts.{e}." for e in range(EXPERTS)]
        both = [np.concatenate([arrays[f"{o}{gate}.weight"], arrays[f"{o}{up}.weight"]]) for o in own]
        found[f"{front}mlp.experts.gate_up_proj"] = np.stack(both)
        found[f"{front}mlp.experts.down_proj"] = np.stack([arrays[f"{o}{down}.weight"] for o in own])
    return found


def write(path, kind, arrays):
    pathlib.Path(path).mkdir()
    save_file(arrays, f"{path}/model.safetensors", metadata={"format": "pt"})
    config = {"model_type": kind, "num_hidden_layers": 2, "hidden_size": WIDE, "tie_word_embeddings": True}
    pathlib.Path(path, "config.json").write_text(json.dumps(config))


def models(kind, layouts):
    for seed, (name, is_new) in enumerate(zip(("base", "one", "two"), layouts, strict=True)):
        arrays = one_by_one(kind, seed)
        write(name, kind, stacked(kind, arrays) if is_new else arrays)


def recipe(method):
    head, own = RULES[method]
    parameters = f", parameters: {{{own}}}" if own else ""
    named = ["one", "two"] if method != "slerp" else ["one"]
    listed = "".join(f"  - {{model: {name}{parameters}}}\n" for name in named)
    pathlib.Path("recipe.yaml").write_text(f"merge_method: {method}\n{head}models:\n{listed}")


@pytest.mark.parametrize(("kind", "method"), [*(("mixtral", method) for method in RULES), ("qwen3_moe", "ties")])
def test_every_mixture_of_layouts_gives_the_bytes_of_the_old_one(kind, method, tmp_path, monkeypatch):
    found = []
    mixed = [(1, 0, 1)] if method != "ties" else [(1, 1, 1), (0, 1, 0), (1, 0, 1)]
    for i, layouts in enumerate([(0, 0, 0), *mixed]):
        (tmp_path / str(i)).mkdir()
        monkeypatch.chdir(tmp_path / str(i))
        models(kind, layouts)
        recipe(method)
        notes = merge("recipe.yaml", "out")["notes"]
        assert any("stores its experts stacked" in note for note in notes) == any(layouts[method == "linear" :])
        found.append(load_file("out/model.safetensors"))
        if i == 1 and method == "ties":
            assert verify.verify("out")["code"] == 0
    for other in found[1:]:
        assert set(other) == set(found[0])
        for name, array in found[0].items():
            np.testing.assert_array_equal(other[name], array, err_msg=name)


def test_layouts_are_compared_tensor_by_tensor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = one_by_one("mixtral", 0)
    write("old", "mixtral", arrays)
    write("new", "mixtral", stacked("mixtral", arrays))
    found = compare(open_source("old"), open_source("new"))
    assert found["missing"] == {"new": []}
    assert set(found["tensors"]) == set(arrays)
    assert found["overall"]["models"][0]["relative"] == 0


def test_arrays_and_spectra_are_of_one_expert_at_a_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = [one_by_one("mixtral", seed) for seed in (0, 1)]
    for name, array in zip(("old", "tuned"), arrays, strict=True):
        write(name, "mixtral", array)
        write(f"{name}-stacked", "mixtral", stacked("mixtral", array))
    params = jaxmerge.files.load("old-stacked")
    found = {path.replace("/", "."): np.asarray(leaf) for path, leaf in named_leaves(params).items()}
    assert set(found) == set(arrays[0])
    for name, array in arrays[0].items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    jaxmerge.files.save(params, "again", like="old-stacked")
    assert set(load_file("again/model.safetensors")) == set(arrays[0])
    whole = load_file("old-stacked/model.safetensors")
    jaxmerge.files.save(whole, "whole", like="old-stacked")  # by its own names, stacked as it is
    assert set(load_file("whole/model.safetensors")) == set(whole)
    with pytest.raises(ValueError, match=r"missing: .*block_sparse_moe\.experts\.0\.w2"):
        jaxmerge.files.save({"model": {"norm": {"weight": np.ones(3)}}}, "less", like="old-stacked")
    measured = [spectra(*map(open_source, names), rank=2) for names in (
        ("old", "tuned"), ("old-stacked", "tuned-stacked"), ("old", "tuned-stacked"),
    )]  # fmt: skip
    assert measured[0]["tensors"] == measured[1]["tensors"] == measured[2]["tensors"]
    assert sum(".experts." in name for name in measured[1]["tensors"]) == 2 * 3 * EXPERTS


def test_experts_that_are_never_stored_one_by_one_are_merged_one_by_one_all_the_same(tmp_path, monkeypatch):
    """gpt-oss stores [E, in, out]: TIES keeps a share of each expert's changes, not of the loudest expert's alone."""
    monkeypatch.chdir(tmp_path)
    name, rng = "model.layers.0.mlp.experts.down_proj", np.random.default_rng(0)
    loud = np.asarray([10.0, 1.0, 0.1], np.float32)[:, None, None]
    stacks = [rng.standard_normal((EXPERTS, MLP, WIDE)).astype(np.float32) for _ in range(3)]
    stacks = [stacks[0], stacks[0] + loud * stacks[1], stacks[0] + loud * stacks[2]]
    norm = "model.norm.weight"
    for model, stack in zip(("base", "one", "two"), stacks, strict=True):
        write(model, "gpt_oss", {name: stack, norm: np.ones(WIDE, np.float32)})
    recipe("ties")
    merge("recipe.yaml", "out")
    whole = load_file("out/model.safetensors")[name]
    for e in (0, 2):
        for model, stack in zip(("base", "one", "two"), stacks, strict=True):
            save_file({"alone.weight": stack[e], norm: np.ones(WIDE, np.float32)}, f"{model}/model.safetensors")
        merge("recipe.yaml", f"alone{e}")
        np.testing.assert_array_equal(whole[e], load_file(f"alone{e}/model.safetensors")["alone.weight"])
        assert not np.array_equal(whole[e], stacks[0][e])
