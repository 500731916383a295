"""Commands as argument lists: run, retried, or only printed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from train import log
from train.log import UserError


class Result(NamedTuple):
    code: int
    out: str
    error: str


class Failed(Exception):
    """A command ended otherwise than with 0; the message has its last lines."""

    def __init__(self, command: Sequence[str], result: Result):
        last = " ".join((result.error.strip() or result.out.strip()).splitlines()[-3:])
        super().__init__(f"{' '.join(command[:5])} … ended with {result.code}: {last[-600:]}")
        self.result = result


class Shell:
    """Runs commands; time is a parameter so that a test waits for nothing.

    Nothing here reads or prints the environment: what is in it may be secret.
    """

    dry = False

    def __init__(self, sleep: Callable[[float], None] = time.sleep):
        self.sleep = sleep

    def say(self, line: str) -> None:
        """Print a line for the person watching."""
        log.say(line)

    def run(self, command: Sequence[str], *, given: str | None = None, seconds: float = 600) -> Result:
        """Run a command with `given` on its standard input; whatever its exit code, 124 after so many seconds."""
        try:
            done = subprocess.run(
                list(command), input=given or "", capture_output=True, text=True, check=False, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return Result(124, "", f"no end after {seconds:.0f} s")
        except FileNotFoundError:
            raise UserError(
                f"{command[0]} is not installed; get the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)"
                if command[0] == "gcloud"
                else f"{command[0]} is not installed"
            ) from None
        return Result(done.returncode, done.stdout, done.stderr)

    def need(self, command: Sequence[str], *, given: str | None = None, tries: int = 4, seconds: float = 600) -> str:
        """What a command printed; one that fails is tried again, and an error in the end.

        Raises:
          Failed: the last try's.
        """
        for attempt in range(tries):
            result = self.run(command, given=given, seconds=seconds)
            if result.code == 0:
                return result.out
            if attempt + 1 < tries and not final(result.error):
                self.sleep(min(5 * 2**attempt, 120))
            else:
                raise Failed(command, result)
        raise ValueError(f"tries is {tries}; it must be at least 1")


class DryShell(Shell):
    """Prints every command that would be run, shell-quoted, and answers as if all went well."""

    dry = True

    def __init__(self):
        super().__init__(lambda seconds: None)
        self.created = self.started = False

    def say(self, line: str) -> None:
        log.say(f"# {line}")  # so that the rest can be given to a shell as it is

    def run(self, command: Sequence[str], *, given: str | None = None, seconds: float = 600) -> Result:
        log.say(shlex.join(command) + (f" << 'END'\n{given}END" if given is not None else ""))
        words = set(command)
        if "queued-resources" in words and "create" in words:
            self.created = True
        if "queued-resources" in words and "describe" in words:
            if not self.created:
                return Result(1, "", "NOT_FOUND")
            return Result(0, json.dumps({"state": {"state": "ACTIVE"}}), "")
        if "ssh" in words:
            self.started |= "run.sh start" in command[-1]
            return Result(0, "jaxmerge worker 0 exit 0 0\n" if self.started else "", "")
        if words >= {"cat"} or words >= {"buckets", "describe"}:
            return Result(1, "", "NOT_FOUND")
        return Result(0, "", "")


# Names of runs stand in these texts too, so that a bare word or number says nothing: `quota-test`, `demo-404`.
_ABSENT = re.compile(r"NOT_FOUND|was not found|not found: 404|matched no objects")
_DENIED = re.compile(
    r"PERMISSION_DENIED|INVALID_ARGUMENT|UNAUTHENTICATED|does not have permission|(?<![\w-])403(?![\w-])"
    r"|gcloud auth login|unrecognized arguments|has not been used in project"
)
_QUOTA = re.compile(r"(?<![\w-])quota(?![\w-])|quota_?exceeded", re.IGNORECASE)


def absent(error: str) -> bool:
    """Whether gcloud's error says that the thing is not there."""
    return bool(_ABSENT.search(error))


def denied(error: str) -> bool:
    """Whether gcloud's error is the user's to mend: no rights, no log-in, arguments it does not take."""
    return bool(_DENIED.search(error))


def quota(error: str) -> bool:
    """Whether gcloud's error, or a request's reason, is a quota's."""
    return bool(_QUOTA.search(error))


def final(error: str) -> bool:
    return absent(error) or denied(error) or quota(error)
