"""The tasks that get a run its machines: what SkyPilot's and GKE's files must say, without either of them.

SkyPilot itself reads its task in tests/tpu/test_skypilot.py (`.ci/run skypilot`).
"""

import math
import re
import subprocess
import tarfile

import pytest
import yaml
from helpers import ROOT

from tpu import machines
from tpu.check import check
from train.runtime.peers import LOST
from train.runtime.stop import STOPPED

CHECKOUT = ROOT
PAGE = (CHECKOUT / "docs/tpu.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
TASK = yaml.safe_load((CHECKOUT / "tpu/skypilot.yaml").read_text())


def test_the_skypilot_task_goes_on_after_a_stop_a_loss_and_a_preemption():
    resources = TASK["resources"]
    assert resources["use_spot"] is True
    recovery = resources["job_recovery"]
    assert {STOPPED, LOST} <= set(recovery["recover_on_exit_codes"])
    assert not {0, 1, 2} & set(recovery["recover_on_exit_codes"]), "a mistake or a crash must not cost for ever"
    assert 1 <= recovery["max_restarts_on_errors"] <= 5


def test_the_skypilot_task_gives_the_scripts_what_they_read():
    given = {*TASK["envs"], "HOSTS", "HOME"}
    for name in ("setup", "run"):
        assert f"bash tpu/{name}.sh" in TASK[name]
        assert TASK[name].startswith("HOSTS=")
        subprocess.run(["bash", "-n"], input=TASK[name], text=True, check=True)
        text = (CHECKOUT / f"tpu/{name}.sh").read_text()
        own = set(re.findall(r"\b([A-Z_]+)=", text)) | {"JAXMERGE_MOUNT"}
        read = {word for word in re.findall(r"\$\{?([A-Z_]+)", text) if word not in own}
        assert read <= given
    assert TASK["file_mounts"]["/mnt/jaxmerge"]["source"] == "gs://${BUCKET}"


def test_the_hosts_are_counted_by_their_addresses(tmp_path):
    (tmp_path / "tpu").mkdir()
    for name, variable in (("setup", "SKYPILOT_SETUP_NODE_IPS"), ("run", "SKYPILOT_NODE_IPS")):
        (tmp_path / f"tpu/{name}.sh").write_text('echo "$HOSTS"')
        for hosts in (1, 4):
            addresses = "\n".join(f"10.0.0.{i}" for i in range(hosts))
            environment = {"PATH": "/usr/bin:/bin", variable: addresses}
            done = subprocess.run(
                ["bash", "-c", TASK[name]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
            )
            assert done.stdout == f"{hosts}\n"


def test_the_jobset_asks_for_the_hosts_of_its_topology():
    (manifest,) = yaml.safe_load_all((CHECKOUT / "tpu/jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    # Exit code 2, the user's mistake, ends the set; everything else restarts it, and all hosts with it.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    (fatal,) = manifest["spec"]["failurePolicy"]["rules"]
    assert fatal == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")


def test_the_jobset_runs_a_pod_on_one_mounted_folder():
    (manifest,) = yaml.safe_load_all((CHECKOUT / "tpu/jobset.yaml").read_text())
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (command,) = container["args"]
    assert command.startswith("exec jaxmerge "), "SIGTERM goes to the job, not to a shell"
    assert "distributed.auto=true" in command
    mounted = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == mounted
    (runs,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "runs")
    assert f"out={runs}/" in command
    options = pod["volumes"][0]["csi"]["volumeAttributes"]["mountOptions"].split(",")
    assert {"metadata-cache:ttl-secs:0", "write:enable-streaming-writes:false"} <= set(options)


# --- the page of commands ----------------------------------------------------------------------------------


def test_the_one_command_is_the_same_everywhere():
    command = re.compile(r"python -m tpu\.check \$JOB && (?:~/sky/bin/)?(sky jobs launch .*)")
    head = (CHECKOUT / "tpu/skypilot.yaml").read_text()
    found = {command.search(text)[1] for text in (PAGE, head)}  # type: ignore[index]
    assert found == {'sky jobs launch tpu/skypilot.yaml --env RUN=demo --env BUCKET=NAME --env JOB="$JOB"'}
    assert set(re.findall(r"--env (\w+)=", found.pop())) <= set(TASK["envs"])


@pytest.mark.parametrize("block", BLOCKS)
def test_the_commands_are_bash_and_name_files_that_there_are(block):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    for name in re.findall(r"\btpu/[\w.]+", block):
        assert (CHECKOUT / name).is_file(), name
    for module in re.findall(r"python -m (tpu\.\w+)", block):
        assert (CHECKOUT / f"{module.replace('.', '/')}.py").is_file(), module


def test_the_page_shows_lines_that_are_printed():
    """Of the first ten minutes: what `tpu.check` says of the page's job, and what scripts and programs say."""
    (section,) = re.findall(r"## The first ten minutes\n(.*?)\n## ", PAGE, re.DOTALL)
    shown = [line.split("`")[1] for line in section.splitlines() if re.match(r"\| [\d–?]+ \| `", line)]
    said = check(re.findall(r"JOB='(.*?)'", PAGE)[0].split(), CHECKOUT)
    setup = (CHECKOUT / "tpu/setup.sh").read_text()
    programs = "".join((CHECKOUT / f"train/{name}.py").read_text() for name in ("improve/phases", "learn/sft"))
    for line in shown:
        start, *rest = line.split("…")
        if line.startswith("setup: "):
            assert start.removeprefix("setup: ").replace("NAME", "$BUCKET").split(" is mounted")[0].strip() in setup
        elif "device(s)" in line:
            assert " M parameters on {session.mesh.size} device(s)" in programs
        elif line.startswith("attention: "):
            assert 'say(f"attention: {how.attention}")' in programs
        elif not line.startswith(("base/", "round-1/")):
            assert any(found.startswith(start) and all(part in found for part in rest) for found in said), line
    assert len(shown) >= 8


def test_the_page_packs_what_tpu_check_says_travels(tmp_path):
    (line,) = (line for block in BLOCKS for line in block.splitlines() if line.startswith("git ls-files"))
    for name in ("tracked.py", "runs/ignored.jsonl", "a new train.jsonl"):
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).touch()
    (tmp_path / "code/.gitignore").write_text("/runs/\n")
    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path / "code", check=True)
    subprocess.run(["git", "add", ".gitignore", "tracked.py"], cwd=tmp_path / "code", check=True)
    archive = tmp_path / "code.tar.gz"
    subprocess.run(["bash", "-c", line.replace("/tmp/code.tar.gz", str(archive))], cwd=tmp_path / "code", check=True)
    with tarfile.open(archive) as found:
        assert set(found.getnames()) == {".gitignore", "tracked.py", "a new train.jsonl"}


def test_the_page_names_the_runtime_of_each_generation():
    for name, generation in machines.GENERATIONS.items():
        (row,) = (line for line in PAGE.splitlines() if line.startswith("|") and f"`{name}-" in line)
        assert f"`{generation.runtime}`" in row
