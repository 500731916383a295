"""SkyPilot's own reading of tpu/skypilot.yaml, offline, and of what it leaves behind (`.ci/run skypilot`)."""

import pathlib
import subprocess

import pytest
from helpers import ROOT

from tpu import sent

CHECKOUT = ROOT
TASK = CHECKOUT / "tpu/skypilot.yaml"

pytestmark = pytest.mark.skypilot


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    """SkyPilot with a home folder of its own: it writes to ~/.sky as soon as it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.chdir(CHECKOUT)
        import sky

        yield sky


def test_the_task_is_valid(sky):
    task = sky.Task.from_yaml(str(TASK))
    task.validate()
    (resources,) = task.resources
    assert resources.accelerators == {"tpu-v6e-8": 1}
    assert resources.accelerator_args["runtime_version"] == "v2-alpha-tpuv6e"
    assert resources.use_spot
    assert resources.job_recovery["recover_on_exit_codes"] == [75, 76, 130, 143]
    assert resources.job_recovery["max_restarts_on_errors"] == 3
    assert task.storage_mounts["/mnt/jaxmerge"].source == "gs://my-bucket"
    assert pathlib.Path(task.workdir).resolve() == CHECKOUT


def test_what_the_command_line_sets_reaches_the_task(sky):
    job = "improve configs/tiny.yaml rounds=2"
    overrides = [("RUN", "other"), ("BUCKET", "its-bucket"), ("JOB", job)]
    task = sky.Task.from_yaml_config(sky.utils.yaml_utils.read_yaml(str(TASK)), env_overrides=overrides)
    task.validate()
    assert (task.envs["RUN"], task.envs["JOB"]) == ("other", job)
    assert task.storage_mounts["/mnt/jaxmerge"].source == "gs://its-bucket"


@pytest.mark.parametrize("accelerator", ["tpu-v5p-8", "tpu-v6e-32", "tpu-v5litepod-16"])
def test_other_slices_are_valid_too(sky, accelerator, tmp_path):
    text = TASK.read_text().replace("accelerators: tpu-v6e-8", f"accelerators: {accelerator}")
    (tmp_path / "task.yaml").write_text(text)
    task = sky.Task.from_yaml(str(tmp_path / "task.yaml"))
    task.validate()
    assert {name for r in task.resources for name in r.accelerators} == {accelerator}


@pytest.mark.parametrize("skyignore", [None, "big\n/train.jsonl\n*.bin\n# models\n"])
def test_skypilot_leaves_behind_what_we_say(sky, skyignore, tmp_path):
    names = [
        *(
            "train.jsonl",
            "data/train.jsonl",
            "data/big/a.jsonl",
            "data/a.bin",
            "runs/r/a.jsonl",
            "models/m/config.json",
        ),
        *("models/m/extra.bin", "new.jsonl"),
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".gitignore").write_text("/runs/\n*.bin\n/train.jsonl\n")
    if skyignore is not None:
        (tmp_path / ".skyignore").write_text(skyignore)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    left = {pathlib.PurePath(name) for name in sky.data.storage_utils.get_excluded_files(str(tmp_path))}
    theirs = {name for name in names if left & {pathlib.PurePath(name), *pathlib.PurePath(name).parents}}
    ours = {str(path.relative_to(tmp_path)) for path in sent.ignored([tmp_path / name for name in names], tmp_path)}
    assert ours == theirs
    assert 0 < len(ours) < len(names)
