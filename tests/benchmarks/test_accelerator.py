"""`benchmarks/accelerator.py` at toy size: every section gives figures, and what it cannot measure it says."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from benchmarks import accelerator
from benchmarks.sections import SECTIONS

BARE = """
import importlib.abc, importlib.metadata, importlib.util, sys

MISSING = {"tensorflow_datasets", "array_record", "reasoning_gym", "gguf", "re2", "torch", "math_verify", "cmaes"}

class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nothing())
find, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in MISSING else find(name, *rest)

def version_of(name):
    if name.replace("-", "_") in MISSING:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = version_of
"""
"""sitecustomize.py of a machine with jax, flax, optax, orbax, transformers and safetensors, and little else."""


def run(tmp_path, *words, seconds=400):
    """What the benchmark printed and wrote, in an environment as bare as a machine that is lent for an hour."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, str(ROOT / "benchmarks/accelerator.py"), f"out={tmp_path / 'found.json'}", *words]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done, json.loads((tmp_path / "found.json").read_text())


@pytest.mark.slow
def test_every_section_gives_figures_at_toy_size_on_a_bare_machine(tmp_path):
    done, found = run(tmp_path, "seconds=380")
    assert done.returncode == 0, done.stdout
    ended = {name: end["state"] for name, end in found["sections"].items()}
    assert ended == dict.fromkeys(SECTIONS, "done") | {"peer": "skipped"}
    assert found["sections"]["peer"]["why"] == "torch is not installed"
    values = {(f["section"], f["name"]): f["value"] for f in found["figures"]}
    measured = {key for key, value in values.items() if value is not None and value > 0}
    assert {key for key in values if key not in measured} == {("attention", "cudnn"), ("attention", "splash")}
    assert {section for section, _ in measured} == set(SECTIONS) - {"peer"}
    for name in ("average", "imm", "dare", "ties"):
        assert ("merge", name) in measured
    assert {("improve", f"{turn}: {kind}") for turn in ("first", "again") for kind in (
        "load", "sample", "select", "sft", "merge", "evaluate", "in all"
    )} <= measured  # fmt: skip
    # Under what a CPU cannot do, the figure is of this machine's own measured peak.
    assert 0 < values["sft", "stacked, remat none, attention auto: MFU"] < 300
    notes = [f["note"] for f in found["figures"] if f["name"].endswith(": select")]
    assert notes == ["examples as JSON lines, for tensorflow-datasets is not installed"] * 2
    for figure in found["figures"]:
        assert f"| {figure['section']} | {figure['name']} |" in done.stdout


def test_the_sections_are_those_that_the_page_names():
    assert list(SECTIONS) == list(accelerator.LIMITS)
    for name in SECTIONS:
        assert f"\n  {name} " in (accelerator.__doc__ or "")
    assert sum(accelerator.LIMITS.values()) <= 1.5 * float(accelerator.OPTIONS["seconds"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sise=toy"], "unknown sise; known: size, seconds, sections, out"),
        (["size=huge"], "size=huge: known are auto, full, toy"),
        (["sections=sft,gpu"], "sections=gpu: known are device, sft"),
    ],
)
def test_a_word_that_is_not_understood_is_named(words, message):
    with pytest.raises(SystemExit, match=message):
        accelerator.read_options(words)


def test_sections_run_in_their_order_whatever_the_words_say():
    assert accelerator.read_options(["sections=merge,device"])[1] == ["device", "merge"]


# --- processes that fail ---


def told_by(monkeypatch, tmp_path, program, limit=30.0):
    """What a section's process tells where that process is `program`."""
    script = tmp_path / "program.py"
    script.write_text(program)
    monkeypatch.setattr(accelerator, "__file__", str(script))
    return accelerator.run_section("sft", "toy", "cpu", limit)


FIGURE = 'print(\'@figure {"name": "a", "value": 2.5, "unit": "s", "note": ""}\', flush=True)\n'


def test_what_was_told_before_the_limit_is_kept(monkeypatch, tmp_path):
    figures, ended = told_by(monkeypatch, tmp_path, f"import time\n{FIGURE}time.sleep(60)\n", limit=2.0)
    assert [f["value"] for f in figures] == [2.5]
    assert (ended["state"], ended["why"]) == ("cut off", "cut off after 2 s")
    assert ended["seconds"] < 20


def test_a_crash_is_a_line_and_keeps_what_was_told(monkeypatch, tmp_path):
    figures, ended = told_by(monkeypatch, tmp_path, f"import os\n{FIGURE}print('no memory', flush=True)\nos._exit(9)\n")
    assert [f["value"] for f in figures] == [2.5]
    assert (ended["state"], ended["why"]) == ("failed", "ended with 9: no memory")


def test_a_case_that_fails_leaves_the_others():
    from benchmarks.figures import Figure, tried

    def measure():
        raise RuntimeError("RESOURCE_EXHAUSTED: 3 GB\nand a long tail")

    assert tried("ties", measure) == [Figure("ties", None, "", "RuntimeError: RESOURCE_EXHAUSTED: 3 GB")]
    assert tried("imm", lambda: [Figure("imm", 1.0)]) == [Figure("imm", 1.0)]


def test_an_unknown_device_has_no_share_of_a_data_sheet():
    from benchmarks.figures import share

    assert share(1e9, {"NVIDIA H200": 4800e9}, "the") == "no data sheet of cpu in the table"
    assert share(1e9, {"cpu": 4e9}, "the") == "25% of the cpu"


def test_figures_have_their_unit_and_three_digits():
    shown = [accelerator.shown({"value": v, "unit": "s"}) for v in (None, 1234.5, 0.04321, 3.0)]
    assert shown == ["skipped", "1,234 s", "0.0432 s", "3 s"]


def test_the_peak_of_every_device_has_its_bandwidth():
    from train.improve.devices import BANDWIDTHS
    from train.learn.speed import PEAKS

    assert set(BANDWIDTHS) <= set(PEAKS)
