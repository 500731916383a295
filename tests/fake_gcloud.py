"""A `gcloud` for tests: buckets are folders, a machine is a home folder, `ssh` is bash with that home.

Installed as ROOT/bin/gcloud by test_tpu_launch.py. ROOT/plan.json says what becomes of each machine in turn:

    states    what `describe` answers, one after the other; the last stays
    reason    of FAILED, with `code` (gRPC)
    lose_at   the machine is taken away once the bucket's snapshot holds so many committed phases
    hosts     of the slice
and of everything: `create_error` (stderr of a refused create), `ssh_failures` (so many ssh calls fail at first).

What starts slowly is imported where it is used: a test of the launcher calls this some fifty times.
"""

import json
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).absolute().parent.parent
PLAN = json.loads((ROOT / "plan.json").read_text())
GA = {"node-id", "accelerator-type", "runtime-version", "valid-until-duration", "network", "subnetwork", "spot"}
GA |= {"service-account", "scopes", "labels", "internal-ips", "zone", "project", "quiet"}
ALPHA = GA | {"provisioning-model", "max-run-duration"}


def fail(message, code=1):
    print(f"ERROR: {message}", file=sys.stderr)
    sys.exit(code)


def load():
    path = ROOT / "state.json"
    return json.loads(path.read_text()) if path.exists() else {"machines": 0, "described": 0, "there": False, "ssh": 0}


def store(state):
    (ROOT / "state.json").write_text(json.dumps(state))


def machine(state):
    plans = PLAN["machines"]
    return plans[min(state["machines"], len(plans)) - 1]


def status(state):
    """The state now, and the machine's end when its time has come."""
    plan = machine(state)
    if state.get("lost"):
        return "SUSPENDED"
    now = plan["states"][min(state["described"], len(plan["states"])) - 1] if state["described"] else plan["states"][0]
    if now == "ACTIVE" and plan.get("lose_at") and saved() >= plan["lose_at"]:
        lose(state)
        return "SUSPENDED"
    return now


def saved():
    found = list(ROOT.glob("buckets/*/runs/*/state/manifest.json"))
    return sum("/record.json" in name for path in found for name in json.loads(path.read_text()))


def lose(state):
    """Power off: every process of the machine is killed, and its disk is gone."""
    import shutil
    import signal
    import time

    homes = ROOT / f"machine-{state['machines']}"
    mark = f"FAKE_HOMES={homes}\0".encode()
    for _ in range(3):
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)
            except OSError:
                pass  # ended by itself meanwhile
        time.sleep(0.02)
    shutil.rmtree(homes, ignore_errors=True)
    state["lost"] = True
    store(state)


def queued(verb, name, flags, alpha):
    state = load()
    if verb == "create":
        unknown = set(flags) - (ALPHA if alpha else GA)
        if unknown:
            fail(f"unrecognized arguments: {sorted(unknown)}", 2)
        if PLAN.get("create_error"):
            fail(PLAN["create_error"])
        if state["there"]:
            fail(f"ALREADY_EXISTS: Resource '{name}' already exists")
        store(state | {"machines": state["machines"] + 1, "described": 0, "there": True, "lost": False})
        return
    if not state["there"]:
        fail(f"NOT_FOUND: Resource '{name}' was not found")
    if verb == "delete":
        if "force" not in flags:
            fail("FAILED_PRECONDITION: the queued resource has nodes")
        lose(state)
        store(state | {"there": False, "lost": False})
        return
    state["described"] += 1
    store(state)
    now, plan = status(state), machine(state)
    data = {"state": now}
    if now == "FAILED":
        data["failedData"] = {"error": {"code": plan.get("code", 13), "message": plan.get("reason", "internal")}}
    print(json.dumps({"name": name, "state": data}))


