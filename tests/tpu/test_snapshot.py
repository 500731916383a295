"""Snapshots of a run's folder that a power cut cannot tear, and a job that is kept alive over lost machines by them."""

import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT
from helpers import fake_worker as fake_worker

from tpu import snapshot

CHECKOUT = ROOT
REMOTE = "gs://b/runs/demo/state"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The fake gcloud on PATH; its bucket's folder."""
    root = tmp_path / "cloud"
    fake_worker.install(root)
    monkeypatch.setenv("PATH", f"{root}/bin:{os.environ['PATH']}")
    return root / "buckets/b/runs/demo/state"


def fill(folder, phases):
    for i in range(phases):
        (folder / f"checkpoints/p{i}").mkdir(parents=True, exist_ok=True)
        (folder / f"checkpoints/p{i}/weights").write_bytes(bytes([i]) * 1000)
        (folder / f"phases/p{i}").mkdir(parents=True, exist_ok=True)
        (folder / f"phases/p{i}/record.json").write_text(str(i))


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_snapshot_comes_back_whole(bucket, tmp_path):
    run, work, back = tmp_path / "run", tmp_path / "work", tmp_path / "back"
    fill(run, 2)
    (run / ".lock").write_text("")
    (run / "checkpoints/p2.orbax-checkpoint-tmp-1").mkdir()
    (run / "checkpoints/p2.orbax-checkpoint-tmp-1/weights").write_text("half")
    assert snapshot.save(run, REMOTE, work)
    assert not snapshot.save(run, REMOTE, work), "nothing new"
    assert snapshot.restore(REMOTE, back, tmp_path / "work-2") == 4
    kept = {name: data for name, data in contents(run).items() if "tmp" not in name and name != ".lock"}
    assert contents(back) == kept
    assert snapshot.restore(REMOTE, back, tmp_path / "work-2") == 0, "a folder with something in it is left alone"
    assert snapshot.restore("gs://b/none", tmp_path / "new", tmp_path / "work-2") == 0


def test_an_upload_that_is_cut_off_leaves_the_snapshot_before(bucket, tmp_path, monkeypatch):
    run, work = tmp_path / "run", tmp_path / "work"
    fill(run, 1)
    snapshot.save(run, REMOTE, work)
    before = contents(run)
    shutil.rmtree(run / "checkpoints/p0")
    fill(run, 3)
    real = snapshot.gcloud
    for cut in range(2):  # before the objects are there, before the manifest is

        def gcloud(*words, left=[cut]):  # noqa: B006  (counts the calls of one upload)
            if not left[0]:
                raise snapshot.Failed("the power is cut")
            left[0] -= 1
            real(*words)

        monkeypatch.setattr(snapshot, "gcloud", gcloud)
        with pytest.raises(snapshot.Failed):
            snapshot.save(run, REMOTE, work)
        monkeypatch.setattr(snapshot, "gcloud", real)
        back = tmp_path / f"back-{cut}"
        snapshot.restore(REMOTE, back, tmp_path / "work-2")
        assert contents(back) == before
    snapshot.save(run, REMOTE, work)
    wanted = set(json.loads((bucket / "manifest.json").read_text()).values())
    assert {p.name for p in (bucket / "objects").iterdir()} == wanted, "nothing is kept that no manifest names"


def test_a_damaged_object_is_named(bucket, tmp_path):
    fill(tmp_path / "run", 1)
    snapshot.save(tmp_path / "run", REMOTE, tmp_path / "work")
    name = json.loads((bucket / "manifest.json").read_text())["checkpoints/p0/weights"]
    (bucket / "objects" / name).write_text("rot")
    with pytest.raises(snapshot.Failed, match=r"checkpoints/p0/weights: .* the snapshot is damaged"):
        snapshot.restore(REMOTE, tmp_path / "back", tmp_path / "work-2")
    assert not (tmp_path / "back").exists()


def test_no_phase_is_caught_without_its_weights_while_the_job_commits(tmp_path):
    run, done, caught = tmp_path / "run", threading.Event(), []
    fill(run, 1)

    def commit():
        for i in itertools.count(1):
            (run / f"checkpoints/p{i}.tmp-dir").mkdir()
            (run / f"checkpoints/p{i}.tmp-dir/weights").write_bytes(bytes(1000))
            (run / f"checkpoints/p{i}.tmp-dir").rename(run / f"checkpoints/p{i}")
            (run / f"phases/p{i}.partial").mkdir()
            (run / f"phases/p{i}.partial/record.json").write_text(str(i))
            (run / f"phases/p{i}.partial").rename(run / f"phases/p{i}")
            # On a busy machine nothing may be caught at this pace: then slower.
            done.wait(0.004 if i < 150 else 0.3)
            if i >= 150 and (caught or i > 300):
                break
        done.set()

    thread = threading.Thread(target=commit)
    thread.start()
    while not done.is_set():
        try:
            manifest = snapshot.catch(run, tmp_path / "stage", tmp_path / "digests")
        except snapshot.Failed:
            continue  # it changes too fast: said, and tried again a minute later
        caught.append(manifest)
        for name in manifest:
            phase = re.fullmatch(r"phases/(p\d+)/record.json", name)
            assert phase is None or f"checkpoints/{phase[1]}/weights" in manifest
    thread.join()
    assert snapshot.catch(run, tmp_path / "stage", tmp_path / "digests")
    assert caught


# --- a job that is kept ------------------------------------------------------------------------------------


