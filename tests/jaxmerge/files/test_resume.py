"""A merge killed anywhere and started again ends with the same bytes; what changed meanwhile is said."""

import json
import os
import pathlib
import signal
import textwrap

import numpy as np
import pytest
from helpers import forks
from helpers.dying_merge import merge_until
from safetensors.numpy import load_file, save_file

from jaxmerge.files import engine, merge
from jaxmerge.files import journal as journals

SHAPES = {
    "model.embed_tokens.weight": (40, 9),
    **{f"model.layers.{l}.mlp.up_proj.weight": (24, 9) for l in range(4)},
    "model.norm.weight": (9,),
}
RECIPE = """
merge_method: {method}
base_model: base
models:
  - {{model: one, parameters: {{weight: 0.3, density: 0.5}}}}
  - {{model: two, parameters: {{weight: 0.9, density: 0.6}}}}
seed: 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["base", "one", "two"]):
        rng = np.random.default_rng(seed)
        (tmp_path / name).mkdir()
        save_file(
            {tensor: rng.standard_normal(shape).astype(np.float32) for tensor, shape in SHAPES.items()},
            tmp_path / name / "model.safetensors",
        )
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def write(method):
    pathlib.Path("recipe.yaml").write_text(RECIPE.format(method=method))


def small_chunks(monkeypatch):
    monkeypatch.setattr(engine, "CHUNK", 64)
    monkeypatch.setattr(engine, "LENGTHS", (64,))


def snapshot(folder):
    files = {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}
    record = json.loads(files.pop("merge.json"))
    return files, record


def run(event):
    return forks.run(["recipe.yaml", "out"], os.environ, cwd=os.getcwd(), die=event, program=merge_until)


@pytest.mark.parametrize(
    ("method", "events"), [("task_arithmetic", (1, 3, 4, 9, 14, 8)), ("dare_ties", (1, 3, 4, 9, 7, 6))]
)
def test_killed_anywhere_it_ends_with_the_same_bytes(here, monkeypatch, method, events):
    write(method)
    small_chunks(monkeypatch)
    merge("recipe.yaml", "whole")
    # Each life gets a little further than the last: it begins with what is left.
    for event in events:
        died = run(event)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert not (here / "out").exists()
    assert list((here / ".out.merging" / "result").iterdir())
    ended = run(10**9)
    assert ended.returncode == 0, ended.stderr
    assert snapshot("out") == snapshot("whole")
    assert not (here / ".out.merging").exists()


def journal_lines():
    return (pathlib.Path(".out.merging") / "journal.jsonl").read_bytes().splitlines(keepends=True)


def interrupt(monkeypatch, after):
    """Merge until `after` tensors are done, then stop as Ctrl-C does."""
    add, count = journals.Journal.add, 0

    def counting(self, record):
        nonlocal count
        if count == after:
            raise KeyboardInterrupt
        count += 1
        add(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(journals.Journal, "add", counting)
        with pytest.raises(KeyboardInterrupt):
            merge("recipe.yaml", "out")


def test_only_what_is_missing_is_merged_again(here, monkeypatch):
    write("ties")
    merge("recipe.yaml", "whole")
    interrupt(monkeypatch, after=3)
    assert len(journal_lines()) == 4
    seen = []
    report = merge("recipe.yaml", "out", progress=lambda read, total, name: seen.append(name))
    assert len(seen) == len(SHAPES) - 3
    assert "3 of 6 tensors were there already" in report["notes"]
    assert snapshot("out") == snapshot("whole")


def test_a_line_cut_short_and_bytes_that_never_reached_the_disk(here, monkeypatch):
    write("ties")
    merge("recipe.yaml", "whole")
    interrupt(monkeypatch, after=4)
    path = here / ".out.merging" / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    weights = here / ".out.merging" / "result" / "model.safetensors"
    first = json.loads(journal_lines()[1])["tensor"]
    raw = bytearray(weights.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    begin = json.loads(raw[8 : 8 + size])[first]["data_offsets"][0]
    raw[8 + size + begin : 8 + size + begin + 16] = bytes(16)
    weights.write_bytes(raw)
    report = merge("recipe.yaml", "out")
    assert f"{first} had not reached the disk; merged again" in report["notes"]
    assert "2 of 6 tensors were there already" in report["notes"]
    assert snapshot("out") == snapshot("whole")


def test_the_same_bytes_with_another_time_are_gone_on_with(here, monkeypatch):
    write("ties")
    interrupt(monkeypatch, after=3)
    os.utime(here / "one" / "model.safetensors", ns=(1, 1))  # as after a copy: digested, found the same
    interrupt(monkeypatch, after=0)
    assert len(journal_lines()) == 4


def added(path):
    arrays = load_file(path)
    for array in arrays.values():
        array += 1
    save_file(arrays, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            added,
            "tensor '.*' of one/model.safetensors has changed since this merge was begun; put it back to go on, or",
        ),
        (
            lambda path: save_file(load_file(path), path, metadata={"longer": "than before"}),
            r"one/model.safetensors has changed since .* \(\d+ bytes then, \d+ bytes now\); put it back to go on, or",
        ),
    ],
)
def test_an_input_that_changed_is_named_and_nothing_lost(here, monkeypatch, change, words):
    write("ties")
    merge("recipe.yaml", "whole")
    interrupt(monkeypatch, after=3)
    lines = journal_lines()
    assert len(lines) == 4
    path = here / "one" / "model.safetensors"
    before = path.read_bytes()
    change(path)
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            merge("recipe.yaml", "out")
        assert journal_lines() == lines
    path.write_bytes(before)
    report = merge("recipe.yaml", "out")
    assert "3 of 6 tensors were there already" in report["notes"]
    assert snapshot("out")[0] == snapshot("whole")[0]


@pytest.mark.parametrize("line", [1, 2, 3])
@pytest.mark.parametrize(
    "damage",
    [
        lambda line: bytes(len(line) - 1) + b"\n",
        lambda line: line.replace(b'"tensor":"m', b'"tensor":"n').replace(b"3,", b"4,"),
    ],
    ids=["zeros", "a letter"],
)
def test_a_damaged_line_loses_what_follows_it(here, monkeypatch, line, damage):
    write("ties")
    merge("recipe.yaml", "whole")
    interrupt(monkeypatch, after=4)
    lines = journal_lines()
    lines[line - 1] = damage(lines[line - 1])
    (here / ".out.merging" / "journal.jsonl").write_bytes(b"".join(lines))
    report = merge("recipe.yaml", "out")
    (note,) = (note for note in report["notes"] if "was damaged" in note)
    assert note.startswith(f"line {line} of ")
    assert any(f"{line - 2} of 6 tensors were there already" in note for note in report["notes"]) == (line > 2)
    assert snapshot("out") == snapshot("whole")


def test_a_line_taken_in_parts_is_whole(here):
    record = {"tensor": "w", "digest": "", "inputs": [], "statistics": {}}
    first = journals.Journal(here / "out", "plan", {})
    first.open()
    file = first._file

    class Sparing:
        def write(self, data):
            return file.write(data[:7])

    first._file = Sparing()
    first.add(record)
    file.close()
    second = journals.Journal(here / "out", "plan", {})
    second.open()
    second.close()
    assert second.done == {"w": record}
    assert second.notes == []


def test_another_recipe_begins_again(here, monkeypatch):
    write("ties")
    interrupt(monkeypatch, after=3)
    write("task_arithmetic")
    report = merge("recipe.yaml", "out")
    assert "an unfinished merge into out of another recipe, tokenizer or version is gone" in " ".join(report["notes"])
    merge("recipe.yaml", "whole")
    assert snapshot("out") == snapshot("whole")


def test_done_is_done(here):
    write("ties")
    merge("recipe.yaml", "out")
    report = merge("recipe.yaml", "out")
    assert "out is there already, merged from the same files" in report["notes"]
    os.utime(here / "one" / "model.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match="out exists already; give another output folder, or remove it"):
        merge("recipe.yaml", "out")


def test_two_at_once_are_refused(here, monkeypatch):
    write("ties")

    def second(*_):
        with pytest.raises(ValueError, match="another process is merging into out now"):
            merge("recipe.yaml", "out")

    merge("recipe.yaml", "out", progress=second)


def test_stages_resume_too(here, monkeypatch):
    pathlib.Path("recipe.yaml").write_text(
        textwrap.dedent("""
        name: mean
        merge_method: linear
        models: [{model: one}, {model: two}]
        parameters: {weight: 0.5}
        ---
        merge_method: interpolate
        models: [{model: base}, {model: mean}]
        parameters: {t: 0.25}
        """)
    )
    merge("recipe.yaml", "whole")
    interrupt(monkeypatch, after=3)  # of the second stage, or of the first: Journal.add is counted in both
    report = merge("recipe.yaml", "out")
    assert report["tensors"] == len(SHAPES)
    found, whole = load_file("out/model.safetensors"), load_file("whole/model.safetensors")
    arrays = {name: load_file(f"{name}/model.safetensors") for name in ("base", "one", "two")}
    for name, array in found.items():
        assert np.array_equal(array, whole[name])
        mean = (arrays["one"][name] + arrays["two"][name]) / 2
        np.testing.assert_allclose(array, 0.75 * arrays["base"][name] + 0.25 * mean, rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in here.iterdir() if path.name.startswith(".")) == []
