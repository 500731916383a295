"""What enters each layer: of a prompt alone and among others, and through the command, as gates of experts."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import yaml
from flax import nnx
from helpers.tiny_experts import BOS, LAYERS, RECIPE, WIDE, recipe, three
from safetensors.numpy import load_file

from jaxmerge.files.checkpoints.open import open_source
from train.cli.__main__ import main
from train.log import UserError
from train.models.attention import visible
from train.models.decoder import bind, count_up
from train.models.hf import load_hf
from train.models.states import BATCH, read_states, states_of

PROMPTS = [[1, 5, 9, 4], [1, 7], [3], [1, 8, 8, 2, 6, 10]]
MANY = [PROMPTS[i % len(PROMPTS)] for i in range(BATCH + 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        three("qwen3")
        recipe("hidden")
    return folder


def test_a_prompt_has_the_same_states_alone_and_among_others(folder):
    """The first are the embeddings, the next what a layer makes of them."""
    config, params = load_hf(folder / "base")
    last, mean = (states_of(config, params, MANY, average=average) for average in (False, True))
    assert last.shape == mean.shape == (BATCH + 3, LAYERS, WIDE)
    rows = np.asarray(params["model"]["embed_tokens"]["weight"])
    np.testing.assert_allclose(last[:, 0], rows[[p[-1] for p in MANY]], rtol=1e-6)
    np.testing.assert_allclose(mean[:, 0], [rows[p].mean(0) for p in MANY], rtol=1e-5, atol=1e-7)
    decoder, tokens = bind(config, params), jnp.asarray([PROMPTS[0]])
    positions = count_up(tokens.shape)
    (view,) = decoder.views(positions, visible(positions)).values()
    x = nnx.jit(lambda block, x: block(x, *view, None, None, jnp.float32)[0])(
        decoder.model.layers["0"], decoder.embed(tokens)
    )
    for i in (0, len(PROMPTS), 2 * len(PROMPTS)):  # the last of them is in another batch
        np.testing.assert_allclose(last[i, 1], x[0, -1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mean[i, 1], np.mean(x[0], 0), rtol=1e-5, atol=1e-6)


def test_a_family_that_the_decoder_lacks_is_refused_by_name(folder):
    source = open_source(str(folder / "base"))
    with pytest.raises(UserError, match="mamba"):
        read_states(dataclasses.replace(source, config={**source.config, "model_type": "mamba"}), PROMPTS, False)


def test_the_command_makes_gates_of_hidden_states_and_verifies_them(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["merge", "moe.yaml", "out", "--dry-run"]) == 0
    assert not pathlib.Path("out").exists()
    assert main(["merge", "moe.yaml", "out"]) == 0
    assert "experts: 45 tensors" in capsys.readouterr().out
    found = load_file("out/model.safetensors")
    backend = tokenizers.Tokenizer.from_file("base/tokenizer.json")
    config, params = load_hf("base")
    prompts = [
        backend.encode(BOS + text, add_special_tokens=False).ids
        for expert in yaml.safe_load(RECIPE.format(mode="hidden"))["experts"]
        for text in [*expert["positive_prompts"], *expert.get("negative_prompts", [])]
    ]
    states = states_of(config, params, prompts, average=False)
    wanted = states[:2].mean(0) - states[2]
    wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
    for layer in range(LAYERS):
        gate = found[f"model.layers.{layer}.mlp.gate.weight"]
        np.testing.assert_allclose(gate[0], wanted[layer], rtol=1e-4, atol=1e-5)
    assert main(["verify", "out"]) == 0


def test_without_the_decoder_the_recipe_says_which_extra_it_needs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("train.cli.files.find_states", lambda: None)
    assert main(["merge", "moe.yaml", "other"]) == 2
    said = capsys.readouterr().err
    assert "the extra 'train'" in said
    assert "gate_mode: cheap_embed" in said
    assert said.count("\n") == 1
    assert not pathlib.Path("other").exists()
