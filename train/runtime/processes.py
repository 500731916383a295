"""Several processes that run as one: how they start, what one of them does for all, and how they end.

Every process runs the same lines on the same values: arrays on the mesh are global, plain Python is repeated. Files are
the first process's: `on_first` does it there and gives all what came of it, so that an error is everyone's.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from ..log import UserError, is_first_process, say
from .peers import LOST, Peers, gather, join, roll_call
from .settings import Distributed

T = TypeVar("T")
_peers: Peers | None = None


def start(config: Distributed) -> None:
    """Find the other processes; before jax is first used.

    Raises:
      UserError: some did not come (named), or the settings do not say where to look.
    """
    global _peers
    if not config.wanted or jax.distributed.is_initialized():
        return
    seconds: dict[str, Any] = {
        "initialization_timeout": config.start_timeout,
        "heartbeat_timeout_seconds": config.silence,
    }
    if config.auto:
        try:
            jax.distributed.initialize(**seconds)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"distributed.auto: jax found no cluster here ({str(error).splitlines()[0]}); set distributed."
                "coordinator=HOST:PORT distributed.processes=N distributed.process_id=I"
            ) from error
        _peers = connect(config)
    else:
        address, number, count = config.by_hand
        _peers = roll_call(address, number, count, timeout=config.start_timeout, silence=config.silence)
        jax.distributed.initialize(address, count, number, **seconds)
    say(f"{jax.process_count()} processes with {jax.device_count()} devices ({jax.devices()[0].platform})")


def connect(config: Distributed) -> Peers | None:
    """Lines between processes that jax brought together; None where there is but one."""
    count, me = jax.process_count(), jax.process_index()
    if count == 1:
        return None
    deadline = time.monotonic() + config.start_timeout
    if me == 0:
        with socket.create_server(("", 0), backlog=count) as server:
            broadcast(f"{socket.getfqdn()}:{server.getsockname()[1]}")
            return Peers(gather(server, count, deadline, config.silence), me, count)
    host, _, port = broadcast("").rpartition(":")
    return Peers({0: join(host, int(port), me, count, deadline, config.silence)}, me, count)


def end(code: int, *, with_all: bool) -> None:
    """Say to the others that this process is done.

    Args:
      with_all: all end here, at the same point. Otherwise this one ends alone, at once: what jax does at a normal end
        waits for the others.
    """
    if _peers is None:
        return
    if with_all:
        broadcast(None)  # nobody is still at work
    _peers.leave(0 if with_all else code)
    if not with_all:
        if _peers.me == 0:
            time.sleep(0.5)  # the others still say why they end; jax's service goes with this process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def failed(error: BaseException) -> None:
    """Called with an error nobody expected: if its cause is a lost process, say that and end here."""
    if _peers is not None:
        _peers.await_loss(2.0)
        traceback.print_exception(error)
        end(1, with_all=False)


def several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def broadcast(value: T) -> T:
    """The first process's `value` (JSON), on all."""
    if not several():
        return value
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_first_process() else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    room = np.zeros(max(64, 1 << (size - 1).bit_length()), np.uint8)  # few sizes: each is compiled once
    room[: data.size] = data
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(room))[:size]))


def on_first(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `function` on the first process alone; what it returned (JSON), or raised, is everyone's.

    It is called when all have come here, so that it may move or remove what the others were reading; what it wrote is
    there for all when this returns. It must not ask for anything the others have a part in, such as values of arrays
    on the mesh.
    """
    if not several():
        return function(*args, **kwargs)
    broadcast(None)
    error: Exception | None = None
    outcome: dict[str, Any] = {}
    if is_first_process():
        try:
            outcome = {"value": function(*args, **kwargs)}
        except Exception as caught:
            error, outcome = caught, {"error": str(caught), "user": isinstance(caught, UserError)}
    outcome = broadcast(outcome)
    if error is not None:
        raise error
    if "error" in outcome:
        raise UserError(outcome["error"]) if outcome["user"] else RuntimeError(f"process 0: {outcome['error']}")
    return outcome["value"]


def gather_values(value: int | float | bool) -> list[int | float | bool]:
    """What every process has to say, in process order."""
    if not several():
        return [value]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.asarray(value))).reshape(-1).tolist()


def to_host(array: Any) -> np.ndarray:
    """The whole of an array on the mesh, in the memory of every process."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


__all__ = ["LOST", "broadcast", "end", "failed", "on_first", "several", "start", "to_host"]