class Machine:
    """One machine with a disk of its own, on which `tpu.snapshot keep` runs a job; `lose` cuts its power."""

    def __init__(self, root: pathlib.Path, number: int, *words: object):
        self.cloud, self.folder = root / "cloud", root / f"machine-{number}/run"
        self.folder.parent.mkdir()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tpu.snapshot", "keep", self.folder, REMOTE),
                *("--", *words, f"out={self.folder}"),
            ],
            cwd=CHECKOUT,
            env={**os.environ, "JAXMERGE_EVERY": "0.2", "PATH": f"{self.cloud}/bin:{os.environ['PATH']}"},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def saved(self) -> int:
        path = self.cloud / "buckets" / REMOTE.removeprefix("gs://") / "manifest.json"
        return sum("/record.json" in name for name in json.loads(path.read_text())) if path.exists() else 0

    def wait_for(self, phases: int) -> None:
        deadline = time.monotonic() + 240
        while self.saved() < phases:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, f"{self.saved()} phases in the bucket"
            time.sleep(0.02)

    def lose(self) -> None:
        """Kill every process of the machine and take its disk."""
        jobs = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.process.kill()
        for pid in map(int, jobs):
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()
        shutil.rmtree(self.folder.parent)

    def end(self) -> tuple[int, str]:
        """Exit code and what was said."""
        said = self.process.communicate(timeout=240)[1]
        return self.process.returncode, said


@pytest.fixture
def job(tmp_path, bucket):
    """Words of the job that commits phases, and a function that writes its config."""
    config = tmp_path / "job.yaml"

    def write(**values):
        config.write_text(json.dumps(values))
        return tmp_path / "cloud/job", "improve", config

    return write


def digest_of(folder):
    files = sorted(folder.glob("checkpoints/*/weights"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest(), len(files)


def undisturbed(phases):
    """The weights of the job's phases, computed here."""
    weights, total = b"base", hashlib.sha256()
    for i in range(phases):
        weights = hashlib.sha256(weights + str(i).encode()).digest() * 1000
        total.update(weights)
    return total.hexdigest(), phases


def restored(tmp_path):
    snapshot.restore(REMOTE, tmp_path / "restored", tmp_path / "work-of-restored")
    return tmp_path / "restored"


def test_two_machines_are_lost_and_the_weights_are_the_same(tmp_path, job):
    for number, phases in ((1, 2), (2, 4)):
        machine = Machine(tmp_path, number, *job(phases=6, wait_at=phases))
        machine.wait_for(phases)
        machine.lose()
    code, said = Machine(tmp_path, 3, *job(phases=6)).end()
    assert code == 0, said
    assert digest_of(restored(tmp_path)) == undisturbed(6)
    assert len((tmp_path / "cloud/starts.log").read_text().splitlines()) == 3


@pytest.mark.slow
def test_jaxmerge_loses_two_machines_and_its_weights_are_the_same(tmp_path, bucket, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    words = (sys.executable, "-m", "train.cli", "improve", "configs/tiny.yaml")
    for number, phases in ((1, 4), (2, 11)):
        machine = Machine(tmp_path, number, *words)
        machine.wait_for(phases)
        machine.lose()
    code, said = Machine(tmp_path, 3, *words).end()
    assert code == 0, said
    subprocess.run([*words, f"out={tmp_path / 'undisturbed'}"], cwd=CHECKOUT, check=True, capture_output=True)
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (restored(tmp_path), tmp_path / "undisturbed")
    )
    assert [row["phase"] for row in ours] == [row["phase"] for row in theirs]
    assert [row.get("digest") for row in ours] == [row.get("digest") for row in theirs]
    assert sum("digest" in row for row in ours) >= 10


def test_a_job_that_runs_is_not_started_a_second_time(tmp_path, job, capsys):
    words = job(phases=3, wait_at=2)
    machine = Machine(tmp_path, 1, *words)
    machine.wait_for(2)
    assert snapshot.main(["keep", str(machine.folder), REMOTE, "--", *map(str, words)]) == 74
    assert "is kept by another process already" in capsys.readouterr().err
    (tmp_path / "cloud/go-on").touch()
    code, said = machine.end()
    assert code == 0, said
    assert digest_of(restored(tmp_path)) == undisturbed(3)
    assert len((tmp_path / "cloud/starts.log").read_text().splitlines()) == 1


def test_a_signal_reaches_the_job_once_and_what_it_saves_is_in_the_bucket(tmp_path, job):
    machine = Machine(tmp_path, 1, *job(phases=3, wait_at=2))
    machine.wait_for(1)
    os.killpg(machine.process.pid, signal.SIGTERM)  # as a terminal and a service manager send it
    code, said = machine.end()
    assert code == 75, said
    assert digest_of(restored(tmp_path)) == undisturbed(2)


@pytest.mark.parametrize("code", [1, 2, 76])
def test_the_exit_code_is_the_jobs_and_its_end_is_saved(tmp_path, job, code):
    ended, said = Machine(tmp_path, 1, *job(phases=3, end_at=2, code=code)).end()
    assert ended == code
    assert f"the command ended with {code}" in said
    assert digest_of(restored(tmp_path)) == undisturbed(2)


def test_a_job_that_is_killed_has_a_shells_exit_code(tmp_path, bucket):
    killed = ("bash", "-c", "kill -KILL $$")
    assert Machine(tmp_path, 1, *killed).end()[0] == 128 + signal.SIGKILL


def test_an_end_that_is_not_saved_is_no_success(tmp_path, bucket, capsys):
    run = tmp_path / "run"
    fill(run, 1)
    (tmp_path / "cloud/refuse-uploads").touch()
    assert snapshot.keep(run, REMOTE, tmp_path / "work", ["true"], retry=0) == 74
    assert "try 4 of 4 to save the end" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["keep", "run", REMOTE], ["keep", "run", REMOTE, "--"], ["sav", "run", REMOTE]])
def test_words_that_mean_nothing_exit_with_2(words, capsys):
    assert snapshot.main(words) == 2
    assert "usage" in capsys.readouterr().err
