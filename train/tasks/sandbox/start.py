"""How a worker is started, and what is seen of its processes from outside."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_START = """
import sys, types, json
package = types.ModuleType("jaxmerge_sandbox")
package.__path__ = [sys.argv[1]]
sys.modules["jaxmerge_sandbox"] = package
from jaxmerge_sandbox.server import serve
serve(json.loads(sys.argv[2]))
"""


class Broken(Exception):
    """A worker that does not answer as it should."""


def children(pid: int) -> list[int]:
    """Descriptors of a process's children: bubblewrap, killed, is not always let to kill the server it started."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [os.pidfd_open(int(child)) for child in file.read().split()]


def uid_of(pid: int) -> int:
    """The uid of the innermost process below one, as this process sees it: its programs have the same."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        if below := file.read().split():
            return uid_of(int(below[0]))
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[2]) for line in file if line.startswith("Uid:"))


def environment() -> dict[str, str]:
    """What a worker knows of the outside: nothing but how to find its libraries."""
    kept = {k: os.environ[k] for k in ("LD_LIBRARY_PATH",) if k in os.environ}
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp", "PYTHONHASHSEED": "0", **kept}


def command_of(way: str, config: Mapping[str, Any]) -> list[str]:
    """The command that starts a worker."""
    if not sys.platform.startswith("linux"):
        raise Broken("only Linux has the means")
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    start = [python, "-P", "-s", "-S", "-B", "-c", _START]
    if way != "bubblewrap":
        return [*start, str(_HERE), json.dumps(config)]
    found = shutil.which("bwrap")
    if found is None:
        raise Broken("bwrap is not on the PATH")
    from .confine import standard_library

    root = os.getuid() == 0
    command = [found, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent",
               "--new-session", "--as-pid-1", "--hostname", "sandbox"]  # fmt: skip
    if root:  # the worker becomes nobody by itself, which a user namespace would only pretend
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SYS_ADMIN"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-add", "CAP_SYS_ADMIN"]
    inside = [*standard_library(), python]
    for folder in sorted({str(parent) for path in inside for parent in Path(path).parents} - {"/"}):
        command += ["--perms", "0755", "--dir", folder]  # else they are root's alone, and nobody finds what is below
    for path in library_folders():
        kind = "--symlink" if os.path.islink(path) else "--ro-bind"
        command += [kind, os.readlink(path) if kind == "--symlink" else path, path]
    for path in standard_library():
        command += ["--ro-bind", path, path]
        for packages in ("site-packages", "dist-packages"):
            if os.path.isdir(f"{path}/{packages}"):
                command += ["--tmpfs", f"{path}/{packages}", "--remount-ro", f"{path}/{packages}"]
    command += ["--ro-bind", python, python, "--ro-bind", str(_HERE), "/sandbox"]
    command += ["--proc", "/proc", "--perms", "1777", "--size", str(config["tmp_mb"] << 20), "--tmpfs", "/tmp"]
    command += ["--remount-ro", "/", "--chdir", "/"]
    return [*command, *start, "/sandbox", json.dumps(config)]


def library_folders() -> list[str]:
    """Where shared libraries lie, for a sandbox in which Python starts anew."""
    folders = {str(Path(sys.base_prefix) / "lib")} if sys.base_prefix not in ("/usr", "/") else set()
    folders |= {path for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib") if os.path.isdir(path)}
    return sorted(folders)
