"""The queued resource of a run: its state, and getting it to ACTIVE.

    ABSENT ──create──▶ WAITING_FOR_RESOURCES ─▶ PROVISIONING ─▶ ACTIVE ──preempted──▶ SUSPENDING ─▶ SUSPENDED
                              │                      │                                                  │
                              └──────── FAILED ◀─────┘            both are deleted and asked for again ◀┘

States: https://cloud.google.com/tpu/docs/queued-resources
"""

from __future__ import annotations

import json
from typing import NamedTuple

from train.log import UserError

from . import commands
from .settings import Launch
from .shell import Failed, Shell, absent, denied, quota

ABSENT, ACTIVE = "ABSENT", "ACTIVE"
WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
LEAVING = ("SUSPENDING", "DELETING")
GONE = ("SUSPENDED", "FAILED")
POLL_SECONDS = (10, 20, 30, 60)  # the last repeats
NEVER = (3, 7, 16)  # gRPC: invalid argument, permission denied, unauthenticated


class State(NamedTuple):
    """What gcloud says of a queued resource; `reason` and gRPC `code` where it failed."""

    name: str
    reason: str = ""
    code: int = 0


class GaveUp(Exception):
    """The run stops here with `code`, and can be gone on with; the message says why."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def state(launch: Launch, shell: Shell) -> State:
    """The state now; a gcloud that fails otherwise than by NOT_FOUND is asked again for a while."""
    try:
        data = json.loads(shell.need(commands.describe(launch), tries=10)).get("state") or {}
    except Failed as failed:
        if absent(failed.result.error):
            return State(ABSENT)
        refuse(launch, failed.result.error)
        raise
    error = (data.get("failedData") or {}).get("error") or {}
    return State(data.get("state", "STATE_UNSPECIFIED"), str(error.get("message", "")), int(error.get("code", 0)))


def refuse(launch: Launch, error: str) -> None:
    """Raise what the user alone can mend; return if it may pass by itself."""
    short = " ".join(error.split())[-500:]
    if quota(error):
        raise UserError(
            f"quota refused {launch.accelerator} ({launch.capacity}) in {launch.zone}: {short}; ask for quota of this "
            "TPU in this zone in the console (IAM & Admin, Quotas), or give zone=, capacity= or a smaller accelerator="
        )
    if denied(error):
        raise UserError(f"Google Cloud refused {launch.name} in {launch.project}: {short}")


def remove(launch: Launch, shell: Shell) -> None:
    """Delete the queued resource with its node, and wait until the name is free again."""
    if state(launch, shell).name == ABSENT:
        return
    result = shell.run(commands.delete(launch))
    if result.code and not absent(result.error):
        refuse(launch, result.error)
        shell.say(f"deleting {launch.name}: {result.error.strip()[-200:]}; trying again")
    if shell.dry:
        return
    for attempt in range(120):
        now = state(launch, shell)
        if now.name == ABSENT:
            return
        shell.sleep(wait_of(attempt))
        if now.name not in LEAVING:  # deleting was refused while the node was being taken away
            shell.run(commands.delete(launch))
    raise GaveUp(f"{launch.name} is not deleted after an hour or more; see the console", 1)


def ask(launch: Launch, shell: Shell) -> None:
    """Create the queued resource; one that another launcher created meanwhile is as good."""
    shell.say(f"asking for {launch.accelerator} ({launch.capacity}) in {launch.zone} as {launch.name}")
    for attempt in range(4):
        result = shell.run(commands.create(launch))
        if result.code == 0 or "ALREADY_EXISTS" in result.error or "already exists" in result.error:
            return
        refuse(launch, result.error)
        if attempt == 3:
            raise Failed(commands.create(launch), result)
        shell.sleep(wait_of(attempt))


def wait_of(attempt: int) -> float:
    return POLL_SECONDS[min(attempt, len(POLL_SECONDS) - 1)]


class Machines:
    """Gets a run its machine, counts how many it has had, and stops when that is too many."""

    def __init__(self, launch: Launch, shell: Shell):
        self.launch, self.shell = launch, shell
        self.asked = 0

    def ready(self, *, lost: bool = False) -> None:
        """Return when the slice is ACTIVE.

        Args:
          lost: the machine does not answer; whatever its state says, it is deleted first.

        Raises:
          UserError: quota or rights refuse it.
          GaveUp: more machines were asked for than `max_recreations` allows.
        """
        if lost:
            remove(self.launch, self.shell)
        shown, attempt = "", 0
        while True:
            now = state(self.launch, self.shell)
            if now.name != shown:
                self.shell.say(f"{self.launch.name}: {now.name}{': ' + now.reason if now.reason else ''}")
                shown, attempt = now.name, 0
            if now.name == ACTIVE:
                return
            if now.name in GONE:
                self.bury(now)
            elif now.name == ABSENT:
                self.create()
            self.shell.sleep(wait_of(attempt))
            attempt += 1

    def bury(self, now: State) -> None:
        if now.name == "FAILED" and (quota(now.reason) or now.code in NEVER):
            remove(self.launch, self.shell)
            refuse(self.launch, now.reason)
            raise UserError(f"{self.launch.name} failed: {now.reason}")
        if now.name == "FAILED" and self.launch.valid_until:
            raise GaveUp(
                f"no machine within valid_until={self.launch.valid_until} ({now.reason or 'no reason given'}); run "
                "again later, or give zone=, capacity= or a longer valid_until=",
                75,
            )
        remove(self.launch, self.shell)

    def create(self) -> None:
        if self.asked > self.launch.max_recreations:
            raise GaveUp(
                f"{self.asked} machines were lost or not to be had; what is saved stays in {self.launch.remote}: "
                "run again later, or raise max_recreations=",
                75,
            )
        if self.asked:  # a zone that just took a machine away has none to give
            self.shell.sleep(min(30 * 2 ** (self.asked - 1), 1800))
        self.asked += 1
        ask(self.launch, self.shell)
