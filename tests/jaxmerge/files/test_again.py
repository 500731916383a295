"""The same command again, of stages, as Orbax, with tokenizers: what is there is known, what is not is not claimed."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from helpers.llamas import WIDE, folder, load, tensors
from safetensors.numpy import save_file

from jaxmerge.files import disk, engine, journal, merge, stream
from jaxmerge.files.checkpoints import orbax
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read

STAGES = """
name: {name}
merge_method: linear
models: [{{model: one}}, {{model: two}}]
parameters: {{weight: 0.5}}
---
merge_method: interpolate
models: [{{model: base}}, {{model: {name}}}]
parameters: {{t: 0.25}}
"""
ALONE = "merge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 0.5}\n"
COMMANDS = {
    "alone": (ALONE, {}),
    "stages": (STAGES.format(name="mean"), {}),
    "orbax": (ALONE, {"format": "orbax"}),
    "stages, orbax": (STAGES.format(name="result"), {"format": "orbax"}),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["base", "one", "two"]):
        folder(name, tensors(seed, layers=1), layers=1)
    return tmp_path


def write(text):
    pathlib.Path("recipe.yaml").write_text(text)


def hidden():
    return sorted(path.name for path in pathlib.Path().iterdir() if path.name.startswith("."))


def untouched(monkeypatch):
    """From here on, merging a tensor is an error."""

    def broken(*_):
        raise AssertionError("merged again")

    monkeypatch.setattr(engine, "merge_arrays", broken)


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_same_command_again_does_nothing(here, monkeypatch, kind):
    text, options = COMMANDS[kind]
    write(text)
    first = merge("recipe.yaml", "out", **options)
    with monkeypatch.context() as patch:
        untouched(patch)
        again = merge("recipe.yaml", "out", **options)
        assert again["notes"] == [*first["notes"], "out is there already, merged from the same files"]
        assert {**again, "notes": 0, "seconds": 0} == {**first, "notes": 0, "seconds": 0}
        # Another command, or other inputs: refused before anything is merged.
        os.utime("two/model.safetensors", ns=(1, 1))
        for change in ({}, {"seed": 1}, {"format": "orbax"}, {"format": "safetensors"}):
            with pytest.raises(ValueError, match="out exists already; give another output folder, or remove it"):
                merge("recipe.yaml", "out", **{**options, **change})
        assert hidden() == []


@pytest.mark.parametrize("kind", COMMANDS)
def test_killed_after_the_last_rename_it_is_there(here, monkeypatch, kind):
    """Before what is between is removed, or while it is."""
    text, options = COMMANDS[kind]
    write(text)

    def killed(it, **_):
        if isinstance(it, pathlib.Path):
            for inside in it.glob("stages/*/config.json"):
                inside.unlink()
            raise KeyboardInterrupt
        if it.out.name == "out":
            raise KeyboardInterrupt
        shutil.rmtree(it.folder)

    class Remover:
        rmtree = staticmethod(killed)

    # Orbax's own folder has no journal.
    places = [(stream, "shutil", Remover), (journal.Journal, "remove", killed)]
    for place, name, killer in places[: 1 if "format" in options else 2]:
        shutil.rmtree("out", ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, killer)
            with pytest.raises(KeyboardInterrupt):
                merge("recipe.yaml", "out", **options)
        with monkeypatch.context() as patch:
            untouched(patch)
            assert "out is there already, merged from the same files" in merge("recipe.yaml", "out", **options)["notes"]
        assert hidden() == []


def lora(path, seed):
    """An adapter of the first layer's q_proj."""
    path.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    shapes = {"lora_A": (2, WIDE), "lora_B": (WIDE, 2)}
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{prefix}.{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
        path / "adapter_model.safetensors",
    )
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')


