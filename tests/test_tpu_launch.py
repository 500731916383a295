"""The Cloud TPU launcher against a `gcloud` that plays states, preemptions and refusals, with real workers' scripts."""

import hashlib
import json
import shutil
import subprocess
import tarfile

import fake_worker
import pytest
from fake_cloud import CHECKOUT, PLACE, RUN, UP, Cloud, digest_of, make_code, undisturbed

from tpu import loop


@pytest.fixture
def cloud(tmp_path, monkeypatch, capsys):
    return Cloud(tmp_path, monkeypatch, capsys)


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
    code, again = cloud.main("resume", *RUN)
    assert code == 0
    assert "demo is done" in again
    assert cloud.count("queued-resources", "create") == 3, "none for a run that is done"
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


@pytest.mark.slow
def test_jaxmerge_loses_two_machines_and_its_weights_are_the_same(cloud, tmp_path):
    fake_worker.install_jaxmerge(cloud.root)
    shutil.copy(CHECKOUT / "configs/tiny.yaml", cloud.computer)
    cloud.plan({"states": UP, "lose_at": 4}, {"states": UP, "lose_at": 11}, {"states": UP})
    code, printed = cloud.main("run", "tiny.yaml", *PLACE[:-1], "accelerator=v6e-8", "run=demo")
    assert code == 0, printed
    assert cloud.count("queued-resources", "create") == 3
    undisturbed_run = [cloud.root / "job", "improve", CHECKOUT / "configs/tiny.yaml", f"out={tmp_path / 'undisturbed'}"]
    subprocess.run(undisturbed_run, check=True, capture_output=True)
    cloud.weights()
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (cloud.computer / "restored", tmp_path / "undisturbed")
    )
    assert [row["phase"] for row in ours] == [row["phase"] for row in theirs]
    assert [row.get("digest") for row in ours] == [row.get("digest") for row in theirs]
    assert sum("digest" in row for row in ours) >= 10


def test_interrupted_watching_is_gone_on_with_and_the_job_is_not_started_twice(cloud):
    cloud.job(phases=3, wait={"2": 2})
    cloud.interrupt_at = 2
    code, printed = cloud.run()
    assert code == 130
    assert "go on without this terminal" in printed
    code, printed = cloud.main("status", *RUN)
    assert code == 0
    assert "ACTIVE" in printed
    assert "running, 2 phases committed" in printed
    cloud.interrupt_at, cloud.interrupt_after = 10**9, len(cloud.slept) + 2
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


def test_a_machine_that_never_answers_is_replaced(cloud):
    cloud.plan({"states": ["ACTIVE"]}, ssh_failures=6)
    code, printed = cloud.run()
    assert code == 0, printed
    assert cloud.count("queued-resources", "create") == 2


@pytest.mark.parametrize(
    ("codes", "one"),
    [((0, 0), 0), ((0, 75), 75), ((76, 137), 137), ((1, 75), 1), ((1, 2), 2), ((0, None), 75), ((143, 130), 75)],
)
def test_one_exit_code_for_all_hosts(codes, one):
    found = [loop.Worker(str(i), "absent" if code is None else "exit", code, 0) for i, code in enumerate(codes)]
    assert loop.combined(found) == one


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
    code, printed = cloud.run("set.mesh.fsdp=16", accelerator="v4-32")
    assert code == 2
    assert "no hierarchical namespace" in printed
    assert "shared=HOST:/EXPORT" in printed
    assert cloud.count("queued-resources", "create") == 0


def test_moving_a_run_takes_it_off_its_old_machine(cloud):
    cloud.job(phases=3, wait={"2": 2})
    cloud.interrupt_at = 1
    assert cloud.run()[0] == 130
    cloud.interrupt_at = 10**9
    code, printed = cloud.main("resume", *RUN, "zone=us-central1-a", "set.mesh.fsdp=4")
    assert code == 0, printed
    assert "deleting the machine in us-east5-b" in printed
    assert "mesh.fsdp=4" in cloud.starts[-1]
    assert cloud.main("resume", *RUN, "set.rounds=4")[0] == 2
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
