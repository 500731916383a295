"""The command from outside: one grammar, mistakes on one line with exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT

from train.cli import __main__ as cli
from train.cli.keys import keys
from train.cli.verbs import VERBS
from train.cli.words import options, parse
from train.generate.settings import SampleOptions
from train.models.hf import save_hf
from train.models.open import random_model
from train.resolve import build, override
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

TINY = str(ROOT / "configs" / "tiny.yaml")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


@pytest.fixture
def model():
    return random_model(SIZES, make_mesh(Mesh()), seed=0)


@pytest.fixture
def folder(tmp_path, model):
    save_hf(tmp_path / "model", model.config, model.params, tokenizer_from=model.tokenizer)
    return tmp_path / "model"


def refused(capsys, *words: object) -> str:
    """The one line of a refused command."""
    assert cli.main([str(w) for w in words]) == 2
    out = capsys.readouterr()
    assert "Traceback" not in out.err + out.out
    (line,) = out.err.strip().splitlines()
    return line


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert re.search(rf"^  jaxmerge {name} +{re.escape(verb.usage)} +{re.escape(verb.prose[0])}$", overview, re.M)
        assert cli.main([name, "--help"]) == 0
        page = capsys.readouterr().out
        assert all(f"jaxmerge {name} {' '.join(way)}".rstrip() in page for way in verb.arguments)
        for key in (key for settings in verb.settings for key in keys(settings)):
            default = "" if key.default == "must be given" else key.default
            # A key of several optimizers stands there once for each.
            lines = [part.partition("\n")[2] for part in page.split(f"\n  {key.path}={default}  {key.kind}")[1:]]
            told = [" ".join(line.split())[:60] for line in lines]
            assert any(" ".join(key.meaning.split())[:40] in line for line in told), key.path
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["improve", "--help"], ["completion", "bash"]])
def test_help_does_not_wait_for_jax(words):
    code = "import sys; from jaxmerge.train.cli.__main__ import main; main(sys.argv[1:]); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False"
    assert len(done.stdout.splitlines()) > 1


@pytest.mark.parametrize("words", [["seed=3"], ["--seed=3"], ["--seed", "3"]])
def test_a_key_is_written_in_three_ways(words):
    verb = VERBS["merge"]
    assert parse(verb, ["recipe", *words, "--dry-run", "out"]) == (["recipe", "out"], ["seed=3"], {"--dry-run"})


def test_values_are_told_from_arguments():
    assert parse(VERBS["sft"], ["c.yaml", "--sft.stay.freeze", "[a=b]", "--seed", "-1", "sft.batch=--2"]) == (
        ["c.yaml"], ["sft.stay.freeze=[a=b]", "seed=-1", "sft.batch=--2"], set(),
    )  # fmt: skip
    assert parse(VERBS["report"], ["--", "a=b"]) == (["a=b"], [], set())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["improv", TINY], "no verb 'improv'; did you mean improve?"),
        (["improve"], "wanted CONFIG, found none"),
        (["improve", TINY, "--dryrun"], "no flag --dryrun; did you mean --dry-run?"),
        (["improve", TINY, "--roundz", "1"], "no flag --roundz; did you mean --rounds?"),
        (["improve", TINY, "--roundz=1"], "roundz: no such key; did you mean rounds?"),
        (["improve", TINY, "--rounds"], "--rounds has no value; write rounds=VALUE, --rounds=VALUE or --rounds VALUE"),
        (["improve", TINY, "--rounds", "--dry-run"], "--rounds has no value"),
        (["improve", TINY, "--rounds=two"], "rounds is 'two'; int is wanted"),
        (["sft", TINY, "learning_rate=1"], "learning_rate: no such key; did you mean sft.learning_rate?"),
        (["sft", "a", "b"], "wanted CONFIG or MODEL DATA OUT, found a b"),
        (["doctor", "x=1"], "x: no such key; doctor has none"),
        (["report", "nowhere", "--dry-run"], "no flag --dry-run; report has none"),
        (["completion", "bsh"], "no completion for 'bsh'; did you mean bash?"),
        (["results", "folders=x"], "folders: no such key; did you mean folder?"),
        (["improve", TINY, "roundz=1"], "roundz: no such key; did you mean rounds?"),
        (["improve", "nowhere.yaml"], "nowhere.yaml: no such config"),
        (["sample", "nowhere", "p.jsonl", "o.jsonl", "temp=1"], "temp: no such key; did you mean temperature?"),
        (["export", "nowhere", "out", "metod=imm"], "metod: no such key; did you mean method?"),
        (["export", "nowhere", "out", "round=last"], "round is 'last'; int is wanted"),
        (["report", "nowhere"], "not the folder of a run"),
        (["export", "nowhere", "out", "method=imm"], "not the folder of a run"),
    ],
)
def test_wrong_words(capsys, words, message):
    assert message in refused(capsys, *words)


def test_dry_run_prints_the_plan_and_writes_nothing(capsys, tmp_path):
    assert cli.main(["improve", TINY, f"out={tmp_path / 'run'}", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "round-1/plain/sample" in printed
    assert "M parameters" in printed
    assert not (tmp_path / "run").exists()


def test_nan_in_weights_is_named(capsys, tmp_path, model):
    model.params["model"]["norm"]["weight"] = model.params["model"]["norm"]["weight"].at[3].set(np.nan)
    save_hf(tmp_path / "bad", model.config, model.params, tokenizer_from=model.tokenizer)
    line = refused(
        capsys, "improve", TINY, "model.random=null", f"model.path={tmp_path / 'bad'}", f"out={tmp_path / 'r'}"
    )
    assert "NaN" in line
    assert "model.norm.weight" in line


def test_truncated_and_missing_checkpoints(capsys, tmp_path, folder):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "g1,2?"}\n')
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused(capsys, "sample", folder, prompts, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    weights.unlink()
    assert str(folder) in refused(capsys, "sample", folder, prompts, tmp_path / "out.jsonl")


def test_tokenizer_that_does_not_fit(capsys, tmp_path, folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["Ω"] = 64
    path.write_text(json.dumps(tokenizer))
    line = refused(capsys, "evaluate", folder, TINY)
    assert "65" in line
    assert "64" in line


def test_prompts_that_cannot_be_read(capsys, tmp_path, folder):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "g1,2?"}\n{"prompt"\n')
    assert f"{prompts}" in (line := refused(capsys, "sample", folder, prompts, tmp_path / "o"))
    assert "2" in line
    prompts.write_text('{"text": "g1,2?"}\n')
    assert "wanted prompt or messages" in refused(capsys, "sample", folder, prompts, tmp_path / "o")
    prompts.write_text('{"messages": [{"role": "user", "content": "g1,2?"}]}\n')
    assert "no chat template" in refused(capsys, "sample", folder, prompts, tmp_path / "o")
    prompts.write_text('{"prompt": "g1,2?"}\n')
    assert "no such folder" in refused(capsys, "sample", folder, prompts, tmp_path / "no" / "o")
    assert "128" in refused(capsys, "sample", folder, prompts, tmp_path / "o", "max_new_tokens=128")


def test_no_space_and_unwritable_folder(capsys, tmp_path, monkeypatch):
    taken = tmp_path / "file"
    taken.write_text("")
    assert "cannot be written" in refused(capsys, "improve", TINY, f"out={taken / 'run'}")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run" / "x"))

    monkeypatch.setattr("train.runtime.folder.write_durably", full)
    line = refused(capsys, "improve", TINY, f"out={tmp_path / 'run'}")
    assert "No space left on device" in line
    assert not (tmp_path / "run" / "summary.json").exists()


def test_two_processes_do_not_share_a_run(capsys, tmp_path):
    from train.runtime.journal import Journal

    with Journal(tmp_path / "run"):
        assert "another process" in refused(capsys, "improve", TINY, f"out={tmp_path / 'run'}")


def test_a_base_that_changed_under_a_run_is_noticed(capsys, tmp_path, model, folder):
    config = ["model.random=null", f"model.path={folder}", f"out={tmp_path / 'run'}", "rounds=1", "methods={plain: {}}"]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.improve.phases.select_examples", stop)
        assert cli.main(["improve", TINY, *config]) == 75
        capsys.readouterr()
    shutil.rmtree(folder)
    changed = jax.tree.map(lambda x: x + 1.0, model.params)
    save_hf(folder, model.config, changed, tokenizer_from=model.tokenizer)
    assert "weights changed since this run began" in refused(capsys, "improve", TINY, *config)


def test_a_mesh_larger_than_the_machine(capsys, tmp_path):
    line = refused(capsys, "improve", TINY, "mesh.fsdp=64", f"out={tmp_path / 'run'}")
    assert "needs 64 devices, found 8" in line


def test_nothing_to_learn_from_is_said(capsys, tmp_path):
    line = refused(
        capsys, "improve", TINY, "selection.real_ratio=0", "sampling.max_new_tokens=2", f"out={tmp_path / 'r'}"
    )
    assert "can be trained on" in line
    assert "real_ratio" in line


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("merge.alpha=[0.5]", "1 entries for 2 rounds"),
        ("merge.alpha={schedule: linear, start: 0.2}", "start"),
        ("merge.alpha={model/layers: 0.3}", "no pattern of alpha matches"),
        ("merge.where=[no_such_part]", "no_such_part"),
    ],
)
def test_a_merge_that_cannot_work_is_refused_before_any_sampling(capsys, tmp_path, assignment, message):
    run = tmp_path / "run"
    line = refused(capsys, "improve", TINY, "methods={imm: {merge: {rule: imm}}}", assignment, f"out={run}")
    assert "methods.imm.merge" in line
    assert message in line
    assert not list(run.glob("phases/**/batch-*"))


def test_sample_options_are_checked(capsys, tmp_path, folder):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": 5}\n')
    assert "prompts.jsonl:1: prompt is 5; a text is wanted" in refused(
        capsys, "sample", folder, prompts, tmp_path / "o"
    )
    for option in (
        "slots=0", "temperature=-1", "top_p=0", "max_new_tokens=0", "samples=4", 'stop=[""]', "dtype=int8",
        "date=31.1.2026", "date=2026-02-31",
    ):  # fmt: skip
        assert option.partition("=")[0] in refused(capsys, "sample", folder, prompts, tmp_path / "o", option)


def test_lists_and_dates_are_read_as_they_are_written():
    """A list of texts is a list, one text is a list of one, and a date, a type of its own in YAML, is a text."""
    for written, stop in (("[a, '<|im_end|>']", ("a", "<|im_end|>")), ("a", ("a",))):
        assert options([f"stop={written}"], SampleOptions).stop == stop
    assert options(["date=2026-01-31"], SampleOptions).date == "2026-01-31"
    assert build(SampleOptions, override({}, ["date=2026-01-31"])).date == "2026-01-31"
