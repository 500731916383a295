"""Recipes of experts: names, weights and gates of the result, what is drawn, what is refused, and interruptions."""

import json
import os
import pathlib
import signal
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import tokenizers
import yaml
from helpers import forks
from helpers.dying_merge import merge_until
from helpers.tiny_experts import BOS, LAYERS, RECIPE, WIDE, dense, recipe, three
from safetensors.numpy import load_file

from jaxmerge.files import merge, verify
from jaxmerge.files.experts import families, gates
from jaxmerge.files.experts import plan as mixtures
from jaxmerge.files.recipe import read

MIXTRAL = "model.layers.{}.block_sparse_moe."
PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(**options):
    merge("moe.yaml", "out", **options)
    return load_file("out/model.safetensors")


def test_a_mixtral_has_the_bases_attention_and_each_models_mlps(here):
    models = three("llama")
    recipe("cheap_embed")
    found = made()
    wanted = {name: array for name, array in models["base"].items() if ".mlp." not in name}
    for l in range(LAYERS):
        for e, name in enumerate(["one", "two", "base", "one"]):
            for w, part in PARTS.items():
                scale = np.float32(0.4 if (w, e) == ("w2", 1) else 1.0)
                array = models[name][f"model.layers.{l}.mlp.{part}.weight"]
                wanted[f"{MIXTRAL.format(l)}experts.{e}.{w}.weight"] = array * scale
    routers = {f"{MIXTRAL.format(l)}gate.weight" for l in range(LAYERS)}
    assert set(found) == set(wanted) | routers
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    config = json.loads(pathlib.Path("out/config.json").read_text())
    assert (config["model_type"], config["num_local_experts"], config["num_experts_per_tok"]) == ("mixtral", 4, 2)
    assert config["max_position_embeddings"] == 2048  # of a Llama that says nothing; a Mixtral takes 131072 for granted
    assert pathlib.Path("out/tokenizer.json").read_bytes() == pathlib.Path("base/tokenizer.json").read_bytes()
    assert "mergekit-moe" in pathlib.Path("out/README.md").read_text()
    assert verify.verify("out")["code"] == 0


def test_cheap_embed_is_the_difference_of_two_directions(here):
    rows = three("llama")["base"]["model.embed_tokens.weight"].astype(np.float64)
    recipe("cheap_embed")
    backend = tokenizers.Tokenizer.from_file("base/tokenizer.json")

    def direction(texts):
        total = np.sum([rows[i] for text in texts for i in backend.encode(BOS + text, add_special_tokens=False).ids], 0)
        return total / np.linalg.norm(total)

    wanted = []
    for expert in yaml.safe_load(RECIPE.format(mode="cheap_embed"))["experts"]:
        negative = expert.get("negative_prompts")
        row = direction(expert["positive_prompts"]) - (direction(negative) if negative else 0)
        wanted.append(row / np.linalg.norm(row))
    found = made()
    for l in range(LAYERS):
        np.testing.assert_allclose(found[f"{MIXTRAL.format(l)}gate.weight"], wanted, rtol=1e-5, atol=1e-6)


