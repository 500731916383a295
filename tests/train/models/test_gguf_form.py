"""`merge … format=gguf`: the merged weights in one file, and what is refused before anything is merged."""

import json
import pathlib

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers.goldens.family_cases import SIZES
from helpers.tiny_models import config_of
from helpers.tiny_tokenizers import CHATML, byte_level

from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read
from train.cli.__main__ import main
from train.models.decoder import init
from train.models.hf import save_hf
from train.models.open import load_model
from train.models.tokenizer import Tokenizer

ATTRIBUTES = {
    "model_type": "llama", **SIZES, "vocab_size": 403, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
NAMES = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_models(config_of(ATTRIBUTES))
    return tmp_path


def write_models(config):
    """Two models and the recipe of their mean."""
    tokenizer = Tokenizer(byte_level(), NAMES, chat_template=CHATML)
    fitted = tokenizer.fitted(vocab_size=config.vocab_size, eos_ids=config.eos_token_id)
    for seed, name in enumerate(("one", "two")):
        params = init(config, jnp.asarray([0, seed], jnp.uint32))
        save_hf(name, config, params, dtype=jnp.bfloat16, tokenizer_from=fitted)
    recipe = {"merge_method": "linear", "models": [{"model": name} for name in ("one", "two")]}
    recipe |= {"parameters": {"weight": 1}, "dtype": "float32", "out_dtype": "bfloat16"}
    pathlib.Path("recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_the_file_holds_the_merge_and_every_reader_takes_it(here, capsys):
    assert main(["merge", "recipe.yaml", "plain"]) == 0
    assert main(["merge", "recipe.yaml", "out", "format=gguf", "--dry-run"]) == 0
    assert not pathlib.Path("out").exists()
    for type, kind in (("bf16", "BF16"), (None, "Q8_0")):
        out = pathlib.Path(f"out-{kind}")
        assert main(["merge", "recipe.yaml", str(out), "format=gguf", *([f"type={type}"] if type else [])]) == 0
        assert not list(here.glob(".*.stages"))
        file = out / f"{out}-{kind}.gguf"
        assert {path.name for path in out.iterdir()} == {file.name, "README.md", "merge.json", "mergekit_config.yml"}
        assert f"llama-cli -m {file.name}" in (out / "README.md").read_text()
        plain, found = open_source("plain").tensors, open_source(str(out)).tensors
        assert set(found) == set(plain)
        for name, tensor in plain.items():
            wanted, made = read(tensor).astype(np.float32), read(found[name]).astype(np.float32)
            if kind == "Q8_0" and wanted.ndim == 2:  # half a step of 32 weights, and the scale's own rounding to half
                rows = np.abs(wanted.reshape(-1, 32)).max(1, keepdims=True)
                assert (np.abs((made - wanted).reshape(-1, 32)) <= rows / 127 * 0.57).all(), name
            else:
                np.testing.assert_array_equal(made, wanted, err_msg=name)
        assert gguf.GGUFReader(file).fields["general.name"].contents() == str(out)
    assert load_model("out-BF16").config == load_model("plain").config
    capsys.readouterr()
    assert main(["merge", "recipe.yaml", "out-Q8_0", "format=gguf"]) == 0
    assert "out-Q8_0 is there already" in capsys.readouterr().out
    assert main(["verify", "out-Q8_0"]) == 2
    assert "is written as GGUF, which is not replayed" in capsys.readouterr().out


def test_what_cannot_be_written_is_refused_before_the_merge(here, capsys):
    def refused(*words):
        assert main(["merge", "recipe.yaml", "out", *words]) == 2
        assert not list(here.glob("*out*")), "nothing is merged"
        return capsys.readouterr().err

    assert "merge.type is of GGUF files; add format=gguf" in refused("type=f16")
    file = pathlib.Path("one/config.json")
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "model_type": "mamba"}))
    assert "'mamba'" in refused("format=gguf")
    file.write_text(json.dumps({**said, "num_hidden_layers": 2}))
    assert "the tensors do not fit the config; missing: model.layers.1" in refused("format=gguf")
    file.write_text(json.dumps(said))
    pathlib.Path("one/tokenizer.json").unlink()
    assert "tokenizer" in refused("format=gguf", "--dry-run")


def test_experts_are_merged_one_by_one_and_written_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_models(config_of({**ATTRIBUTES, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}))
    assert main(["merge", "recipe.yaml", "plain"]) == 0
    assert main(["merge", "recipe.yaml", "out", "format=gguf", "type=bf16"]) == 0
    plain, found = open_source("plain").tensors, open_source("out").tensors
    assert set(found) == set(plain)
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight" in found
    for name, tensor in plain.items():
        np.testing.assert_array_equal(read(found[name]), read(tensor).astype(np.float32), err_msg=name)
    # The file is a model of recipes too, beside a folder.
    recipe = {"merge_method": "linear", "models": [{"model": name} for name in ("out", "plain")], "dtype": "float32"}
    pathlib.Path("again.yaml").write_text(yaml.safe_dump({**recipe, "parameters": {"weight": 1}}))
    assert main(["merge", "again.yaml", "same"]) == 0
    for name, tensor in open_source("same").tensors.items():
        np.testing.assert_array_equal(read(tensor), read(plain[name]).astype(np.float32), err_msg=name)
