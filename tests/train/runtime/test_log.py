"""Bars, the table at the end, and JSON lines that survive their writer."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from train import log
from train.report import rows
from train.runtime import jsonl

ROWS = [
    {"method": "base", "round": 0, "domain": "ood", "family": "all", "split": "test", "accuracy": 0.74, "low": 0.709,
     "high": 0.771, "n": 750, "seconds": 3.0},
    {"method": "base", "round": 0, "domain": "id", "family": "all", "split": "test", "accuracy": 0.33, "low": 0.284,
     "high": 0.376, "n": 400, "seconds": 2.0},
    {"method": "base", "round": 0, "domain": "id", "family": "gcd", "split": "test", "accuracy": 0.11, "low": 0.1,
     "high": 0.2, "n": 400, "seconds": 2.0},
    {"method": "base", "round": 0, "domain": "id", "family": "all", "split": "validation", "accuracy": 0.99,
     "low": 0.9, "high": 1.0, "n": 64, "seconds": 2.0},
    {"method": "imm", "round": 1, "domain": "id", "family": "all", "split": "validation", "accuracy": 0.425,
     "low": 0.3, "high": 0.5, "n": 64, "seconds": 1.25},
]  # fmt: skip


def test_table_piped_is_aligned_and_complete(capsys):
    rows.print_table({"name": "x", "finished": True, "rows": ROWS})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].split() == [
        "method",
        "round",
        "domain",
        "accuracy",
        "95",
        "%",
        "interval",
        "n",
        "tokens",
        "seconds",
    ]
    assert "33.0 %" in lines[2]
    assert "[28.4, 37.6]" in lines[2]
    assert "74.0 %" in lines[3]
    assert "in domain (validation)" in lines[4]
    assert len({len(line) for line in lines}) == 1


def test_table_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(rows, "rich_wanted", lambda: True)
    rows.print_table({"name": "[bold]", "finished": False, "rows": ROWS})
    out = capsys.readouterr().out
    assert "[bold] (unfinished)" in out
    assert "42.5 %" in out


def test_pooled_rows_order_and_split():
    kept = rows.pooled_rows(ROWS)
    assert [(r["method"], r["domain"], r["split"]) for r in kept] == [
        ("base", "id", "test"), ("base", "ood", "test"), ("imm", "id", "validation"),
    ]  # fmt: skip


def test_plain_progress(capsys, monkeypatch):
    monkeypatch.setattr(log, "PLAIN_EVERY_SECONDS", 0.0)
    with log.progress("sample round 1", total=512, unit="samples", done=256) as bar:
        bar.advance(128, note="41 % correct")
    out = capsys.readouterr().out.splitlines()
    assert "sample round 1: 384/512 samples" in out[0]
    assert "left · 41 % correct" in out[0]
    assert "took" in out[1]


def test_rich_progress(monkeypatch):
    monkeypatch.setattr(log, "rich_wanted", lambda: True)
    with log.progress("sft [1]", total=3) as bar:
        bar.advance(3, note="[red]")
    assert bar.done == 3


def test_quiet(capsys):
    previous = log.set_quiet(True)
    try:
        log.say("no")
        with log.progress("no", total=1) as bar:
            bar.advance()
        rows.print_table({"rows": ROWS})
    finally:
        log.set_quiet(previous)
    assert capsys.readouterr().out == ""


def test_jsonl_round_trip_and_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert jsonl.read_jsonl(path, torn="drop") == []
    jsonl.append_jsonl(path, {"a": 1, "θ": "é\n"})
    jsonl.append_jsonl(path, {"a": 2})
    whole = path.read_bytes()
    assert whole.count(b"\n") == 2
    path.write_bytes(whole + b'{"a": 3')
    assert [r["a"] for r in jsonl.read_jsonl(path, torn="drop")] == [1, 2]
    assert path.read_bytes() != whole
    with pytest.raises(log.UserError, match="last line is torn"):
        jsonl.append_jsonl(path, {"a": 3})
    assert [r["a"] for r in jsonl.read_jsonl(path, torn="mend")] == [1, 2]
    assert path.read_bytes() == whole
    jsonl.append_jsonl(path, {"a": 3})
    assert [r["a"] for r in jsonl.read_jsonl(path, torn="drop")] == [1, 2, 3]


@pytest.mark.parametrize("middle", [b'{"a": ', b"[1]", b"\xff\xfe", b""])
def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path, middle):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n' + middle + b'\n{"a": 3}\n')
    with pytest.raises(log.UserError, match=r"metrics\.jsonl:2: expected"):
        jsonl.read_jsonl(path, torn="drop")


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        jsonl.append_jsonl(tmp_path / "m.jsonl", {"loss": float("nan")})
    assert not (tmp_path / "m.jsonl").exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)  # fmt: skip
def test_format_seconds(seconds, text):
    assert log.format_seconds(seconds) == text


def test_import_is_light():
    code = "import train.log, sys; assert not {'rich', 'jax', 'flax'} & set(sys.modules); print(json.dumps({}))"
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-c", "import json; " + code], cwd=root, env={**os.environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}
