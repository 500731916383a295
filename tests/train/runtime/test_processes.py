"""Several processes are one run: what they compute together, and what each fault leaves.

Real processes on this machine, two virtual devices each, with the collectives a cluster has.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from helpers import ROOT, forks
from helpers.ports import free_port

from train.data.versions import read_version
from train.log import UserError
from train.models.open import open_model
from train.runtime import peers
from train.runtime.journal import check_shared
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

TINY = ROOT / "configs" / "tiny.yaml"
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests-runs"),
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
}
IMPROVE = (sys.executable, "-m", "train.cli", "improve")
GRID = ("mesh.cpu_devices=2", "mesh.data=2", "mesh.fsdp=2")
ONE = Mesh()
SFT = "round-1/plain/sft"
MERGED = "round-1/imm/merge"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """tiny.yaml with one round, one method trained and one merged."""
    values = yaml.safe_load(TINY.read_text())
    for name in ("exme", "line", "expo"):
        del values["methods"][name]
    values["rounds"] = 1
    values["sft"] |= {"snapshots": 1, "epochs": 3}
    path = tmp_path_factory.mktemp("processes") / "small.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


class Group:
    """The processes of one run."""

    def __init__(self, config: Path, out: Path, *words: str, count: int = 2, only: Sequence[int] | None = None):
        self.out, port = out, free_port()
        self.logs = {i: out.with_name(f"{out.name}.{i}.log") for i in (range(count) if only is None else only)}
        self.processes = {i: self.start(config, i, count, port, words) for i in self.logs}

    def start(self, config: Path, number: int, count: int, port: int, words: Sequence[str]) -> forks.Fork:
        placed = (f"distributed.coordinator=localhost:{port}", f"distributed.processes={count}")
        whole = ["improve", config, f"out={self.out}", *GRID, *placed, f"distributed.process_id={number}", *words]
        self.logs[number].write_text("")
        return forks.Fork(whole, ENVIRONMENT, ROOT, (self.logs[number], self.logs[number]))

    def wait(self, seconds: float = 240) -> list[int]:
        """The exit codes; who is still there after that time is killed, and the test fails."""
        end = time.monotonic() + seconds
        try:
            return [p.wait(max(end - time.monotonic(), 0.1)) for p in self.processes.values()]
        finally:
            for p in self.processes.values():
                p.kill()

    def at(self, path: str, seconds: float = 120) -> None:
        """Wait until the run has come to the file `path` of its folder."""
        end = time.monotonic() + seconds
        while not (self.out / path).exists():
            assert time.monotonic() < end, f"{path} never came\n{self.said(0)}"
            assert all(p.poll() is None for p in self.processes.values()), self.said(0)
            time.sleep(0.02)

    def said(self, number: int) -> str:
        return self.logs[number].read_text()


def finish(config: Path, out: Path) -> None:
    group = Group(config, out)
    assert group.wait() == [0, 0], group.said(0)[-3000:] + group.said(1)[-3000:]


@pytest.fixture(scope="module")
def together(config) -> Path:
    """An undisturbed run of 2 processes × 2 devices."""
    out = config.parent / "together"
    finish(config, out)
    return out


@pytest.fixture(scope="module")
def alone(config) -> Path:
    """The same run in one process on one device."""
    out = config.parent / "alone"
    words = [*IMPROVE, str(config), f"out={out}"]
    subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL, timeout=240)
    return out


def records(run: Path) -> dict[str, dict[str, Any]]:
    return {row["phase"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def digests(run: Path) -> dict[str, str]:
    return {name: row["digest"] for name, row in records(run).items() if "digest" in row}


def weights(run: Path, phase: str, mesh: Mesh = ONE) -> dict[str, np.ndarray]:
    params = open_model(str(run / "checkpoints" / phase), make_mesh(mesh)).params
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}


def size(tree: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(((tree[name] - other[name]) ** 2).sum() for name in tree)))


# --- what they compute ---


def test_two_processes_compute_what_one_does(together, alone):
    base = weights(alone, f"{SFT}/../../base") if (alone / "checkpoints/base").exists() else None
    assert base is None, "the base is no checkpoint of a run"
    one, two = weights(alone, MERGED), weights(together, MERGED)
    # ‖merged − base‖: α = ½ of the change that plain fine-tuning made, most of which dropping kept.
    moved = size(weights(alone, SFT), one)
    assert moved > 0.01
    assert size(one, two) / moved <= 1e-2
    examples = [read_version(run / "samples", "plain", "1.0.0")[0] for run in (alone, together)]
    assert examples[0] == examples[1]
    assert len(examples[0]) >= 12


def test_the_metrics_are_global_and_written_once(together, alone):
    ours, theirs = records(together), records(alone)
    assert list(ours) == list(theirs)
    for key in ("steps", "tokens", "examples"):
        assert ours[SFT][key] == theirs[SFT][key]
    np.testing.assert_allclose(ours[SFT]["loss_last"], theirs[SFT]["loss_last"], rtol=1e-4)
    steps = [json.loads(line) for line in (together / "phases" / SFT / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, ours[SFT]["steps"] + 1))
    summary = json.loads((together / "summary.json").read_text())
    assert summary["device"].startswith("cpu × 4")


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(fsdp=8), Mesh(data=2, fsdp=2, tensor=2)])
def test_what_four_devices_wrote_any_mesh_reads(together, mesh):
    whole, here = weights(together, SFT), weights(together, SFT, mesh)
    assert all(np.array_equal(whole[name], here[name]) for name in whole)


def test_under_slurm_processes_find_each_other_and_sample_as_one(together, tmp_path):
    """From outside: `distributed.auto=true` and a mesh, the rest is what `srun` sets."""
    model = together / "checkpoints" / MERGED
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"\n{i},{2 * i}?", "id": str(i)}) + "\n" for i in range(2, 14)))
    words = ["sample", model, prompts]
    keys = ["temperature=1", "max_new_tokens=8", "slots=8"]
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    places = ["mesh.cpu_devices=2", "mesh.fsdp=2", "mesh.tensor=2", "distributed.auto=true"]
    log = tmp_path / "log"
    group = [
        forks.Fork(
            [*words, tmp_path / "two.jsonl", *keys, *places],
            ENVIRONMENT | job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}, ROOT, (log, log),
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        assert [p.wait(120) for p in group] == [0, 0], log.read_text()
    finally:
        for p in group:
            p.kill()
    assert forks.run([*words, tmp_path / "one.jsonl", *keys], ENVIRONMENT).returncode == 0
    two, one = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("two", "one")
    )
    assert [row["tokens"] for row in two] == [row["tokens"] for row in one]


# --- faults ---


def test_a_signal_to_one_stops_all_at_one_step_and_any_number_goes_on(config, together, tmp_path):
    """As many processes bit for bit; one process of eight devices within the tolerance of another mesh."""
    group = Group(config, tmp_path / "run")
    group.at(f"phases/{SFT}.partial/steps.jsonl")
    group.processes[1].send_signal(signal.SIGTERM)
    assert group.wait(60) == [75, 75]
    (step,) = re.findall(r"stopped after step (\d+) of \d+; saved", group.said(0))
    saved = [p.name for p in (tmp_path / "run/checkpoints" / SFT / "state").iterdir() if p.name.isdigit()]
    assert saved == [step]
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    finish(config, tmp_path / "run")
    assert digests(tmp_path / "run") == digests(together)
    words = ["improve", config, f"out={tmp_path / 'copy'}", "mesh.cpu_devices=8", "mesh.fsdp=8"]
    assert forks.run(words, ENVIRONMENT).returncode == 0
    one, two = weights(tmp_path / "copy", SFT), weights(together, SFT)
    assert size(one, two) / size(one, weights(together, MERGED)) <= 1e-2


@pytest.mark.parametrize("who", [0, 1])
def test_of_a_killed_process_the_others_tell_and_the_run_goes_on_bit_for_bit(config, together, tmp_path, who):
    group = Group(config, tmp_path / "run")
    group.at(f"phases/{SFT}.partial/steps.jsonl" if who else "phases/base/load/record.json")
    group.processes[who].kill()
    killed = time.monotonic()
    codes = group.wait(30)
    assert time.monotonic() - killed < 15
    assert codes[1 - who] == peers.LOST
    assert codes[who] == -signal.SIGKILL
    told = group.said(1 - who)
    assert re.search(rf"process {who} of 2 \(127\.0\.0\.1:\d+\) is lost: its connection broke", told)
    assert "start all processes again with the same command" in told
    if who:
        finish(config, tmp_path / "run")
        assert digests(tmp_path / "run") == digests(together)


def test_a_process_that_never_comes_is_named_by_all(config, tmp_path):
    group = Group(config, tmp_path / "run", "distributed.start_timeout=5", count=3, only=(0, 1))
    assert group.wait(60) == [2, 2]
    for number in (0, 1):
        assert re.search(r"process 2 of 3 did not come within \d+ s \(here: 1 \(127", group.said(number))
    assert not (tmp_path / "run").exists()


def test_a_first_process_that_never_comes_is_said_too(config, tmp_path):
    group = Group(config, tmp_path / "run", "distributed.start_timeout=2", only=(1,))
    assert group.wait(60) == [2]
    assert re.search(r"process 0 at localhost:\d+ did not let process 1 of 2 in", group.said(1))


def test_a_mistake_is_everyones(config, tmp_path):
    """Only the first process looks at the folder; the second must not wait for it for ever."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("rounds: 7\n")
    group = Group(config, tmp_path / "run")
    assert group.wait(90) == [2, 2]
    for number in (0, 1):
        assert "holds a run of another config" in group.said(number)


