"""The folder of a run begun by an earlier version: the same run where its config says the same, and who finishes it."""

import dataclasses

import jax
import pytest
import yaml
from helpers import ROOT

from train.improve.settings import Improve
from train.learn.optimizers import Lion
from train.log import UserError
from train.resolve import load
from train.runtime.folder import (
    check_resumable,
    check_same_config,
    commit,
    content,
    fingerprint,
    versions,
    write_config,
)

TINY = ROOT / "configs" / "tiny.yaml"


@pytest.fixture
def older(tmp_path):
    """The folder of a run of tiny.yaml that was begun before there was `sft.optimizer`."""
    write_config(tmp_path, load(Improve, TINY))
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del values["sft"]["optimizer"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return tmp_path


def test_a_run_from_before_is_the_same_run_and_is_not_finished_here(older):
    config = load(Improve, TINY)
    check_same_config(older, config)
    with pytest.raises(
        UserError, match=r"begun before there was sft\.optimizer.*finish it with commit aa22b70"
    ) as error:
        check_resumable(older, config)
    assert "\n" not in str(error.value)
    write_config(older, config)
    check_resumable(older, config)
    check_same_config(older, config)


def test_another_optimizer_is_another_run(older):
    config = load(Improve, TINY)
    other = dataclasses.replace(config, sft=dataclasses.replace(config.sft, optimizer=Lion()))
    with pytest.raises(UserError, match=r"a run of another config \(sft\.optimizer"):
        check_same_config(older, other)
    assert "optimizer" not in content(config)["sft"]
    assert fingerprint(content(other)) != fingerprint(content(config))


def test_versions_are_those_of_what_is_installed():
    """A run whose model and questions need no tensorflow-datasets ended in an error where it is missing."""
    assert versions(["jax", "no-such-package-of-anybody"]) == {"jax": jax.__version__}


def test_a_machine_without_git_knows_no_commit(monkeypatch, tmp_path):
    """A run ended in an error there, after its last phase."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
