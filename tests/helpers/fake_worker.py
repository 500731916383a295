"""A host for tests of tpu/*.sh: what it has on its PATH, and a job that commits phases as jaxmerge does."""

import os
import pathlib
import sys

UV = """#!/bin/bash
# Environments and packages leave traces instead of files, but for the two commands that run.sh calls.
echo "$*" >> "{root}/uv.log"
case "$1" in
  venv) at="${{@: -1}}/bin"; mkdir -p "$at"; cp "{root}/python" "$at/python"; cp "{root}/job" "$at/jaxmerge" ;;
esac
"""

TOOLS = {
    "sudo": 'exec "$@"',
    "mountpoint": 'test -e "$2/.mounted"',
    "gcsfuse": (
        'case $1 in --version) echo "gcsfuse version 3.4.0" ;; '
        '*) echo "gcsfuse $*" >> "{root}/mounts.log"; touch "$3/.mounted" ;; esac'
    ),
    "apt-get": "exit 1",
    # What `python3 -m uv` does on an image that brings pip alone.
    "python3": 'case "$*" in "-m uv --version") exit 1 ;; "-m uv "*) shift 2; exec "{root}/uv" "$@" ;; esac',
}

JOB = '''#!{python} -S
"""Phases in a chain: each one's weights are made of the last one's, so that a lost or doubled one would show."""
import hashlib, json, os, pathlib, signal, sys, time

ROOT = pathlib.Path("{root}")
words = sys.argv[1:]
config = json.loads(pathlib.Path(words[1]).read_text())
out = pathlib.Path(dict(word.split("=", 1) for word in words[2:])["out"])
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
with (ROOT / "starts.log").open("a") as file:
    print(" ".join(words), os.environ.get("JAX_COMPILATION_CACHE_DIR"), file=file)
weights = b"base"
for i in range(config["phases"]):
    final, weighed = out / f"phases/p{{i}}", out / f"checkpoints/p{{i}}"
    if final.exists():
        weights = (weighed / "weights").read_bytes()
        continue
    while not stopped and i == config.get("wait_at") and not (ROOT / "go-on").exists():
        time.sleep(0.02)
    if stopped:
        time.sleep(0.3)  # for a second signal, which would end jaxmerge before it has saved
        sys.exit(75 if len(stopped) == 1 else 99)
    if i == config.get("end_at"):
        sys.exit(config["code"])
    weights = hashlib.sha256(weights + str(i).encode()).digest() * 1000
    written = weighed.with_name(f"p{{i}}.orbax-checkpoint-tmp")
    partial = final.with_name(f"p{{i}}.partial")
    written.mkdir(parents=True, exist_ok=True)
    partial.mkdir(parents=True, exist_ok=True)
    (written / "weights").write_bytes(weights)
    (partial / "record.json").write_text(json.dumps({{"phase": i}}))
    written.rename(weighed)
    partial.rename(final)
'''

CHECKOUT = pathlib.Path(__file__).parents[2]


def install(root: pathlib.Path) -> None:
    """Write gcloud, the host's tools and the job below `root`."""
    values = {"root": root, "python": sys.executable}
    write(root / "bin/gcloud", f"#!{sys.executable} -S\n" + (CHECKOUT / "tests/helpers/fake_gcloud.py").read_text())
    write(root / "job", JOB.format(**values))
    write(root / "python", '#!/bin/bash\nexec "{python}" -S -E "$@"\n'.format(**values))
    write(root / "uv", UV.format(**values))
    write(root / "bin/uv", UV.format(**values))
    for name, text in TOOLS.items():
        write(root / "bin" / name, "#!/bin/bash\n" + text.format(**values) + "\n")


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.chmod(path, 0o755)