def test_a_qwen_has_a_shared_expert_with_a_gate_and_a_llama_among_them_biases_of_zero(here):
    models = three("llama", dtype=ml_dtypes.bfloat16)
    recipe("random", shared=True, more="architecture: qwen\n")
    merge("moe.yaml", "out", max_shard_bytes=20_000)
    index = json.loads(pathlib.Path("out/model.safetensors.index.json").read_text())["weight_map"]
    found = {name: array for file in set(index.values()) for name, array in load_file(f"out/{file}").items()}
    front = "model.layers.1."
    assert found[f"{front}mlp.gate.weight"].shape == (4, WIDE)
    assert found[f"{front}mlp.shared_expert_gate.weight"].shape == (1, WIDE)
    assert {array.dtype for array in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert not found[f"{front}self_attn.k_proj.bias"].any()
    array = models["two"][f"{front}mlp.down_proj.weight"].astype(np.float32) * np.float32(0.1)
    np.testing.assert_array_equal(found[f"{front}mlp.shared_expert.down_proj.weight"], array.astype(ml_dtypes.bfloat16))


def test_what_is_drawn_depends_on_seed_layer_and_expert_alone(here):
    base = dense("base", "qwen3", 0)
    text = "base_model: base\ngate_mode: random\nexperts:\n" + "  - {source_model: base, noise_scale: 0.5}\n" * 2
    pathlib.Path("moe.yaml").write_text(text)
    two = made()
    pathlib.Path("moe.yaml").write_text(text + "  - {source_model: base}\n" + "seed: 0\n")
    merge("moe.yaml", "three")
    three_of_them = load_file("three/model.safetensors")
    for name in two:
        np.testing.assert_array_equal(three_of_them[name][: len(two[name])], two[name], err_msg=name)
    names = [f"model.layers.{l}.mlp.experts.{e}.{p}.weight" for l in (0, 1) for e in (0, 1) for p in families.PARTS]
    noise = [two[n] - base[f"model.layers.{n.split('.')[2]}.mlp.{n.split('.')[6]}.weight"] for n in names]
    for i, drawn in enumerate(noise):
        assert 0.4 < drawn.std() < 0.6
        assert all(abs(np.corrcoef(drawn.ravel(), other.ravel())[0, 1]) < 0.3 for other in noise[:i])
    merge("moe.yaml", "other", seed=1)
    gate = "model.layers.0.mlp.gate.weight"
    assert not np.array_equal(load_file("other/model.safetensors")[gate], three_of_them[gate])


@pytest.mark.parametrize("chunked", [True, False])
def test_noise_of_a_run_of_elements_is_that_of_the_whole(chunked):
    array = np.arange(35, dtype=np.float32).reshape(7, 5)

    def read_into(buffer, start=0):
        buffer[:] = array.reshape(-1).view(np.uint8)[start : start + buffer.size]

    stored = SimpleNamespace(dtype=array.dtype, shape=(7, 5), size=array.nbytes, chunked=chunked, read_into=read_into)
    noisy = mixtures.Noisy("w", (7, 5), "file", stored, 0.1, gates.key_of(0, 1, 2, 3))  # type: ignore[arg-type]
    whole = np.empty(array.nbytes, np.uint8)
    noisy.read_into(whole)
    part = np.empty(44, np.uint8)
    noisy.read_into(part, 32)
    np.testing.assert_array_equal(part, whole[32:76])
    assert not np.array_equal(whole.view(np.float32), array.ravel())


def test_states_of_the_base_are_asked_for_once_and_make_the_gates(here):
    three("llama")
    recipe("hidden")
    asked = []

    def states(model, prompts, average):
        asked.append((model.name, len(prompts), average))
        rng = np.random.default_rng(0)
        return rng.standard_normal((len(prompts), LAYERS, WIDE)).astype(np.float32)

    found = made(states=states)
    assert asked == [("base", 7, False)]
    rows = np.random.default_rng(0).standard_normal((7, LAYERS, WIDE)).astype(np.float32)
    wanted = np.stack([rows[:2].mean(0) - rows[2], rows[3], rows[4], rows[5:].mean(0)], 1)
    wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
    for l in range(LAYERS):
        np.testing.assert_allclose(found[f"{MIXTRAL.format(l)}gate.weight"], wanted[l], rtol=1e-5, atol=1e-6)
    report = merge("moe.yaml", "dry", states=states, dry_run=True)
    assert len(asked) == 1
    assert report["tensors"] == len(found)


def test_killed_anywhere_it_ends_with_the_same_bytes(here):
    three("llama")
    recipe("random", more="seed: 4\n")
    merge("moe.yaml", "whole")
    for event in (3, 90):
        died = forks.run(["moe.yaml", "out"], os.environ, cwd=here, die=event, program=merge_until)
        assert died.returncode == -signal.SIGKILL
    note = merge("moe.yaml", "out")["notes"]
    assert any("were there already" in line for line in note)
    for name in ("model.safetensors", "config.json", "README.md"):
        assert pathlib.Path("out", name).read_bytes() == pathlib.Path("whole", name).read_bytes()


def test_a_stage_may_make_what_a_mixture_is_made_of(here):
    models = three("llama")
    text = "name: mean\nmerge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\n"
    experts = "experts: [{source_model: mean}, {source_model: one}]\nbase_model: base\ngate_mode: uniform_random\n"
    pathlib.Path("moe.yaml").write_text(f"{text}---\n{experts}")
    found = made()
    name = "model.layers.1.mlp.up_proj.weight"
    mean = (models["one"][name] + models["two"][name]) / 2
    np.testing.assert_allclose(found[f"{MIXTRAL.format(1)}experts.0.w3.weight"], mean, rtol=1e-6)
    assert np.abs(found[f"{MIXTRAL.format(1)}gate.weight"]).max() <= WIDE**-0.5


GOOD = yaml.safe_load(RECIPE.format(mode="cheap_embed"))


def changed(expert=None, **changes):
    experts = [GOOD["experts"][0] | (expert or {}), *GOOD["experts"][1:]]
    return {key: value for key, value in {**GOOD, "experts": experts, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (changed(base_model=None), "a recipe of experts has no 'base_model'"),
        (changed(gate_mode="hiden"), "unknown gate_mode 'hiden'; did you mean 'hidden'"),
        (changed(experts_per_token=5), "experts_per_token is 5, wanted a whole number from 1 to 4"),
        (
            changed(expert_per_token=2),
            "unknown key of a recipe of experts 'expert_per_token'; did you mean 'experts_per",
        ),
        (changed({"positive_prompt": []}), r"unknown key of experts\[0\] 'positive_prompt'; did you mean"),
        (changed({"positive_prompts": []}), r"experts\[0\] \(one\) has no positive_prompts"),
        (changed({"positive_prompts": "add"}), r"positive_prompts of experts\[0\] is 'add', wanted a list of texts"),
        (changed({"noise_scale": "much"}), r"noise_scale of experts\[0\] is 'much', wanted a number"),
        (changed({"source_model": None}), r"source_model of experts\[0\] is None"),
        (changed(experts=[]), "experts is .*, wanted a list of {source_model"),
        (
            changed(experts=[{"source_model": m, "positive_prompts": ["a"]} for m in "ab"]),
            "all experts have the same pos",
        ),
        (changed(dtype="float17"), "unknown dtype 'float17'"),
        (
            changed(architecture="deepseek"),
            "architecture is 'deepseek', wanted how one of Mixtral, Qwen MoE, Qwen3 MoE",
        ),
        (changed(architecture="qwen3"), "become no family of experts: base is 'llama'.*Qwen3 MoE takes qwen3 and no"),
        (changed(shared_experts=[GOOD["experts"][0]] * 2), "with 2 shared experts become no family of experts"),
        (changed(gate_mode="hidden"), r"gate_mode: hidden runs base on the prompts.*'train'.*pip.*train"),
        (changed({"positive_prompts": ["\x00" * 0]}, base_model="silent"), "prompt '' has no token"),
    ],
)
def test_mistakes_of_a_recipe_are_one_line_before_anything_is_written(here, document, said):
    three("llama")
    dense("silent", "llama", 3)
    pathlib.Path("silent/tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=said) as error:
        merge(document, "out")
    assert "\n" not in str(error.value)
    assert not list(here.glob("*out*"))


@pytest.mark.parametrize(
    ("name", "kind", "change", "said"),
    [
        ("one", "llama", {"intermediate_size": 24, "num_hidden_layers": 3}, "one has 3 layers, wanted 2"),
        (
            "one",
            "llama",
            {"without": ("model.layers.1.mlp.up_proj.weight",)},
            "one has no tensor 'model.layers.1.mlp.up",
        ),
        ("base", "llama", {"mlp_bias": True}, "base: config.json says mlp_bias: True, which no mixture"),
        ("base", "llama", {"hidden_size": None}, "base: config.json says hidden_size: None, wanted a whole number"),
        (
            "base",
            "llama",
            {"num_hidden_layers": 10**12},
            "base: config.json says num_hidden_layers 1000000000000, there",
        ),
        (
            "base",
            "llama",
            {"hidden_size": 10**12},
            r"its embedding is \[\d+, 16\], and config.json says hidden_size 10000",
        ),
        ("base", "llama", {"without": ("model.norm.weight",)}, r"base lacks 1 tensors \(model.norm.weight\)"),
        ("two", "qwen2", {}, "two is 'qwen2'; all are to be of one family"),
        (
            "base",
            "llama",
            {"intermediate_size": 23},
            r"gate_proj.weight' of one has shape \[24, 16\], wanted \[23, 16\]",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(here, name, kind, change, said):
    for seed, other in enumerate(["base", "one", "two"]):
        dense(other, kind if other == name else "llama", seed, **(change if other == name else {}))
    with pytest.raises(ValueError, match=said):
        merge(GOOD, "out")


def test_tensors_that_the_family_has_no_place_for_are_listed(here):
    three("qwen3")
    config = json.loads(pathlib.Path("base/config.json").read_text()) | {"model_type": "llama"}
    for name in ("base", "one", "two"):
        pathlib.Path(name, "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"base has 4 tensors \(model.layers.0.self_attn.k_norm.weight, .* no place"):
        merge(GOOD, "out")


def test_what_mergekit_takes_is_noted(here):
    three("mistral", sliding_window=7)
    document = changed(
        shared_experts=[{"source_model": "one", "positive_prompts": ["a"]}], nonsense=1, architecture="qwen"
    )
    notes = merge(document, "out", compat="mergekit")["notes"]
    assert any("'nonsense'" in note and "ignored" in note for note in notes)
    assert any("base attends within 7 tokens, Qwen MoE to all" in note for note in notes)
    assert json.loads(pathlib.Path("out/config.json").read_text())["use_sliding_window"] is False
    (found,) = read({**GOOD, "allow_crimes": True, "experts": [GOOD["experts"][0]] * 1, "experts_per_token": 1})
    assert "an option of mergekit's command" in found.notes[0]


def test_a_tied_head_stays_tied(here):
    three("llama", without=("lm_head.weight",))
    recipe("random")
    assert "lm_head.weight" not in made()
    assert json.loads(pathlib.Path("out/config.json").read_text())["tie_word_embeddings"] is True
