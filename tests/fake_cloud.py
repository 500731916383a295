"""A Google Cloud in a folder: what the tests of tpu.launch share."""

import gzip
import hashlib
import io
import json
import os
import pathlib
import tarfile
import time

import fake_worker

from tpu import launch, loop, shell, snapshot

CHECKOUT = pathlib.Path(__file__).parent.parent
PLACE = ["project=my-project", "zone=us-east5-b", "bucket=gs://my-bucket", "code=code.tar.gz", "job.verb=sft"]
UP = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
RUN = ["demo", "bucket=gs://my-bucket"]


class Cloud:
    """A Google Cloud in a folder; `main` is the launcher on a computer whose sleep takes no time."""

    def __init__(self, root: pathlib.Path, monkeypatch, capsys):
        self.root, self.capsys = root / "cloud", capsys
        self.computer = root / "computer"
        self.computer.mkdir()
        monkeypatch.chdir(self.computer)
        fake_worker.install(self.root)
        # Nothing but the fake gcloud: the real one must not be reachable from here.
        monkeypatch.setenv("PATH", f"{self.root}/bin:{os.environ['PATH']}")
        self.slept: list[float] = []
        self.interrupt_after = self.interrupt_at = 10**9  # sleeps, committed phases: then somebody types Ctrl-C
        self.plan({"states": UP})
        self.job(phases=3)

    def plan(self, *plans, **everything):
        (self.root / "plan.json").write_text(json.dumps({"machines": plans, **everything}))

    def job(self, **config):
        (self.computer / "job.yaml").write_text(json.dumps(config))
        make_code(self.computer / "code.tar.gz")

    def committed(self):
        found = self.root.glob("machine-*/0/jaxmerge/demo/run/metrics.jsonl")
        return max((len(path.read_text().splitlines()) for path in found), default=0)

    def sleep(self, seconds):
        self.slept.append(seconds)
        if len(self.slept) >= self.interrupt_after or self.committed() >= self.interrupt_at:
            raise KeyboardInterrupt
        time.sleep(0.1 if seconds == loop.POLL_SECONDS else 0)  # only a job needs time to get on

    def main(self, *words):
        """Exit code and everything printed."""
        code = launch.main(words, shell.Shell(self.sleep))
        captured = self.capsys.readouterr()
        return code, captured.out + captured.err

    def run(self, *words, accelerator="v6e-8"):
        return self.main("run", "job.yaml", *PLACE, f"accelerator={accelerator}", "run=demo", *words)

    @property
    def calls(self):
        return [json.loads(line) for line in (self.root / "calls.jsonl").read_text().splitlines()]

    def count(self, *words):
        return sum(all(word in call for word in words) for call in self.calls)

    @property
    def starts(self):
        return (self.root / "starts.log").read_text().splitlines()

    def weights(self):
        """Digest of the weights that the bucket's snapshot holds."""
        folder = self.computer / "restored"
        snapshot.restore("gs://my-bucket/runs/demo/state", folder, self.computer / "work")
        return digest_of(folder)


def make_code(path, **files):
    """A tarball of what the workers need (or of `files`), the same bytes at every call."""
    if not files:
        names = ("tpu/__init__.py", "tpu/run.sh", "tpu/setup.sh", "tpu/snapshot.py")
        files = {name: (CHECKOUT / name).read_text() for name in names} | {"constraints.txt": "jax==0.12.0\n"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in (files | {"pyproject.toml": "[project]\n"}).items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    path.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))


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
