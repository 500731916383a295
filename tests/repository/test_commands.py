"""Each command that README.md shows is run: what takes minutes as far as a quick test can go."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT
from helpers.llamas import folder, tensors

BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
LINES = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
MAKE = [line for line in LINES if line.startswith("make ")]
CHECKPOINTS = [line for line in LINES if re.match(r"jaxmerge (merge|verify) ", line)]
LOOPS = [line for line in LINES if line.startswith("jaxmerge improve ")]
FULL = bool(os.environ.get("FULL"))


def run(words: list[str], cwd=ROOT) -> str:
    """The command as a checkout runs it: `jaxmerge` is `python -m train.cli`."""
    if words[0] == "jaxmerge":
        words = [sys.executable, "-m", "train.cli", *words[1:]]
    done = subprocess.run(words, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_command_is_left_out():
    assert sorted(LINES) == sorted(MAKE + CHECKPOINTS + LOOPS)
    assert all((MAKE, CHECKPOINTS, LOOPS))


@pytest.mark.parametrize("line", MAKE)
def test_make_has_it(line, tmp_path):
    """What a target would run, and under FULL=1 the quickstart itself; `make test` is what runs this."""
    last = run([*shlex.split(line), "-n", "--no-print-directory"]).splitlines()[-1]
    words = shlex.split(last)
    assert words[0].startswith(".venv/bin/")
    assert ("improve" in words) == (line == "make quickstart")
    assert ("pytest" in words) == (line == "make test")
    if FULL and "improve" in words:
        run(["jaxmerge", *words[1:], f"out={tmp_path / 'run'}"])
        assert (tmp_path / "run/report.html").is_file()


def test_merging(tmp_path):
    for seed, name in enumerate(("base", "one", "two")):
        folder(tmp_path / name, tensors(seed))
    models = [{"model": name, "parameters": {"weight": 1.0, "density": 0.5}} for name in ("one", "two")]
    recipe = {"models": models, "base_model": "base", "merge_method": "ties", "dtype": "float32"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for line in CHECKPOINTS:
        run(shlex.split(line), tmp_path)
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize("line", LOOPS)
def test_the_loop(line, tmp_path):
    """Its plan, and under FULL=1 the run."""
    words = [*shlex.split(line), f"out={tmp_path / 'run'}"]
    assert "round-3/imm/merge" in run([*words, "--dry-run"])
    if FULL:
        run(words)
        assert (tmp_path / "run/report.html").is_file()
