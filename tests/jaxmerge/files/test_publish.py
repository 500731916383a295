"""Folders put on the hub: the hub's own client talks to a server that plays the hub."""

import json

import numpy as np
import pytest
from helpers.hub_uploads import Repository, receiving_hub
from helpers.llamas import folder, tensors
from safetensors.numpy import load, save_file

from jaxmerge.files import publish
from jaxmerge.files.model_card import Card, write_card
from train.cli import __main__ as cli

# The hub's client gives its HTTP library a file in a way that the newest one frowns at.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    with receiving_hub(mine=("me", "lab"), reads=()) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "mine")
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def model(hub, tmp_path):
    place = folder(tmp_path / "model", tensors(0))
    write_card(place, Card("model", "A model.", 'AutoModelForCausalLM.from_pretrained("model")'))
    (place / ".cache").write_text("not for others")
    return place


def test_a_folder_is_pushed_in_one_commit(hub, model):
    url = publish.push(model, "lab/model", private=True)
    repository = hub.repositories["lab/model"]
    assert url == f"{hub.url}/lab/model/commit/{1:040x}"
    assert repository.private
    assert len(repository.commits) == 1
    assert set(repository.files) == {"README.md", "config.json", "model.safetensors"}
    found = load(repository.files["model.safetensors"])
    assert all((found[name] == value).all() for name, value in tensors(0).items())
    # On the hub the card calls the model by its name there; the card in the folder does not.
    assert b'from_pretrained("lab/model")' in repository.files["README.md"]
    assert 'from_pretrained("model")' in (model / "README.md").read_text()


def test_what_is_there_is_not_sent_again_and_old_weights_go(hub, model):
    publish.push(model, "me/model")
    assert not hub.repositories["me/model"].private
    hub.repositories["me/model"].files |= {"notes.txt": b"mine", "other.safetensors": b"of an older push"}
    sent = len(hub.asked)
    save_file({"a": np.zeros(3, np.float32)}, model / "second.safetensors")
    publish.push(model, "me/model")
    assert [ask.partition(" ")[0] for ask in hub.asked[sent:]].count("PUT") == 1  # the second file alone
    assert set(hub.repositories["me/model"].files) == {
        "README.md", "config.json", "model.safetensors", "second.safetensors", "notes.txt",
    }  # fmt: skip


def refused(capsys, *words) -> str:
    assert cli.main([str(word) for word in words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"jaxmerge {words[0]}: ")
    return error


def test_refusals_say_the_way_out(hub, model, capsys, monkeypatch):
    again = "The folder is whole; to try again: jaxmerge push model"
    assert "'theirs' is of others" in (line := refused(capsys, "push", "model", "theirs/model"))
    assert again in line
    monkeypatch.setenv("HF_TOKEN", "reads")
    assert "this token may not write there (403)" in refused(capsys, "push", "model", "me/model")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "the hub does not know this token (401)" in refused(capsys, "push", "model", "me/model")
    monkeypatch.delenv("HF_TOKEN")
    assert "no token of the hub; set HF_TOKEN, or log in: hf auth login" in refused(capsys, "push", "model", "me/model")
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert "nowhere: no such folder with a model" in refused(capsys, "push", "nowhere", "me/model")
    assert "expected ORG/NAME" in refused(capsys, "push", "model", "model")
    assert "expected ORG/NAME" in refused(capsys, "push", "model", "me/model@main")
    hub.broken = True
    assert "Error while uploading 'model.safetensors'" in refused(capsys, "push", "model", "me/model", "private=true")
    assert hub.repositories["me/model"].commits == []
    hub.broken = False
    assert cli.main(["push", "model", "me/model", "private=true"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/me/model/commit/")


def test_a_name_that_others_have_is_not_written_to(hub, model, capsys):
    hub.repositories["her/model"] = Repository(private=False, files={"README.md": b"hers"})
    assert "'her' is of others" in refused(capsys, "push", "model", "her/model")
    assert hub.repositories["her/model"].files == {"README.md": b"hers"}


def test_a_merge_is_pushed_when_it_is_done(hub, tmp_path, capsys, monkeypatch):
    for seed, name in enumerate(("base", "one")):
        folder(tmp_path / name, tensors(seed))
    recipe = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: one}]\nparameters: {weight: 0.5}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert "private is of what is put on the hub" in refused(capsys, "merge", "recipe.yaml", "out", "private=true")
    monkeypatch.delenv("HF_TOKEN")
    assert "no token" in refused(capsys, "merge", "recipe.yaml", "out", "push=lab/merged")
    assert not (tmp_path / "out").exists()  # asked before the work
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert cli.main(["merge", "recipe.yaml", "out", "push=lab/merged", "private=true"]) == 0
    files = hub.repositories["lab/merged"].files
    assert hub.repositories["lab/merged"].private
    assert {"README.md", "config.json", "merge.json", "mergekit_config.yml", "model.safetensors"} <= set(files)
    assert b'from_pretrained("lab/merged")' in files["README.md"]
    assert json.loads(files["merge.json"])["merge_method"] == "task_arithmetic"