def test_all_that_stages_read_is_compared(here):
    lora(here / "lora", 0)
    write(STAGES.format(name="mean").replace("{model: mean}", "{model: mean+lora}"))
    for change in (
        lambda: (here / "one" / "config.json").write_text('{"model_type": "llama"}'),
        lambda: (here / "two" / "tokenizer.json").write_text("{}"),
        lambda: lora(here / "lora", 1),
    ):
        merge("recipe.yaml", "out")
        assert merge("recipe.yaml", "out")["notes"][-1] == "out is there already, merged from the same files"
        change()
        with pytest.raises(ValueError, match="out exists already"):
            merge("recipe.yaml", "out")
        shutil.rmtree("out")


def test_a_stage_that_is_done_is_gone_on_with_or_named(here, monkeypatch):
    text, _ = COMMANDS["stages"]
    write(text)
    rename = pathlib.Path.rename

    def stopped(self, target):
        rename(self, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", stopped)
        with pytest.raises(KeyboardInterrupt):
            merge("recipe.yaml", "out")
    write(text.replace("weight: 0.5", "weight: 0.75"))
    with pytest.raises(
        ValueError, match="stages/mean, which is done, is of another recipe or other inputs; put these b"
    ):
        merge("recipe.yaml", "out")
    write(text)
    seen = []
    merge("recipe.yaml", "out", progress=lambda done, total, name: seen.append(name))
    assert sorted(seen) == sorted(load("one"))  # those of the result alone
    assert hidden() == []


def test_a_stage_may_be_called_what_the_result_is(here):
    write(COMMANDS["stages, orbax"][0])
    merge("recipe.yaml", "out", format="orbax")
    found = {name: read(tensor) for name, tensor in open_source("out").tensors.items()}
    arrays = {name: load(name) for name in ("base", "one", "two")}
    for name, array in found.items():
        mean = (arrays["one"][name] + arrays["two"][name]) / 2
        np.testing.assert_allclose(array, 0.75 * arrays["base"][name] + 0.25 * mean, rtol=1e-5, atol=1e-6)
    record = json.loads(pathlib.Path("out/merge.json").read_text())
    assert record["recipe"] == COMMANDS["stages, orbax"][0]  # of all stages


@pytest.mark.parametrize("name", ["../mean", "a/b", ".mean"])
def test_stage_names_are_names_of_folders(here, name):
    write(STAGES.format(name=name))
    with pytest.raises(ValueError, match=r"the stage name .* is no name of a folder; leave out '/', and '\.' at the"):
        merge("recipe.yaml", "out")
    # The result's name is no folder's.
    write("name: org/model\n" + ALONE)
    merge("recipe.yaml", "out")


@pytest.mark.parametrize("write_it", ["safetensors", "orbax"])
def test_all_is_flushed_before_it_gets_its_name(here, monkeypatch, write_it):
    synced, named = [], []
    sync, rename = disk.sync, pathlib.Path.rename
    monkeypatch.setattr(disk, "sync", lambda path: (synced.append(pathlib.Path(path)), sync(path)))

    def renamed(self, target):
        if pathlib.Path(target).name == "out":
            named.append((self, list(synced)))
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", renamed)
    if write_it == "orbax":
        orbax.write(here / "one", here / "out")
    else:
        write(ALONE)
        merge("recipe.yaml", "out")
    ((before, flushed),) = named
    order = {path.relative_to(before): place for place, path in enumerate(flushed) if path.is_relative_to(before)}
    made = [path.relative_to("out") for path in (pathlib.Path("out"), *pathlib.Path("out").rglob("*"))]
    assert set(order) == set(made)
    assert all(order[path] < order[path.parent] for path in made if path.parts)
    if write_it == "orbax":
        assert any(len(path.parts) > 2 for path in made)


# --- tokenizers ---

TOKENS = ("shared", "b", "x")


def vocabulary(name, words):
    """A folder whose embedding has a row a word; returns its tokenizer.json."""
    arrays = tensors(ord(name[0]), layers=1)
    arrays |= {key: arrays[key][: len(words)] for key in ("model.embed_tokens.weight", "lm_head.weight")}
    shutil.rmtree(name, ignore_errors=True)
    folder(name, arrays, layers=1, vocab_size=len(words))
    path = pathlib.Path(name) / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {word: i for i, word in enumerate(words)}}}))
    return path