def ssh(name, flags):
    import subprocess

    state = load()
    state["ssh"] += 1
    store(state)
    if not state["there"] or status(state) != "ACTIVE" or state["ssh"] <= PLAN.get("ssh_failures", 0):
        fail(f"[ssh] {name} exited with return code [255].", 255)
    homes = ROOT / f"machine-{state['machines']}"
    codes = []
    for worker in range(machine(state).get("hosts", 1)):
        home = homes / str(worker)
        home.mkdir(parents=True, exist_ok=True)
        own = {"HOME": home, "JAXMERGE_WORKER": worker, "FAKE_MACHINE": state["machines"], "FAKE_HOMES": homes}
        quick = {"JAXMERGE_EVERY": 1, "JAXMERGE_TICK": 0.05, "JAXMERGE_RETRY": 0, "JAXMERGE_MOUNT": ROOT / "mount"}
        path = f"{ROOT}/worker-bin:{ROOT}/bin:/usr/bin:/bin"
        environment = {key: str(value) for key, value in {**own, **quick, "PATH": path}.items()}
        codes.append(subprocess.run(["bash", "-c", flags["command"]], env=environment, check=False).returncode)
    sys.exit(next((code for code in codes if code), 0))


def local(address):
    return ROOT / "buckets" / address.removeprefix("gs://") if address.startswith("gs://") else pathlib.Path(address)


def write_whole(path, data):
    """Write as a bucket does: an object is there whole or not at all, also if this process is killed in between."""
    import uuid

    partial = ROOT / "uploads" / uuid.uuid4().hex
    partial.parent.mkdir(exist_ok=True)
    partial.write_bytes(data)
    partial.rename(path)


def storage(words, flags):
    import fnmatch

    verb, *paths = words
    if verb == "buckets":
        path, kinds = local(paths[1]), ROOT / "buckets.json"
        known = json.loads(kinds.read_text()) if kinds.exists() else {}
        if paths[0] == "create":
            path.mkdir(parents=True)
            kinds.write_text(json.dumps(known | {path.name: "enable-hierarchical-namespace" in flags}))
        elif not path.is_dir():
            fail(f"{paths[1]} not found: 404.")
        else:
            print(json.dumps({"name": path.name, "hierarchicalNamespace": {"enabled": known.get(path.name, False)}}))
    elif verb == "cat":
        path = local(paths[0])
        found = sorted(p for p in path.parent.glob("*") if fnmatch.fnmatch(p.name, path.name))
        if not found:
            fail("The following URLs matched no objects or files: " + paths[0])
        sys.stdout.write("".join(p.read_text() for p in found))
    elif verb == "cp":
        data = sys.stdin.buffer.read() if paths[0] == "-" else b""
        if paths[0] != "-" and not local(paths[0]).is_file():
            fail("The following URLs matched no objects or files: " + paths[0])
        to = local(paths[1])
        if paths[1].endswith("/"):
            to = to / local(paths[0]).name
        if paths[1].startswith("gs://"):
            to.parent.mkdir(parents=True, exist_ok=True)
        write_whole(to, data if paths[0] == "-" else local(paths[0]).read_bytes())
    elif verb == "rsync":
        source, to = map(local, paths)
        to.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if not ("no-clobber" in flags and (to / path.name).exists()):
                write_whole(to / path.name, path.read_bytes())
        if "delete-unmatched-destination-objects" in flags:
            for path in to.iterdir():
                if not (source / path.name).exists():
                    path.unlink()


def main(words):
    with (ROOT / "calls.jsonl").open("a") as file:
        file.write(json.dumps(words) + "\n")
    alpha = words[:1] == ["alpha"]
    flags = {}
    for word in words:
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            flags[key] = value
    plain = [word for word in words if not word.startswith("--")][alpha:]
    if plain[:3] == ["compute", "tpus", "queued-resources"]:
        queued(plain[3], plain[4], flags, alpha)
    elif plain[:4] == ["compute", "tpus", "tpu-vm", "ssh"]:
        ssh(plain[4], flags)
    elif plain[0] == "storage":
        storage(plain[1:], flags)
    elif plain[:4] == ["secrets", "versions", "access", "latest"]:
        print((ROOT.parent / "secret-manager" / flags["secret"]).read_text(), end="")
    else:
        fail(f"unrecognized arguments: {words}", 2)


if __name__ == "__main__":
    main(sys.argv[1:])
