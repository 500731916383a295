"""The folder of a run: what a kill in the middle of a commit or of its undoing leaves, and what a record then says."""

from __future__ import annotations

import shutil

import pytest

from train.log import UserError
from train.runtime import journal
from train.runtime.journal import Journal
from train.runtime.jsonl import read_jsonl

NAME = "round-1/plain/sft"


def committed(root) -> None:
    with Journal(root) as ours:
        (ours.folder(NAME) / "batch.jsonl").write_text("old")
        ours.commit(NAME, {"kind": "sft"})


@pytest.mark.parametrize("left", [(), ("batch.jsonl",), ("batch.jsonl", "record.json")])
def test_a_kill_while_a_phase_is_undone_leaves_a_run_that_goes_on(tmp_path, monkeypatch, left):
    """Whatever files the removal had come to."""
    committed(tmp_path)
    remove = shutil.rmtree

    def killed(path, **options):
        if path.name.endswith(".gone.partial") and not path.exists():
            return
        for file in path.iterdir():
            if file.name not in left:
                file.unlink()
        raise KeyboardInterrupt

    with Journal(tmp_path) as ours:
        monkeypatch.setattr(journal.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            ours.uncommit(NAME)
        monkeypatch.setattr(journal.shutil, "rmtree", remove)
    with Journal(tmp_path) as ours:
        assert ours.committed(NAME) is None
        assert not list(ours.folder(NAME).iterdir())
        ours.commit(NAME, {"kind": "sft", "again": True})
    with Journal(tmp_path) as ours:
        assert ours.committed(NAME) == {"phase": NAME, "kind": "sft", "again": True}
    assert [p.name for p in (tmp_path / "phases/round-1/plain").iterdir()] == ["sft"]


def test_a_folder_without_its_record_is_made_again(tmp_path):
    """As a kill within the removal left it before the rename came first."""
    committed(tmp_path)
    (tmp_path / "phases" / NAME / "record.json").unlink()
    with Journal(tmp_path) as ours:
        assert ours.committed(NAME) is None
        ours.folder(NAME)
        ours.commit(NAME, {"kind": "sft"})
    assert [p.name for p in (tmp_path / "phases" / NAME).iterdir()] == ["record.json"]


def test_a_phase_that_was_cut_off_says_so(tmp_path):
    with Journal(tmp_path) as ours:
        ours.folder(NAME)
    with Journal(tmp_path) as ours:
        ours.folder(NAME)
        ours.folder("base/load")
        assert ours.commit(NAME, {})["resumed"] is True
        assert "resumed" not in ours.commit("base/load", {})


def test_half_a_surrogate_pair_is_refused_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}\n{"a": ["x \\uD83D"]}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: \\ud83d is half of a pair"):
        read_jsonl(path)
    path.write_text('{"a": "\\ud83d\\ude00, \\\\ud83d"}\n')
    assert read_jsonl(path) == [{"a": "😀, \\ud83d"}]
