"""Being asked to stop: SIGTERM (a preempted machine, a scheduler) or Ctrl-C, answered at the next safe point.

Among several processes a signal to one is answered by all at the same point.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

STOPPED = 75
"""Exit code: stopped as asked, all of it saved; the same command goes on. (EX_TEMPFAIL of sysexits.h.)"""
INTERRUPTED = 130
"""Exit code: stopped as asked by a verb that keeps nothing half done. (As shells have it for Ctrl-C.)"""

_asked = False
_points = 0


class Stopped(Exception):
    """Raised at a safe point after a request to stop: what is needed to go on is on disk."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does: what is half written is tidied up on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # of a command in the background, or under nohup
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def listen() -> None:
    """From now on a signal is a request. A second one ends the process where it is."""
    global _asked
    _asked = False  # what an earlier run of this process was asked is answered
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)


def _note(number: int, frame: Any) -> None:
    global _asked
    del frame
    _asked = True
    signal.signal(number, signal.default_int_handler)
    os.write(sys.stderr.fileno(), b"jaxmerge: asked to stop; saving at the next safe point\n")


def asked() -> bool:
    """Whether to stop here. Of several processes each must ask equally often; the answer is the same for all."""
    global _points
    from .processes import several

    if not several():
        return _asked
    from jax.experimental import multihost_utils

    # jax watches SIGTERM on every process, and has all agree on the next point none of them has passed.
    _points += 1
    return multihost_utils.reached_preemption_sync_point(_points)


def check() -> None:
    """A safe point: nothing is lost by stopping here."""
    if asked():
        raise Stopped
