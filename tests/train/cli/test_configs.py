"""The configs that come with the code: listed, found by name from anywhere, and each says what it is."""

import re

import pytest
from helpers import ROOT

from train.cli.__main__ import main
from train.cli.configs import purpose
from train.log import UserError
from train.models import open as models
from train.resolve import SHIPPED, read_yaml, shipped, shipped_names


def test_every_config_is_listed_with_its_verb_and_purpose(capsys):
    assert main(["configs"]) == 0
    printed = capsys.readouterr().out
    listed = re.findall(r"^jaxmerge (\w+) (\S+)\n    (\S.*)$", printed, re.MULTILINE)
    assert [name for _, name, _ in listed] == shipped_names()
    verbs = {name: verb for verb, name, _ in listed}
    assert (verbs["quickstart"], verbs["mixture"], verbs["search-code"]) == ("improve", "sft", "search")
    assert SHIPPED == ROOT / "configs"


@pytest.mark.parametrize("name", shipped_names())
def test_each_says_what_it_is_for_and_the_command_that_it_is_run_by(name):
    text = (SHIPPED / f"{name}.yaml").read_text()
    verb, sentence = purpose(text)
    assert f"#   jaxmerge {verb} configs/{name}.yaml" in text
    assert 20 < len(sentence) < 250


def test_a_name_is_enough_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny.yaml", "configs/tiny.yaml"):
        assert main(["improve", name, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("parameters") >= 3
    (tmp_path / "tiny.yaml").write_text("model: {path: here}\n")
    assert read_yaml(tmp_path / "tiny.yaml") == {"model": {"path": "here"}}
    assert shipped("miniature") == ROOT / "configs" / "miniature.yaml"
    assert shipped("configs/miniature", folder=True) == ROOT / "configs" / "miniature"
    for name in ("../configs/tiny", "/tiny", "", "configs/"):
        assert shipped(name) is None
    assert main(["improve", "quickstrat"]) == 2
    assert "quickstrat: no such config; did you mean quickstart?" in capsys.readouterr().err


def test_the_models_of_the_configs_are_found_from_anywhere_or_said_to_be_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert models.resolve("configs/miniature") == ROOT / "configs" / "miniature"
    with pytest.raises(UserError, match=r"configs/nothing: no such folder here, .* run this config in a checkout"):
        models.resolve("configs/nothing")
