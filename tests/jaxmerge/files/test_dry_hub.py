"""A dry run of a merge of the hub's models fetches what lies beside the weights, and of these the headers alone."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from helpers.llamas import folder, tensors
from helpers.played_hub import played_hub
from safetensors.numpy import load_file, save_file

from jaxmerge.files import merge
from jaxmerge.files.adapters.folder import open_adapter
from jaxmerge.files.checkpoints import safetensors
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read
from train.cli.__main__ import main

RECIPE = (
    "merge_method: task_arithmetic\nbase_model: org/base\n"
    "models: [{model: org/one@main}, {model: org/sharded}]\nparameters: {weight: 0.5}\n"
)
LARGE = {"model.layers.0.mlp.large.weight": np.ones((300, 1000), np.float32)}  # a header is asked for with 100 kB


def adapter(path: pathlib.Path, rank: int = 1) -> None:
    path.mkdir()
    rng = np.random.default_rng(rank)
    factors = {"lora_A": rng.standard_normal((rank, 8)), "lora_B": rng.standard_normal((16, rank))}
    named = {f"base_model.model.lm_head.{kind}.weight": factor for kind, factor in factors.items()}
    named["base_model.model.model.norm.weight"] = rng.standard_normal(8)
    save_file({name: array.astype(np.float32) for name, array in named.items()}, path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "base_model_name_or_path": "org/base"}
    (path / "adapter_config.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    (root / "org").mkdir()
    for seed, name in enumerate(("base", "one", "sharded")):
        folder(root / "org" / name, tensors(seed) | LARGE)
    short = tensors(1) | LARGE
    del short["model.norm.weight"]
    folder(root / "org/short", short)
    tied = tensors(0)
    folder(root / "org/tied", tied | {"lm_head.weight": tied["model.embed_tokens.weight"]}, tie_word_embeddings=True)
    adapter(root / "org/adapter")
    adapter(root / "org/second", rank=700)
    whole = root / "org/sharded/model.safetensors"
    arrays, placed = load_file(whole), {}
    whole.unlink()
    for i, names in enumerate((list(LARGE), [name for name in arrays if name not in LARGE]), start=1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: arrays[name] for name in names}, root / "org/sharded" / file)
        placed |= dict.fromkeys(names, file)
    (root / "org/sharded" / safetensors.INDEX).write_text(json.dumps({"weight_map": placed}))
    shutil.copytree(root / "org/sharded", root / "org/lost")
    (root / "org/lost/model-00002-of-00002.safetensors").unlink()
    (root / "org/damaged").mkdir()
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (root / "org/damaged/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with played_hub(tmp_path_factory.mktemp("cache")) as playing:
        for model in (root / "org").iterdir():
            playing.add_folder(f"models/org/{model.name}", model)
        yield playing


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """A folder to work in, with a cache of the hub's client in it."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    hub.sent.clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def sent_weights(hub):
    return {file: count for file, count in hub.sent.items() if file[1].endswith(".safetensors")}


