"""Who is there: a line from every process to the first, held open from the roll call to the end of the run.

`jax.distributed` aborts the process, without a name, when another never comes or is lost; on an accelerator the
others first hang in a collective. These connections say at once who it was: a killed process's are closed by its
machine, a machine without power or network is found by TCP's own keep-alive.

The roll call is held on the coordinator's port, before jax has it: a listener gone, its connections stay.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, NoReturn

from ..log import UserError

LOST = 76
"""Exit code: another process is gone; start all again and the run goes on. (EX_PROTOCOL of sysexits.h.)"""
GRACE = 5.0
"""Seconds in which the others may end by themselves once one has said that it ends."""


class Peers:
    """The lines of one process: the first's to all others, the others' to the first.

    Args:
      lines: process number → connected socket.
      me, count: this process, and how many there are.
    """

    def __init__(self, lines: dict[int, socket.socket], me: int, count: int):
        self.lines, self.me, self.count = lines, me, count
        self.names = {number: address(line) for number, line in lines.items()}
        self.over = threading.Event()
        self._telling = threading.Lock()
        for number in lines:
            threading.Thread(target=self._listen, args=(number,), daemon=True).start()

    def leave(self, code: int) -> None:
        """Say that this process ends, and how; the others then do not count it as lost."""
        self.over.set()
        for number in self.lines:
            self._tell(number, {"leaving": self.me, "code": code})

    def close(self) -> None:
        """Hang up."""
        self.over.set()
        for line in self.lines.values():
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)  # wakes its listener
            line.close()

    def await_loss(self, seconds: float) -> None:
        """After an error of a collective: give the listener time to find that its cause is a lost process."""
        self.over.wait(seconds)

    def _listen(self, number: int) -> None:
        with contextlib.suppress(OSError), self.lines[number].makefile() as lines:
            for line in lines:
                said = json.loads(line)
                if "lost" in said:
                    self._end(said["lost"], said["how"])
                if said.get("code") == 0:
                    return
                if "leaving" in said:
                    time.sleep(GRACE)
                    self._end(number, f"it ended with exit code {said['code']}: see what it printed")
        if not self.over.is_set():
            self._end(number, "its connection broke: killed, out of memory, or its machine is gone")

    def _end(self, number: int, how: str) -> NoReturn:
        """Say who is lost, pass it on, and end this process: its main thread may hang in a collective for ever."""
        with self._telling:
            where = f" ({self.names[number]})" if number in self.names else ""
            print(
                f"jaxmerge: process {number} of {self.count}{where} is lost: {how}. Process {self.me} stops. "
                "What is committed is on disk: start all processes again with the same command",
                file=sys.stderr,
                flush=True,
            )
            for other in self.lines:
                if other != number:
                    self._tell(other, {"lost": number, "how": how})
            if self.me == 0:
                time.sleep(0.5)  # jax's service ends with this process, and aborts whoever still listens to it
            sys.stdout.flush()
            os._exit(LOST)

    def _tell(self, number: int, what: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # who is gone need not be told
            self.lines[number].sendall((json.dumps(what) + "\n").encode())


def roll_call(coordinator: str, me: int, count: int, *, timeout: float, silence: int) -> Peers:
    """Wait until all `count` processes have come to `coordinator`.

    Args:
      coordinator: host:port of the first process; free again for a listener when this returns.
      timeout: seconds.
      silence: seconds after which a machine that answers nothing counts as lost.

    Raises:
      UserError: who did not come.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"distributed.coordinator is {coordinator!r}; wanted host:port of process 0")
    deadline = time.monotonic() + timeout
    if me:
        return Peers({0: join(host, int(port), me, count, deadline, silence)}, me, count)
    with socket.create_server(("", int(port)), backlog=count) as server:
        return Peers(gather(server, count, deadline, silence), me, count)


def hang_up(lines: Iterable[socket.socket], problem: str) -> None:
    """Tell those who came why the run does not start."""
    for line in lines:
        with contextlib.suppress(OSError):
            line.sendall((json.dumps({"refused": problem}) + "\n").encode())
        line.close()


def gather(server: socket.socket, count: int, deadline: float, silence: int) -> dict[int, socket.socket]:
    """The first process's side: accept the others until all are there, then let them go on."""
    lines: dict[int, socket.socket] = {}
    start = time.monotonic()
    while len(lines) < count - 1:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            line, _ = server.accept()
        except TimeoutError:
            missing = ", ".join(str(i) for i in range(1, count) if i not in lines)
            here = ", ".join(f"{i} ({address(line)})" for i, line in sorted(lines.items())) or "none but the first"
            problem = (
                f"process {missing} of {count} did not come within {time.monotonic() - start:.0f} s "
                f"(here: {here}); look at its machine, or raise distributed.start_timeout"
            )
            hang_up(lines.values(), problem)
            raise UserError(problem) from None
        line.settimeout(10)
        try:
            number, wanted = json.loads(read_line(line))["process"]
        except (OSError, ValueError, KeyError, TypeError):
            line.close()  # a port scanner, not one of us
            continue
        problem = complaint(number, wanted, count, lines)
        if problem:
            hang_up([*lines.values(), line], problem)
            raise UserError(problem)
        lines[number] = line
    for line in lines.values():
        line.sendall(b'{"all": "here"}\n')
        keep_alive(line, silence)
    return lines


def complaint(number: int, wanted: int, count: int, lines: dict[int, socket.socket]) -> str:
    if wanted != count:
        return (
            f"process {number} was started with distributed.processes={wanted}, process 0 with {count}; make them one"
        )
    if not 0 < number < count or number in lines:
        return f"two processes have distributed.process_id={number}, or it is not below {count}; give each its own"
    return ""


def join(host: str, port: int, me: int, count: int, deadline: float, silence: int) -> socket.socket:
    """The others' side: say who this is, and wait to hear that all are there."""
    why: Exception = TimeoutError()
    while time.monotonic() < deadline:
        try:
            line = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.1))
        except OSError as error:  # not there yet
            why = error
            time.sleep(0.2)
            continue
        try:
            line.sendall((json.dumps({"process": [me, count]}) + "\n").encode())
            line.settimeout(max(deadline - time.monotonic(), 0.1) + 1)  # the first says who is missing
            said = json.loads(read_line(line))
        except (OSError, ValueError) as error:  # something else holds the port
            line.close()
            why = error
            time.sleep(0.2)
            continue
        if "refused" in said:
            line.close()
            raise UserError(said["refused"])
        keep_alive(line, silence)
        return line
    raise UserError(
        f"process 0 at {host}:{port} did not let process {me} of {count} in ({why or type(why).__name__}): it, or "
        "another process, never came; look at the first process's output, or raise distributed.start_timeout"
    )


def read_line(line: socket.socket) -> str:
    """One short line, a byte at a time: what follows it belongs to the listener."""
    said = bytearray()
    while not said.endswith(b"\n"):
        byte = line.recv(1)
        if not byte or len(said) > 4096:
            raise OSError("the connection was closed")
        said += byte
    return said.decode()


def keep_alive(line: socket.socket, silence: int) -> None:
    """Block for ever on this line, but let a dead machine break it after about `silence` seconds."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", max(silence // 2, 1)), ("TCP_KEEPINTVL", max(silence // 6, 1))):
        if hasattr(socket, name):  # Linux; elsewhere the system's own times
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_KEEPCNT"):
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def address(line: socket.socket) -> str:
    try:
        host, port = line.getpeername()[:2]
    except OSError:
        return "unknown address"
    return f"{host}:{port}"
