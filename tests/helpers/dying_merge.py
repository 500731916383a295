"""A merge on disk that dies at an event: before or after a tensor's bytes, its line, the companions, a rename."""

from __future__ import annotations

import os
import pathlib
import signal

from jaxmerge.files import engine, journal, merge
from jaxmerge.files.checkpoints import safetensors


def merge_until(words: list[str], die: int) -> int:
    """Merge the recipe in words[0] into words[1] in chunks of 64; SIGKILL at event number `die`."""
    engine.CHUNK, engine.LENGTHS = 64, (64,)
    events = 0

    def tick():
        nonlocal events
        events += 1
        if events == die:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(function):
        def call(*args, **keywords):
            tick()
            result = function(*args, **keywords)
            tick()
            return result

        return call

    safetensors.Writer.write = dying(safetensors.Writer.write)
    journal.Journal._write = dying(journal.Journal._write)
    journal.Journal.finish = dying(journal.Journal.finish)
    pathlib.Path.rename = dying(pathlib.Path.rename)
    merge(*words)
    return 0
