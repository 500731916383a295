"""`python -m tpu.launch VERB …`: runs of jaxmerge on Cloud TPU that outlive their machines. See tpu/README.md."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from train.log import UserError
from train.resolve import nearest

from . import commands, loop
from .bucket import ensure_bucket, recall, reset, ship
from .queue import ABSENT, GaveUp, Machines, remove, state
from .settings import Launch, launch_of
from .shell import DryShell, Failed, Shell, absent

USAGE = """\
python -m tpu.launch: runs of jaxmerge on Cloud TPU that outlive their machines

  create CONFIG key=value …   make the bucket if need be, and ask for the machine
  run    CONFIG key=value …   the same, and run the config to its end: lost machines are asked for again
  resume RUN bucket=gs://…    go on with a run, from any computer
  status RUN bucket=gs://…    the machine and the job on each of its hosts
  logs   RUN bucket=gs://…    what the job printed, on all its machines (worker=0)
  delete RUN bucket=gs://…    stop the job, which saves its state, and delete the machine; the bucket stays

  project= zone= accelerator=v6e-8 bucket=gs://NAME    needed by create and run; settings=FILE.yaml may hold them
  capacity=on-demand|spot|flex-start  set.KEY=VALUE (the job's own keys)  code=GITREF|FILE.tar.gz  run=NAME
  --dry-run prints every command and runs none. All keys: tpu/settings.py; what they mean together: tpu/README.md.
"""


def main(arguments: Sequence[str] | None = None, shell: Shell | None = None) -> int:
    """Exit code: 0 done, 2 a mistake named on one line, 75 not finished but saved, 1 anything else."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    verb, rest = words[0], words[1:]
    flags = [w for w in rest if w.startswith("--")]
    assignments = [w for w in rest if re.match(r"[\w.-]+=", w) and w not in flags]
    positionals = [w for w in rest if w not in flags and w not in assignments]
    try:
        if verb not in VERBS:
            raise UserError(f"no verb {verb!r}{nearest(verb, list(VERBS))}")
        if flags not in ([], ["--dry-run"]):
            raise UserError(f"no flag {flags[0]}; options are written key=value (or --dry-run)")
        if len(positionals) != 1:
            wanted = "CONFIG" if verb in ("create", "run") else "RUN"
            raise UserError(f"wanted {wanted}, found {' '.join(positionals) or 'none'}")
        return VERBS[verb](positionals[0], assignments, DryShell() if flags else shell or Shell())
    except UserError as error:
        print(f"tpu.launch {verb}: {error}", file=sys.stderr)
        return 2
    except GaveUp as error:
        print(f"tpu.launch {verb}: {error}", file=sys.stderr)
        return error.code
    except Failed as error:
        print(f"tpu.launch {verb}: {error}; what runs, runs on: the same command goes on with it", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\ntpu.launch {verb}: stopped watching. The machine and the job go on without this terminal, but a lost "
            "machine is not replaced: `resume` goes on watching, `delete` ends both",
            file=sys.stderr,
        )
        return 130


def create(config: str, words: list[str], shell: Shell) -> int:
    launch = launch_of(config, words)
    ensure_bucket(launch, shell)
    ship(launch, shell)
    machines = Machines(launch, shell)
    if state(launch, shell).name == ABSENT:
        machines.create()
    shell.say(f"{launch.name}: {state(launch, shell).name}; run it: python -m tpu.launch resume {address(launch)}")
    return 0


def run(config: str, words: list[str], shell: Shell) -> int:
    launch = launch_of(config, words)
    ensure_bucket(launch, shell)
    return to_the_end(launch, ship(launch, shell), shell)


def resume(name: str, words: list[str], shell: Shell) -> int:
    launch, code = recall(name, words, shell, only=False)
    return to_the_end(reset(launch, words, shell), code, shell)


def to_the_end(launch: Launch, code: str, shell: Shell) -> int:
    """The loop, and the machine's deletion whatever came out: idle it costs as much as busy."""
    shell.say(f"run {launch.run}; watch it from elsewhere: python -m tpu.launch status {address(launch)}")
    if not is_done(launch, shell):
        try:
            loop.run(launch, shell, code)
        except (UserError, GaveUp):
            tidy(launch, shell)
            raise
        shell.need(commands.copy("-", f"{launch.remote}/done"), given="0\n")
    tidy(launch, shell)
    result = f"gcloud storage cp -r {launch.remote}/run runs/{launch.run}"
    if not launch.mounted:
        result = f"python -m tpu.snapshot restore {launch.remote}/state runs/{launch.run}"
    elif launch.shared:
        result = f"{launch.shared}/runs/{launch.run}/run holds the run folder"
    shell.say(f"{launch.run} is done. {result}")
    return 0


def is_done(launch: Launch, shell: Shell) -> bool:
    """Whether the run has ended with 0 before: then no machine is asked for."""
    return shell.run(commands.read(f"{launch.remote}/done")).code == 0


def tidy(launch: Launch, shell: Shell) -> None:
    if launch.vm.keep:
        shell.say(f"{launch.name} is kept and costs: python -m tpu.launch delete {address(launch)}")
        return
    remove(launch, shell)


def status(name: str, words: list[str], shell: Shell) -> int:
    launch, _ = recall(name, words, shell)
    now = state(launch, shell)
    shell.say(
        f"{launch.name}: {now.name}{': ' + now.reason if now.reason else ''} ({launch.accelerator}, {launch.zone})"
    )
    if now.name == loop.ACTIVE:
        found = loop.workers(launch, shell)
        for worker in found or ():
            code = "" if worker.code is None else f" {worker.code}"
            shell.say(f"  host {worker.number}: {worker.state}{code}, {worker.phases} phases committed")
        if found is None:
            shell.say("  the hosts do not answer")
    shell.say(f"  {launch.remote}{': done' if is_done(launch, shell) else ''}")
    return 0


def logs(name: str, words: list[str], shell: Shell) -> int:
    worker = next((w.partition("=")[2] for w in words if w.startswith("worker=")), "0")
    launch, _ = recall(name, [w for w in words if not w.startswith("worker=")], shell)
    result = shell.run(commands.read(f"{launch.remote}/logs/*-worker-{worker}.log"))
    if result.code and absent(result.error):
        shell.say(f"no log of host {worker} in {launch.remote}/logs yet; it comes a minute after the job's start")
        return 0
    if result.code:
        raise Failed(["gcloud", "storage", "cat"], result)
    print(result.out, end="")
    return 0


def delete(name: str, words: list[str], shell: Shell) -> int:
    launch, _ = recall(name, words, shell)
    if state(launch, shell).name == loop.ACTIVE:
        loop.stop(launch, shell)
    remove(launch, shell)
    shell.say(f"{launch.name} is deleted; {launch.remote} stays (gcloud storage rm -r {launch.remote})")
    return 0


def address(launch: Launch) -> str:
    return f"{launch.run} bucket={launch.bucket}"


VERBS: dict[str, Callable[[str, list[str], Shell], int]] = {
    "create": create,
    "run": run,
    "status": status,
    "logs": logs,
    "resume": resume,
    "delete": delete,
}

if __name__ == "__main__":
    sys.exit(main())
