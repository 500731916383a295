"""Argument lists of gcloud, and the command lines for the workers. Functions of values; nothing is run here.

Flags: https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create (and alpha, for flex-start).
"""

from __future__ import annotations

import shlex

from .settings import Launch

TPUS = ("compute", "tpus")
SCOPES = "https://www.googleapis.com/auth/cloud-platform"  # rights are the service account's, not the scope's


def where(launch: Launch) -> list[str]:
    return [f"--zone={launch.zone}", f"--project={launch.project}", "--quiet"]


def create(launch: Launch) -> list[str]:
    """Ask for a slice: one queued resource with one node, both named after the run."""
    flex = launch.capacity == "flex-start"
    flags = {
        "--node-id": launch.name,
        "--accelerator-type": launch.slice.accelerator,
        "--runtime-version": launch.vm.runtime or launch.slice.generation.runtime,
        "--provisioning-model": "flex-start" if flex else "",
        "--max-run-duration": launch.max_run if flex else "",
        "--valid-until-duration": launch.valid_until,
        "--network": launch.vm.network,
        "--subnetwork": launch.vm.subnetwork,
        "--service-account": launch.vm.service_account,
        "--scopes": SCOPES,
        "--labels": f"jaxmerge-run={launch.run}",
    }
    return [
        *("gcloud", *(["alpha"] if flex else []), *TPUS, "queued-resources", "create", launch.name),
        *(f"{flag}={value}" for flag, value in flags.items() if value),
        *(["--spot"] if launch.capacity == "spot" else []),
        *(["--internal-ips"] if launch.vm.internal_ips else []),
        *where(launch),
    ]


def describe(launch: Launch) -> list[str]:
    return ["gcloud", *TPUS, "queued-resources", "describe", launch.name, "--format=json", *where(launch)]


def delete(launch: Launch) -> list[str]:
    return ["gcloud", *TPUS, "queued-resources", "delete", launch.name, "--force", *where(launch)]


def ssh(launch: Launch, command: str, worker: str = "all") -> list[str]:
    """Run a command line on the workers, all at once; gcloud ends with the code of one that failed.

    A host that was taken away does not answer at all: gcloud tries ten times, each of which must end soon.
    """
    flags = [f"--ssh-flag=-o {flag}" for flag in ("ConnectTimeout=10", "ServerAliveInterval=15")]
    inside = ["--internal-ip"] if launch.vm.internal_ips else []
    return [
        *("gcloud", *TPUS, "tpu-vm", "ssh", launch.name, f"--worker={worker}", *where(launch), *inside, *flags),
        f"--command={command}",
    ]


def copy(source: str, to: str) -> list[str]:
    return ["gcloud", "storage", "cp", source, to, "--quiet"]


def read(address: str) -> list[str]:
    return ["gcloud", "storage", "cat", address]


def describe_bucket(launch: Launch) -> list[str]:
    # --raw: the API's own answer, in which the hierarchical namespace is named.
    return ["gcloud", "storage", "buckets", "describe", launch.bucket, "--raw", "--format=json"]


def create_bucket(launch: Launch) -> list[str]:
    region = launch.zone.rpartition("-")[0]  # beside the machines: reading across regions is slow and is billed
    return [
        *("gcloud", "storage", "buckets", "create", launch.bucket, f"--project={launch.project}"),
        *(f"--location={region}", "--uniform-bucket-level-access", "--enable-hierarchical-namespace"),
        "--public-access-prevention",
    ]


# --- command lines for the workers -------------------------------------------------------------------------


def folder(launch: Launch) -> str:
    """Of the run, on a worker; the shell there puts the home folder in."""
    return f'"$HOME"/jaxmerge/{launch.run}'


def prepare(launch: Launch, code: str) -> str:
    """Bring code, config and settings to a worker and set it up; a second time it finds all done."""
    name = shlex.quote(f".shipped-{code}")
    source = shlex.quote(f"{launch.remote}/{code}")
    return (
        f"set -eu; mkdir -p {folder(launch)}; cd {folder(launch)}; "
        f"[ -f {name} ] || {{ rm -rf code .shipped-*; mkdir code; gcloud storage cp {source} code.tar.gz --quiet; "
        f"tar -xzf code.tar.gz -C code; touch {name}; }}; "
        f"gcloud storage cp {shlex.quote(launch.remote)}/job.env job.env --quiet; "
        f"gcloud storage cp {shlex.quote(f'{launch.remote}/{config_name(launch)}')} ./ --quiet; "
        f"bash code/tpu/setup.sh {launch.run}"
    )


def act(launch: Launch, verb: str) -> str:
    """`run.sh start|status|stop` on a worker; `status` answers also where nothing was brought yet."""
    script = f"{folder(launch)}/code/tpu/run.sh"
    command = f"bash {script} {verb} {launch.run}"
    return f"if [ -f {script} ]; then {command}; else echo 'jaxmerge worker - absent - 0'; fi"


def config_name(launch: Launch) -> str:
    return launch.job.config.replace("\\", "/").rpartition("/")[2]


def job_words(launch: Launch) -> list[str]:
    """The job's own command, run in the code's folder; but for its `out=`, which run.sh knows."""
    several = ["distributed.auto=true"] if launch.slice.hosts > 1 else []
    return [launch.job.verb, f"../{config_name(launch)}", *launch.job.assignments, *several]


def job_env(launch: Launch) -> str:
    """The settings the scripts on the workers read: shell assignments, names of secrets but no value of one."""
    shared = launch.shared or (launch.bucket if launch.slice.hosts > 1 else "")
    values = {
        "JAXMERGE_REMOTE": launch.remote,
        "JAXMERGE_CACHE": f"{launch.bucket}/compile-cache",
        "JAXMERGE_SHARED": shared,
        "JAXMERGE_JOB": shlex.join(job_words(launch)),
        "JAXMERGE_PACKAGES": launch.vm.packages,
        "JAXMERGE_SECRETS": " ".join(f"{name}={secret}" for name, secret in launch.secrets.items()),
        "JAXMERGE_PROJECT": launch.project,
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())
