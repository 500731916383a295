"""What a worker of tests/fake_gcloud.py has on its PATH, and a job that commits phases as jaxmerge does."""

import os
import pathlib
import sys

PYTHON = """#!/bin/bash
# Stands in for the image's Python: venv and pip leave traces instead of packages.
case "$*" in
  "-c import ensurepip, venv") exit 0 ;;
  "-m venv venv") mkdir -p venv/bin; cp "$0" venv/bin/python; cp "{root}/job" venv/bin/jaxmerge ;;
  "-m pip install"*) echo "$*" >> "{root}/pip.log" ;;
  *) exec "{python}" -S -E "$@" ;;
esac
"""

# The same Python, but the job is jaxmerge itself, as it stands in this checkout.
REAL = """#!/bin/bash
exec env PYTHONPATH="{checkout}" JAX_COMPILATION_CACHE_DIR="{checkout}/.cache/jax-tests" JAX_PLATFORMS=cpu \\
  HF_HUB_OFFLINE=1 "{python}" -m train.cli "$@"
"""

TOOLS = {
    "sudo": 'exec "$@"',
    "mountpoint": 'test -e "$2/.mounted"',
    "gcsfuse": 'echo "gcsfuse $*" >> "{root}/mounts.log"; touch "$3/.mounted"',
    "apt-get": "exit 1",
    "python3.11": "exit 1",
    # What `python3 -m uv` does on an image whose own Python is too old.
    "python3": 'case "$*" in *"python find"*) echo "{root}/uv-python" ;; *) echo "$*" >> "{root}/uv.log" ;; esac',
}

JOB = '''#!{python} -S
"""Phases in a chain: each one's weights are made of the last one's, so that a lost or doubled one would show."""
import hashlib, json, os, pathlib, signal, sys, time

ROOT = pathlib.Path("{root}")
words = sys.argv[1:]
config = json.loads(pathlib.Path(words[1]).read_text())
keys = dict(word.split("=", 1) for word in words[2:])
out, machine, worker = pathlib.Path(keys["out"]), int(os.environ["FAKE_MACHINE"]), int(os.environ["JAXMERGE_WORKER"])
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
token = hashlib.sha256(os.environ.get("HF_TOKEN", "").encode()).hexdigest()
with (ROOT / "starts.log").open("a") as file:
    print(machine, worker, " ".join(words), os.environ["JAX_COMPILATION_CACHE_DIR"], token, file=file)


def leave_if_stopped():
    if stopped:
        print("stopped by a signal; the state is saved")
        sys.exit(75)


if config.get("refuse"):
    print("jaxmerge sft: sft.lerning_rate: no such key; did you mean learning_rate?")
    sys.exit(2)
while worker and not (out / "summary.json").exists():
    leave_if_stopped()
    time.sleep(0.02)
if worker:
    sys.exit(0)
weights = b"base"
for i in range(config["phases"]):
    final, weighed = out / f"phases/p{{i}}", out / f"checkpoints/p{{i}}"
    if final.exists():
        weights = (weighed / "weights").read_bytes()
        continue
    while machine < config.get("wait", {{}}).get(str(i), 0):
        leave_if_stopped()
        time.sleep(0.02)
    crash = ROOT / "crashed"
    if config.get("crash_at") == i and (config.get("crash_always") or not crash.exists()):
        crash.touch()
        print("Traceback: the machine's memory is full")
        sys.exit(1)
    leave_if_stopped()
    weights = hashlib.sha256(weights + str(i).encode()).digest() * 1000
    written = weighed.with_name(f"p{{i}}.orbax-checkpoint-tmp")
    partial = final.with_name(f"p{{i}}.partial")
    written.mkdir(parents=True, exist_ok=True)
    partial.mkdir(parents=True, exist_ok=True)
    (written / "weights").write_bytes(weights)
    (partial / "record.json").write_text(json.dumps({{"phase": i}}))
    written.rename(weighed)
    partial.rename(final)
    with (out / "metrics.jsonl").open("a") as file:
        print(json.dumps({{"phase": i}}), file=file, flush=True)
(out / "summary.json").write_text("{{}}")
print("done")
'''


def install(root: pathlib.Path) -> None:
    """Write gcloud, the worker's tools and the job below `root`."""
    values = {"root": root, "python": sys.executable}
    gcloud = pathlib.Path(__file__).with_name("fake_gcloud.py").read_text()
    write(root / "bin/gcloud", f"#!{sys.executable} -S\n" + gcloud)
    write(root / "job", JOB.format(**values))
    write(root / "worker-bin/python3.12", PYTHON.format(**values))
    write(root / "uv-python", PYTHON.format(**values))
    for name, text in TOOLS.items():
        write(root / "worker-bin" / name, "#!/bin/bash\n" + text.format(**values) + "\n")


def install_jaxmerge(root: pathlib.Path) -> None:
    """Put the real command in the place of the job that plays it."""
    checkout = pathlib.Path(__file__).parent.parent
    write(root / "job", REAL.format(checkout=checkout, python=sys.executable))


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.chmod(path, 0o755)