def test_a_folder_that_vanishes_ends_all(config, tmp_path):
    """The checkpoints' place becomes a file: nothing can be written below it."""
    group = Group(config, tmp_path / "run", "sft.checkpoint_every=1")
    group.at("phases/base/evaluate/record.json")
    (tmp_path / "run" / "checkpoints").write_text("")
    codes = group.wait(120)
    assert 2 in codes
    said = group.said(0) + group.said(1)
    assert re.search(
        r"checkpoints/round-1/plain/sft\S*: (the checkpoint could not be written|.*[Nn]ot a directory)", said
    )
    (tmp_path / "run" / "checkpoints").unlink()


# --- the roll call, in one process ---


def call(port: int, me: int, count: int, timeout: float = 5.0):
    return peers.roll_call(f"localhost:{port}", me, count, timeout=timeout, silence=6)


def threads(*calls) -> list[Any]:
    """Run the calls side by side; what each returned or raised."""
    from concurrent.futures import ThreadPoolExecutor

    def caught(f):
        try:
            return f()
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(caught, calls))


def test_all_meet_and_the_port_is_free_again():
    port = free_port()
    found = threads(*(lambda me=me: call(port, me, 3) for me in range(3)))
    assert [sorted(p.lines) for p in found] == [[1, 2], [0], [0]]
    with socket.create_server(("", port)):
        pass
    for p in found:
        p.leave(0)
        p.close()


