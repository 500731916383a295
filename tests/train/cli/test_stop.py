"""How a verb ends that is asked to stop, whose output nobody takes, or whose result has nowhere to go."""

import errno
import io
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT
from helpers.tiny_adapters import adapter_folder, factors
from safetensors.numpy import load_file, save_file

from jaxmerge.files.checkpoints import orbax, safetensors
from jaxmerge.files.journal import Journal, count_done
from train.cli import __main__ as cli
from train.cli.verbs import VERBS
from train.log import UserError, say
from train.runtime.checkpoint import failure_named
from train.runtime.disk import new_folder
from train.runtime.jsonl import append_jsonl

RECIPE = (
    "merge_method: linear\nmodels:\n- {model: one, parameters: {weight: 1}}\n- {model: two, parameters: {weight: 1}}\n"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two models and a recipe, in the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        arrays = {f"model.layers.{i}.mlp.up_proj.weight": rng.standard_normal((8, 8), np.float32) for i in range(5)}
        save_file(arrays, f"{name}/model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# --- signals ---


@pytest.fixture(autouse=True)
def started_from_a_terminal():
    """A process that a shell started in the background ignores Ctrl-C, and so do the tests in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_ends_on_one_line(verb, number, monkeypatch, capsys):
    def run(name, words):
        assert signal.getsignal(number) is signal.default_int_handler  # else it would end this process
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(cli, "run", run)
    before = signal.getsignal(number)
    words = ["nowhere.yaml", "out"] if verb == "merge" else []  # of which nothing is written
    assert cli.main([verb, *words]) == (75 if verb in ("improve", "sft", "search", "tune") else 130)
    assert signal.getsignal(number) is before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"jaxmerge {verb}: stopped; ")


def test_a_signal_that_is_passed_over_stays_so(monkeypatch):
    """Under nohup, or in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(cli, "run", lambda name, words: os.kill(os.getpid(), signal.SIGINT) or 0)
        assert cli.main(["doctor"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_merge_that_was_stopped_says_what_is_there_and_goes_on(here, number, monkeypatch, capsys):
    assert cli.main(["merge", "recipe.yaml", "whole"]) == 0
    write, count = safetensors.Writer.write, 0

    def stopped(*args, **keywords):
        nonlocal count
        count += 1
        if count == 4:
            os.kill(os.getpid(), number)
        return write(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.Writer, "write", stopped)
        assert cli.main(["merge", "recipe.yaml", "out"]) == 75
    out = capsys.readouterr()
    assert out.err.splitlines() == ["jaxmerge merge: stopped; the same command goes on from what is saved"]
    assert not (here / "out").exists()
    assert cli.main(["merge", "recipe.yaml", "out"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch("[3-5] tensors of an unfinished merge into out are there", said[0])
    assert not [name for name in names(here) if name.startswith(".")]
    for name, array in load_file("whole/model.safetensors").items():
        np.testing.assert_array_equal(load_file("out/model.safetensors")[name], array)


@pytest.mark.parametrize("done", [0, 1])
def test_a_merge_of_adapters_says_whether_something_is_kept(tmp_path, done, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    modules = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    for seed, name in enumerate(("one", "two")):
        arrays = factors(modules[0], (8, 6), 3, seed) | factors(modules[1], (8, 6), 3, seed + 5)
        adapter_folder(tmp_path / name, arrays, target_modules=["down_proj"], base_model_name_or_path="org/base")
    (tmp_path / "recipe.yaml").write_text(f"adapter: core\n{RECIPE}")
    add, count = Journal.add, 0

    def stopped(self, record):
        nonlocal count
        if count == done:
            os.kill(os.getpid(), signal.SIGTERM)
        count += 1
        add(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stopped)
        assert cli.main(["merge", "recipe.yaml", "out"]) == (75 if done else 130)
    said = "the same command goes on from what is saved" if done else "nothing is kept, the same command begins again"
    assert capsys.readouterr().err == f"jaxmerge merge: stopped; {said}\n"
    assert cli.main(["merge", "recipe.yaml", "out"]) == 0
    said = capsys.readouterr().out
    assert ("1 tensors of an unfinished merge into out are there" in said) == bool(done)
    assert ("1 of 2 modules were there already" in said) == bool(done)
    assert names(tmp_path) == ["one", "out", "recipe.yaml", "two"]


def test_a_stage_that_is_done_is_something_to_go_on_from(here, monkeypatch, capsys):
    (here / "recipe.yaml").write_text(f"{RECIPE}name: mean\n---\n{RECIPE.replace('model: one', 'model: mean')}")
    add, count = Journal.add, 0

    def stopped(self, record):
        nonlocal count
        count += 1
        if count <= 5:  # the tensors of the stage
            add(self, record)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stopped)
        assert cli.main(["merge", "recipe.yaml", "out"]) == 75
    assert count_done(here / "out") == 0
    assert capsys.readouterr().err == "jaxmerge merge: stopped; the same command goes on from what is saved\n"
    assert cli.main(["merge", "recipe.yaml", "out"]) == 0
    assert names(here) == ["one", "out", "recipe.yaml", "two"]


def test_an_adapter_that_was_stopped_leaves_nothing(here, monkeypatch, capsys):
    before = names(here)
    monkeypatch.setattr(safetensors.Writer, "write", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["extract-lora", "one", "two", "adapter", "rank=2"]) == 130
    assert names(here) == before
    assert capsys.readouterr().err == "jaxmerge extract-lora: stopped; nothing is kept, the same command begins again\n"


# --- an output that nobody takes ---


def run(*words, stdout):
    command = [sys.executable, "-m", "train.cli", *words]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["merge", "--help"], ["completion", "bash"]])
def test_a_closed_output_ends_a_verb_quietly(words):
    ours, theirs = os.pipe()
    os.close(ours)
    done = run(*words, stdout=theirs)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_output_ends_a_verb_quietly(here):
    with open("/dev/full", "w") as full:
        assert (run("--help", stdout=full).returncode, run("--help", stdout=full).stderr) == (141, "")
        done = run("inspect", str(here / "one"), str(here / "two"), stdout=full)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_output_is_no_full_disk(tmp_path, monkeypatch, capsys):
    """What a line of progress raises inside the writing of a folder is not said of that folder."""

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    def run(name, words):
        with new_folder(tmp_path / "out"):
            say("x")

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(cli, "run", run)
    assert cli.main(["doctor"]) == 141
    assert capsys.readouterr().err == ""
    assert names(tmp_path) == []


# --- results that have nowhere to go ---

LONG = "x" * 240
OUTPUTS = {
    "a long name": (LONG, r"x{60}…: a name of 240 bytes; at most 237"),
    "a long folder": (f"{'y' * 256}/out", "a folder in it has a name of more than 255 bytes"),
    "a long path": ("/".join(["z" * 100] * 37), "a path of .* bytes; at most 3595"),
    "a link": ("link", "link is a link to elsewhere; give what it stands for"),
    "no name": ("..", "names no new file or folder"),
    "below a file": ("recipe.yaml/out", "recipe.yaml is no folder"),
}
WORDS = {
    "merge": ["nowhere.yaml", "OUT"],
    "extract-lora": ["nowhere", "nowhere", "OUT", "rank=2"],
    "export": ["nowhere", "OUT"],
    "sample": ["nowhere", "nowhere.jsonl", "OUT"],
    "inspect": ["nowhere", "nowhere", "json=OUT"],
    "evaluate": ["nowhere", "nowhere.jsonl", "out=OUT"],
    "harness": ["nowhere", "none", "out=OUT"],
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("verb", WORDS)
def test_outputs_are_refused_before_work(here, verb, kind, capsys):
    """Before the inputs, which are nowhere here, are looked for."""
    out, message = OUTPUTS[kind]
    (here / "link").symlink_to("elsewhere")
    before = names(here)
    assert cli.main([verb, *[word.replace("OUT", out) for word in WORDS[verb]]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert len(line) < 400
    assert names(here) == before


# --- a full disk ---


def test_a_full_disk_names_the_file(tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(cli, "run", lambda name, words: append_jsonl(path, {"a": 1}))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == f"jaxmerge doctor: {path}: No space left on device\n"


def test_a_checkpoint_that_found_no_room_leaves_nothing(tmp_path, capsys):
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    wanted = pytest.raises(UserError, match=r"3: the checkpoint could not be written \(no space left\)")
    with wanted, failure_named(tmp_path / "3"):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']")
    assert names(tmp_path) == []


@pytest.fixture
def no_failure_before(monkeypatch):
    if orbax._STRAYS.installed:  # by a failure that another test met
        orbax._STRAYS.remove()
    strays = orbax._Strays()
    monkeypatch.setattr(orbax, "_STRAYS", strays)
    yield
    if strays.installed:
        strays.remove()


def test_of_a_failure_one_error_is_told_whatever_the_threads_say(no_failure_before, monkeypatch, capsys, caplog):
    """What threads of a library tell, on stderr and in logs, is passed over during a failure and after it."""

    def tell():
        for text in ("Event loop is closed", "the rest"):
            sys.excepthook(RuntimeError, RuntimeError(text), None)
            logging.getLogger("asyncio").error("Task exception was never retrieved" if "loop" in text else text)
        lines = [*capsys.readouterr().err.splitlines(), *caplog.messages]
        caplog.clear()
        return lines

    before = sys.excepthook
    with orbax.one_error():
        assert tell() == ["RuntimeError: the rest", "the rest"]
    assert sys.excepthook is before
    assert len(tell()) == 4
    for _ in range(3):  # one filter, however often
        with pytest.raises(ValueError, match="damaged"), orbax.one_error():
            raise ValueError("damaged")
        assert tell() == ["RuntimeError: the rest", "the rest"]
    orbax._STRAYS.remove()
    assert sys.excepthook is before