def test_a_dry_run_needs_headers_alone_and_says_what_the_merge_does(hub, here, capsys):
    (here / "r.yaml").write_text(RECIPE)
    assert main(["merge", "r.yaml", "out", "--dry-run"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert set(sent_weights(hub)) == {
        ("org/base", "model.safetensors"), ("org/one", "model.safetensors"),
        ("org/sharded", "model-00001-of-00002.safetensors"), ("org/sharded", "model-00002-of-00002.safetensors"),
    }  # fmt: skip
    assert all(count <= 100_001 for count in sent_weights(hub).values())
    assert "note: org/one@main is not downloaded: its headers alone were read; it has 1.21 MB of weights" in said
    assert not list(here.rglob("*.safetensors"))
    plan = merge("r.yaml", "out", dry_run=True)
    report = merge("r.yaml", "out")
    assert [plan[key] for key in ("tensors", "bytes_in", "bytes_out", "files")] == [
        report[key] for key in ("tensors", "bytes_in", "bytes_out", "files")
    ]
    merged, base = load_file("out/model.safetensors"), tensors(0)
    wanted = base["lm_head.weight"] + 0.5 * sum(tensors(i)["lm_head.weight"] - base["lm_head.weight"] for i in (1, 2))
    np.testing.assert_allclose(merged["lm_head.weight"], wanted, atol=1e-5)
    hub.sent.clear()
    assert not any("not downloaded" in note for note in merge("r.yaml", "other", dry_run=True)["notes"])
    assert not sent_weights(hub), "what is in the cache is read there"


def test_mistakes_are_found_before_anything_is_downloaded(hub, here):
    pathlib.Path("r.yaml").write_text(RECIPE.replace("org/one@main", "org/short"))
    with pytest.raises(ValueError, match=r"'org/short' does not match 'org/base': lacks 1 tensors \(model\.norm"):
        merge("r.yaml", "out", dry_run=True)
    assert all(count <= 100_001 for count in sent_weights(hub).values())
    pathlib.Path("r.yaml").write_text(RECIPE.replace("org/one@main", "org/none"))
    with pytest.raises(
        ValueError, match=r"^org/none: no such folder here, and it could not be fetched from the hub \("
    ):
        merge("r.yaml", "out", dry_run=True)
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is missing, though .* names it"):
        open_source("org/lost", headers_only=True)
    with pytest.raises(ValueError, match=r"tensor 'w' .*is given 8 bytes"):
        open_source("org/damaged", headers_only=True)


def test_what_is_not_here_is_not_read_and_a_tied_head_is_believed(here):
    found = open_source("org/tied", headers_only=True)
    assert "lm_head.weight" not in found.tensors
    assert any("says that lm_head.weight is the embedding" in note for note in found.notes)
    with pytest.raises(ValueError, match=r"model\.safetensors is not downloaded, for a dry run reads headers alone"):
        read(found.tensors["model.norm.weight"])


def test_an_adapter_and_a_tokenizer_of_the_hub(hub, here):
    opened = open_source("org/base+org/adapter", headers_only=True)
    assert opened.tensors["lm_head.weight"].shape == (16, 8)
    assert sent_weights(hub)["org/base", "model.safetensors"] <= 100_001
    assert not list(here.rglob("*.safetensors"))
    assert any("org/adapter is not downloaded: its headers alone were read" in note for note in opened.notes)
    with pytest.raises(ValueError, match="is not downloaded, for a dry run reads headers alone"):
        read(opened.tensors["lm_head.weight"])
    hub.sent.clear()
    pathlib.Path("r.yaml").write_text(RECIPE + "tokenizer: {source: org/lost}\n")
    with pytest.raises(ValueError, match="has no tokenizer"):
        merge("r.yaml", "out", dry_run=True)
    assert not [file for file in sent_weights(hub) if file[0] == "org/lost"]


def test_a_merge_of_adapters_of_the_hub(hub, here, capsys):
    """Neither adapter is downloaded, nor the base, though both keep a norm whole that may differ."""
    models = "models: [{model: org/adapter}, {model: org/second}]\nparameters: {weight: 0.5}\n"
    pathlib.Path("r.yaml").write_text(f"merge_method: linear\nadapter: core\n{models}")
    assert main(["merge", "r.yaml", "out", "--dry-run"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert set(sent_weights(hub)) == {
        ("org/adapter", "adapter_model.safetensors"), ("org/second", "adapter_model.safetensors")
    }  # fmt: skip
    assert not list(here.rglob("*.safetensors"))
    assert "note: org/second is not downloaded: its headers alone were read; it has 0.07 MB of weights" in said
    for name in ("adapter", "second"):
        found = open_adapter(f"org/{name}").folder
        assert (found / "adapter_model.safetensors").exists(), "without headers_only all of it is fetched"
