"""Laws of the dataset files: what is written comes back, in order, whole or not at all."""

import json
import os
import subprocess
import sys
from typing import Any, cast

import numpy as np
import pytest
from helpers import ROOT

from train.data.versions import FIELDS, read_version, write_version
from train.log import UserError
from train.runtime.jsonl import read_jsonl, write_jsonl

PROVENANCE = {"round": 1, "method": "plain", "model": "sha256:ab", "seed": 7, "sampling": {"temperature": 0.8, "n": 4}}


def example(i, **changes):
    return {
        "question_id": f"chain_sum-{i:012x}",
        "family": "chain_sum",
        "prompt": f"Was ist {i} + 1?\nAntwort ²",
        "completion": f"{i + 1}",
        "tokens": list(range(i % 7 + 1)),
        "prompt_length": i % 7,
        "score": 1.0,
        "weight": 0.5,
        "sample": i % 4,
        **changes,
    }


def test_round_trip_keeps_order_and_types(tmp_path):
    examples = [example(i) for i in reversed(range(60))]
    write_version(tmp_path, "round_1", "1.0.0", examples, PROVENANCE)
    back, provenance = read_version(tmp_path, "round_1", "1.0.0")
    assert back == examples
    assert provenance == PROVENANCE
    assert {key: type(value) for key, value in back[0].items()} == FIELDS
    assert sorted(p.name for p in (tmp_path / "round_1").iterdir()) == ["1.0.0"]


def test_no_examples_and_no_tokens(tmp_path):
    write_version(tmp_path, "none", "1.0.0", [], {})
    assert read_version(tmp_path, "none", "1.0.0") == ([], {})
    write_version(tmp_path, "bare", "1.0.0", [example(0, tokens=[], prompt_length=0)], {})
    assert read_version(tmp_path, "bare", "1.0.0")[0][0]["tokens"] == []


def test_writing_again_is_allowed_only_with_the_same_contents(tmp_path):
    rows = [example(0, weight=0.1), example(1)]  # 0.1 is no 32-bit float
    write_version(tmp_path, "round_1", "1.0.0", rows, PROVENANCE)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "round_1" / "1.0.0").iterdir()}
    write_version(tmp_path, "round_1", "1.0.0", rows, PROVENANCE)
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "round_1" / "1.0.0").iterdir()}
    for other in ([rows[::-1], PROVENANCE], [rows, {**PROVENANCE, "round": 2}]):
        with pytest.raises(UserError, match="a version never changes"):
            write_version(tmp_path, "round_1", "1.0.0", *other)


def test_any_damaged_file_is_an_error_that_names_it(tmp_path):
    for name in ("dataset_info.json", "features.json", "metadata.json", "d-train.array_record-00000"):
        write_version(tmp_path / name, "d", "1.0.0", [example(i) for i in range(5)], PROVENANCE)
        path = tmp_path / name / "d" / "1.0.0" / name
        data = path.read_bytes()
        path.write_bytes(data[:-3])
        with pytest.raises(UserError, match=f"{name}.*truncated"):
            read_version(tmp_path / name, "d", "1.0.0")
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name}.*other contents"):
            read_version(tmp_path / name, "d", "1.0.0")
        path.unlink()
        with pytest.raises(UserError, match=f"{name}.*missing"):
            read_version(tmp_path / name, "d", "1.0.0")
    with pytest.raises(UserError, match=r"no such dataset version; there are: 1\.0\.0"):
        read_version(tmp_path / "metadata.json", "d", "2.0.0")