def swapped(path):
    state = json.loads(path.read_text())
    vocab = state["model"]["vocab"]
    vocab["shared"], vocab["b"] = vocab["b"], vocab["shared"]
    path.write_text(json.dumps(state))


@pytest.mark.parametrize("which", ["base", "two"])
def test_another_tokenizer_is_another_merge(here, monkeypatch, which):
    """Rows are gathered by its numbers: what was merged by others must not be gone on with."""
    files = {"base": vocabulary("base", ["a", "b", "shared"]), "two": vocabulary("two", TOKENS)}
    write(
        "merge_method: linear\nmodels: [{model: base}, {model: two}]\nparameters: {weight: 0.5}\n"
        "tokenizer: {source: union}\n"
    )
    add, done = journal.Journal.add, []

    def some(self, record):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(record)
        add(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", some)
        with pytest.raises(KeyboardInterrupt):
            merge("recipe.yaml", "out")
    swapped(files[which])
    report = merge("recipe.yaml", "out")
    assert any("of another recipe, tokenizer or version is gone" in note for note in report["notes"])
    merge("recipe.yaml", "whole")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (here / "out" / name).read_bytes() == (here / "whole" / name).read_bytes()
    swapped(files[which])
    with pytest.raises(ValueError, match="out exists already; give another output folder, or remove it"):
        merge("recipe.yaml", "out")


BEGIN = """
import os, pathlib, signal, sys
from jaxmerge.files.disk import new_folder
with new_folder(pathlib.Path(sys.argv[1])) as partial:
    (partial / "weights").write_bytes(b"0" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_kill_left_is_removed_by_the_next_and_what_is_being_written_is_not(tmp_path):
    out = tmp_path / "a[1]"  # a name that a pattern would read otherwise
    with disk.new_folder(out) as ours:
        (ours / "weights").write_bytes(b"1" * 10)
        killed = subprocess.run([sys.executable, "-c", BEGIN, str(out)], cwd=ROOT, check=False)
        assert killed.returncode == -signal.SIGKILL
        left = [path for path in tmp_path.iterdir() if path != ours]
        assert len(left) == 1
        assert (left[0] / "weights").stat().st_size == 1000
        with pytest.raises(KeyError), disk.new_folder(out):
            raise KeyError
        assert [*tmp_path.iterdir()] == [ours]
    assert [*tmp_path.iterdir()] == [out]
    assert (out / "weights").read_bytes() == b"1" * 10


def test_what_another_user_left_is_in_nobodys_way(tmp_path, monkeypatch):
    left = tmp_path / ".out.partial-theirs"
    left.mkdir(mode=0o700)
    real = os.open

    def opened(path, *rest, **more):
        if pathlib.Path(path) == left:  # root, as which tests may run, is let in
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(disk.os, "open", opened)
    with disk.new_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", left.name}


# --- what is left behind, and room for what is made ---


def test_an_error_in_a_stage_leaves_nothing(here):
    """The first stage is done when the second is refused."""
    write(STAGES.format(name="mean").replace("model: base", "model: short"))
    short = tensors(0, layers=1)
    folder("short", {name: array for name, array in short.items() if "norm" not in name}, layers=1)
    before = sorted(p.name for p in here.iterdir())
    with pytest.raises(ValueError, match="norm"):
        merge("recipe.yaml", "out")
    assert sorted(p.name for p in here.iterdir()) == before


def test_a_result_as_orbax_needs_room_for_both_copies(here, monkeypatch):
    write(ALONE)
    size = merge("recipe.yaml", "out", format="orbax", dry_run=True)["bytes_out"]
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size - 1))
    with pytest.raises(ValueError, match="no space left"):
        merge("recipe.yaml", "out", format="orbax")
    assert not list(here.glob(".out.*/result/*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size))
    assert merge("recipe.yaml", "out", format="orbax")["tensors"]
