"""From the words of a command to a program that can start: keys and values, then jax and the other processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def start_jax(config: Any = None, *, may_stop: bool = False) -> None:
    """What must be done before jax is first used: virtual devices, other processes, where compiled programs are kept.

    Args:
      config: its `mesh` and `distributed` are looked at.
      may_stop: a signal is answered at the next safe point.
    """
    import os

    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
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