def test_two_with_one_number_or_another_count_are_refused():
    port = free_port()
    first, second = threads(lambda: call(port, 0, 2), lambda: call(port, 1, 3))
    assert "distributed.processes=3, process 0 with 2" in str(first)
    assert "distributed.processes=3, process 0 with 2" in str(second)
    port = free_port()
    found = threads(lambda: call(port, 0, 3), lambda: call(port, 1, 3), lambda: call(port, 1, 3))
    assert "two processes have distributed.process_id=1" in str(found[0])


def test_a_stranger_on_the_port_is_passed_over():
    port = free_port()

    def knock():
        with contextlib.suppress(OSError):
            while True:
                try:
                    with socket.create_connection(("localhost", port)) as line:
                        line.sendall(b"GET / HTTP/1.1\r\n\r\n")
                        return
                except ConnectionRefusedError:
                    time.sleep(0.01)

    first, second, _ = threads(lambda: call(port, 0, 2), lambda: (time.sleep(0.5), call(port, 1, 2))[1], knock)
    assert sorted(first.lines) == [1]
    assert sorted(second.lines) == [0]
    for p in (first, second):
        p.leave(0)
        p.close()


def test_an_address_without_a_port_is_refused():
    with pytest.raises(UserError, match=r"distributed\.coordinator is 'here'; wanted host:port"):
        peers.roll_call("here", 0, 2, timeout=1, silence=6)


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    (tmp_path / ".lock").write_text("another")
    with pytest.raises(UserError, match="process 0 does not see what process 0 writes there"):
        check_shared(tmp_path / ".lock", "token")