def test_a_writer_that_dies_leaves_nothing_and_the_next_one_succeeds(tmp_path, monkeypatch):
    def die(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die)
        with pytest.raises(UserError, match="No space left on device"):
            write_version(tmp_path, "d", "1.0.0", [example(0)], {})
    assert list((tmp_path / "d").iterdir()) == []
    left = tmp_path / "d" / ".1.0.0.partial" / "d" / "1.0.0"  # as kill -9 leaves it
    left.mkdir(parents=True)
    (left / "d-train.array_record-00000").write_bytes(b"torn")
    write_version(tmp_path, "d", "1.0.0", [example(0)], {})
    assert read_version(tmp_path, "d", "1.0.0")[0] == [example(0)]
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["1.0.0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "abc"}, "tokens is 'abc', expected list"),
        ({"prompt": None}, "prompt is None, expected str"),
        ({"score": None}, "score is None, expected float"),
        ({"prompt_length": 99}, "the prompt is a part of the tokens"),
        ({"extra": 1}, r"not understood \['extra'\]"),
    ],
)
def test_bad_examples_are_named_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=f"example 1.*{message}"):
        write_version(tmp_path, "d", "1.0.0", [example(0), example(1, **changes)], {})
    assert list(tmp_path.iterdir()) == []


def test_bad_names_and_provenance(tmp_path):
    with pytest.raises(UserError, match="'Round 1'"):
        write_version(tmp_path, "Round 1", "1.0.0", [], {})
    with pytest.raises(UserError, match=r"major\.minor\.patch"):
        write_version(tmp_path, "d", "1", [], {})
    with pytest.raises(UserError, match="JSON values only"):
        write_version(tmp_path, "d", "1.0.0", [], {"digest": np.zeros(2)})


def test_tensorflow_is_not_imported_and_tfds_opens_the_version(tmp_path):
    program = f"""
import sys
from typing import Any, cast
import train.data.versions as dataset
assert "tensorflow_datasets" not in sys.modules, "imported before it is needed"
dataset.write_version({str(tmp_path)!r}, "d", "1.0.0", [{example(3)!r}], {{}})
assert dataset.read_version({str(tmp_path)!r}, "d", "1.0.0")[0] == [{example(3)!r}]
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory({str(tmp_path / "d" / "1.0.0")!r})
assert builder.info.splits["train"].num_examples == 1
assert list(tfds.data_source("d", data_dir={str(tmp_path)!r}, split="train"))[0]["family"] == b"chain_sum"
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)


def test_jsonl_round_trip_and_errors(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a\u2028b", "n": 1}, {"prompt": "ü", "n": None}]
    write_jsonl(path, rows)
    assert read_jsonl(path, required=["prompt"]) == rows
    assert len(path.read_text(encoding="utf-8").split("\n")) == 3
    for line, message in [
        ('{"prompt": ', "rows.jsonl:3: no JSON"),
        ("[1]", "rows.jsonl:3: expected a JSON object, found list"),
        ('{"prompt": "", "n": NaN}', r"rows.jsonl:3: no JSON \(NaN is no number of JSON; write null"),
        ('{"prompt": "", "n": [-Infinity]}', r"rows.jsonl:3: no JSON \(-Infinity is no number of JSON"),
        ('{"promt": 1}', "rows.jsonl:3: missing prompt; found the keys promt"),
    ]:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows) + line + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_jsonl(path, required=["prompt"])
    with pytest.raises(UserError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        read_jsonl(path)


def test_jsonl_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(UserError, match="no JSON"):
        write_jsonl(path, [{"a": 2}, {"a": float("nan")}])
    with pytest.raises(UserError, match="could not be written"):
        write_jsonl(path / "rows.jsonl", [{"a": 1}])  # below a file
    assert read_jsonl(path) == [{"a": 1}]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("name", ["pipe", "folder", "/dev/zero"])
def test_what_is_no_plain_file_is_refused_at_once(tmp_path, name):
    """A pipe that nobody writes to would hold us up for ever; a device has no end."""
    from train.data.builders import JsonLines
    from train.data.rows import read_rows
    from train.learn.sources import with_template

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    tokenizer = cast(Any, None)  # not looked at
    readers = [
        read_jsonl, read_rows, lambda path: read_jsonl(path, torn="drop"), lambda path: read_jsonl(path, torn="mend"),
        lambda path: JsonLines(path=path, data_dir=tmp_path / "data"), lambda path: with_template(tokenizer, str(path)),
    ]  # fmt: skip
    for read in readers:
        with pytest.raises(UserError, match=rf"{name} is no plain file but a folder, a pipe or a device; give a file"):
            read(path)
