"""Names of the hub: what is in the cache of its client is opened, models and adapters; the network is off."""

import json
import pathlib
import sys

import numpy as np
import pytest
from helpers.llamas import folder, tensors
from safetensors.numpy import save_file

from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read


def downloaded(hub, name, revision="main"):
    """The folder of a snapshot as the hub's client keeps it, not made yet."""
    stored = hub / f"models--{name.replace('/', '--')}"
    (stored / "refs").mkdir(parents=True, exist_ok=True)
    (stored / "refs" / revision).write_text("abc")
    (stored / "snapshots").mkdir(exist_ok=True)
    return stored / "snapshots" / "abc"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_names_are_read_where_they_were_downloaded(hub, monkeypatch):
    with pytest.raises(ValueError, match=r"org/model: no such folder here, .*not be fetched .*`hf download`") as caught:
        open_source("org/model")
    assert "\n" not in str(caught.value)
    place = downloaded(hub, "org/model")
    folder(place, tensors(0))
    for name in ("org/model", "org/model@main"):
        found = open_source(name)
        assert (found.name, found.folder) == (name, place)
    with pytest.raises(ValueError, match="org/model@other: no such folder here, and it could not be fetched"):
        open_source("org/model@other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"huggingface_hub is not installed, .*; .* install 'jaxmerge\[files\]'"):
        open_source("org/model")


def test_models_and_adapters_may_both_be_of_the_hub(hub):
    folder(downloaded(hub, "org/model"), tensors(0))
    place = downloaded(hub, "org/adapter", "v1")
    place.mkdir()
    before = read(open_source("org/model").tensors["lm_head.weight"])
    rows, columns = before.shape
    factors = {"lora_A": np.ones((1, columns), np.float32), "lora_B": np.ones((rows, 1), np.float32)}
    named = {f"base_model.model.lm_head.{kind}.weight": factor for kind, factor in factors.items()}
    save_file(named, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    opened = open_source("org/model+org/adapter@v1")
    assert opened.name == "org/model+org/adapter@v1"
    np.testing.assert_allclose(read(opened.tensors["lm_head.weight"]), before + 2.0, rtol=1e-6)
    with pytest.raises(ValueError, match="org/other: no such folder here, and it could not be fetched"):
        open_source("org/model+org/other")


def test_a_folder_here_has_no_revisions(hub):
    folder(hub.parent / "model", tensors(0))
    assert open_source("model@main").folder == pathlib.Path("model")
