"""From the words of a command to a program that can start: keys and values, then jax and the other processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..resolve import build, override

T = TypeVar("T")
Words = Sequence[str]


def take(assignments: Words, **defaults: Any) -> tuple[dict[str, Any], list[str]]:
    """Split off the assignments to the keys of `defaults`; (their values, the other assignments)."""
    mine = [a for a in assignments if a.partition("=")[0] in defaults]
    return defaults | override({}, mine), [a for a in assignments if a not in mine]


def options(assignments: Words, cls: type[T]) -> T:
    return build(cls, override({}, assignments))


def start_jax(config: Any = None, *, may_stop: bool = False) -> None:
    """What must be done before jax is first used: virtual devices, other processes, where compiled programs are kept.

    Args:
      config: its `mesh` and `distributed` are looked at.
      may_stop: a signal is answered at the next safe point.
    """
    import os

    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmerge" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    if config is None:
        return
    if config.mesh.cpu_devices is not None:
        from .mesh import request_cpu_devices

        request_cpu_devices(config.mesh.cpu_devices)
    if config.distributed.wanted:
        from . import processes

        processes.start(config.distributed)  # jax then watches for SIGTERM
    elif may_stop:
        from . import stop

        stop.listen()
