"""A run from its first machine to its exit code, over as many machines as it takes.

get a machine → bring the code, set up, start or attach → watch ─┬─ 0: done
         ▲                                                       ├─ 2: the user's mistake, said once
         ├──────────── the machine is gone ──────────────────────┤
         └──────── 75 (state saved), a crash: started again ─────┘
"""

from __future__ import annotations

import re
from typing import NamedTuple

from train.log import UserError

from . import commands
from .queue import ACTIVE, GaveUp, Machines, state
from .settings import Launch
from .shell import Failed, Shell

DONE, CRASH, MISTAKE, AGAIN = 0, 1, 2, 75  # 75 is EX_TEMPFAIL: stopped by a signal, state saved, run me again
# As good as 75, since a kill loses nothing that is saved: another host is lost (jaxmerge's own code); SIGINT and
# SIGTERM before the job could take them.
LIKE_AGAIN = (76, 130, 143)
POLL_SECONDS = 30
UNREACHABLE = 4  # polls, each of ten tries by gcloud, without an answer from a machine that is said to be ACTIVE
SETUP_SECONDS = 3600  # of bringing the code and setting up: packages of gigabytes
LAGGARDS = 4  # polls for the other hosts to end by themselves after one has
_ANSWER = re.compile(r"^jaxmerge worker (\S+) (running|exit|absent) (-|\d+) (\d+)\s*$", re.MULTILINE)


class Worker(NamedTuple):
    number: str
    state: str  # running, exit or absent
    code: int | None
    phases: int


def workers(launch: Launch, shell: Shell) -> list[Worker] | None:
    """What every host says of the job; None if not all of them answer."""
    result = shell.run(commands.ssh(launch, commands.act(launch, "status")))
    if "ssh-add" in result.error and "not present" in result.error:
        raise UserError(
            "several hosts are reached by a key in an ssh-agent, and the agent has not got it: "
            "ssh-add ~/.ssh/google_compute_engine"
        )
    found = [
        Worker(number, state, None if code == "-" else int(code), int(phases))
        for number, state, code, phases in _ANSWER.findall(result.out)
    ]
    wanted = 1 if shell.dry else launch.slice.hosts
    return found if result.code == 0 and len(found) == wanted else None


def start(launch: Launch, shell: Shell, code: str) -> None:
    """Have the job running on every host: attach where it does, else bring, set up and start it.

    Raises:
      Failed: the machine does not answer, or its set-up failed several times.
    """
    found = workers(launch, shell)
    if found and all(w.state == "running" for w in found):
        shell.say(f"{launch.run} is running: attached")
        return
    if found and any(w.state == "running" for w in found):
        # Hosts that compute together start together.
        stop(launch, shell)
    shell.need(commands.ssh(launch, commands.prepare(launch, code)), seconds=SETUP_SECONDS)
    shell.need(commands.ssh(launch, commands.act(launch, "start")))
    shell.say(f"{launch.run} started on {launch.slice.hosts} host{'s' if launch.slice.hosts > 1 else ''}")


def stop(launch: Launch, shell: Shell) -> None:
    """SIGTERM to the job on every host; it saves its state and ends."""
    shell.run(commands.ssh(launch, commands.act(launch, "stop")))


def watch(launch: Launch, shell: Shell) -> tuple[int | None, int]:
    """Wait for the job's end: its exit code, or None if the machine is gone; and the phases it has committed."""
    silent, ended, phases, shown = 0, 0, 0, ""
    while True:
        # Asked first, since an ssh to a host that is gone takes minutes to fail.
        if state(launch, shell).name != ACTIVE:
            return None, phases
        found = workers(launch, shell)
        if found is None:
            silent += 1
            if silent >= UNREACHABLE:
                return None, phases
        else:
            silent, phases = 0, max(w.phases for w in found)
            line = f"{launch.run}: {phases} phases committed, {summary(found)}"
            if line != shown:
                shell.say(line)
                shown = line
            if all(w.state != "running" for w in found):
                return combined(found), phases
            if any(w.state == "absent" or w.code for w in found):  # a host that is done may wait for the others
                ended += 1
                if ended > LAGGARDS:
                    stop(launch, shell)
        shell.sleep(POLL_SECONDS)


def summary(found: list[Worker]) -> str:
    count = {s: sum(w.state == s for w in found) for s in ("running", "exit", "absent")}
    return ", ".join(f"{n} host{'s' if n > 1 else ''} {s}" for s, n in count.items() if n)


def combined(found: list[Worker]) -> int:
    """One exit code for all hosts: a mistake before a crash before 75 before 0; a job that vanished is run again."""
    codes = [AGAIN if w.code is None or w.code in LIKE_AGAIN else w.code for w in found]
    if MISTAKE in codes:
        return MISTAKE
    return next((c for c in codes if c not in (DONE, AGAIN)), AGAIN if AGAIN in codes else DONE)


def attend(launch: Launch, shell: Shell, code: str) -> tuple[int | None, int]:
    """Start or attach, and watch; a machine that cannot be set up is a machine that is gone, if it is gone."""
    try:
        start(launch, shell, code)
    except Failed as failed:
        shell.say(str(failed))
        reached = failed.result.code != 255 and "return code [255]" not in failed.result.error  # 255 is ssh's own
        return (CRASH if reached and state(launch, shell).name == ACTIVE else None), 0
    return watch(launch, shell)


def run(launch: Launch, shell: Shell, code: str) -> int:
    """The whole loop. Returns 0 when the job is done.

    Raises:
      UserError: the job, or Google Cloud, refuses what the user asked for.
      GaveUp: too many machines or crashes; what is saved stays saved.
    """
    machines = Machines(launch, shell)
    lost, crashes, restarts, best = False, 0, 0, -1
    while True:
        machines.ready(lost=lost)
        ended, phases = attend(launch, shell, code)
        lost = ended is None
        if ended == DONE:
            return DONE
        if ended == MISTAKE:
            raise UserError(f"the job refused its settings (exit code 2); its last lines:\n{tail(launch, shell)}")
        if ended is None:
            shell.say(f"{launch.name} is gone after {phases} phases; asking for another")
        elif ended == AGAIN:
            restarts += 1
            if restarts > launch.max_recreations:
                raise GaveUp(f"the job was stopped {restarts} times; run again, or raise max_recreations=", AGAIN)
            shell.say(f"the job was stopped after {phases} phases, its state is saved; going on")
            shell.sleep(POLL_SECONDS)  # a machine that is being taken away is soon said to be SUSPENDING
        else:
            crashes = 1 if phases > best else crashes + 1
            if crashes >= launch.max_crashes:
                raise GaveUp(
                    f"{crashes} crashes (exit code {ended}) in a row after {phases} phases; the last lines:\n"
                    f"{tail(launch, shell)}",
                    CRASH,
                )
            shell.say(f"the job crashed with exit code {ended} after {phases} phases; starting it again")
            shell.sleep(POLL_SECONDS)
        best = max(best, phases)


def tail(launch: Launch, shell: Shell, lines: int = 15) -> str:
    """The end of the newest log in the bucket."""
    result = shell.run(commands.read(f"{launch.remote}/logs/*-worker-0.log"))
    text = result.out if result.code == 0 else f"(no log in {launch.remote}/logs)"
    return "\n".join(text.splitlines()[-lines:])
