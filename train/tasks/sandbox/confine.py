"""What is taken away from a worker and its programs: namespaces, files, privileges, limits. Linux, through ctypes.

Three doors are to be shut: files, network, and other processes (new ones, and signals to those there are). A layer is
tried, and what it did is measured afterwards by a program that tries the doors (`server.py`), not assumed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import seccomp

NOBODY = 65534

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
SPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38

_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """Raise OSError naming `what` if a C call failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int) -> None:
    check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl({option}, {value})")


# --- namespaces ---------------------------------------------------------------------------------------------


def enter_namespaces(base: str, tmp_mb: int, pipes: Sequence[int]) -> int:
    """Move this process into namespaces of its own, with nothing in them but the standard library and a small tmpfs.

    Forks: the caller goes on as process 1 of the new process namespace, and its parent waits for it.

    Args:
      base: an empty folder to build the new root in; nothing of it remains outside.
      tmp_mb: megabytes of the tmpfs.
      pipes: descriptors to the client, which the parent closes.

    Returns:
      A descriptor of the namespace's `/proc`, which is not mounted any more; -1 if it could not be mounted.
    """
    root = os.getuid() == 0 and _unshared(SPACES)
    if not root:
        if os.getuid() == 0:  # root of a container that may not mount: the programs' uid must not be its own
            require_open_library()
            become_nobody()
            prctl(PR_SET_DUMPABLE, 1)  # else `/proc/self` stays root's, and the maps cannot be written
        outer = (os.getuid(), os.getgid())
        check(_libc.unshare(SPACES | CLONE_NEWUSER), "unshare with a user namespace")
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {outer[0]} 1"),
            ("gid_map", f"{NOBODY} {outer[1]} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    child = os.fork()
    if child:
        for descriptor in pipes:
            os.close(descriptor)  # the pipes to the client are the child's: they must close with it
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    proc = _build_root(base, tmp_mb)
    if root:
        become_nobody()
    drop_capabilities()
    return proc


def _unshared(spaces: int) -> bool:
    """Enter namespaces as root, unless that is not allowed."""
    try:
        check(_libc.unshare(spaces), "unshare")
    except PermissionError:
        return False
    return True


def _build_root(base: str, tmp_mb: int) -> int:
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in standard_library():
        target = base + path
        os.makedirs(target, exist_ok=True)
        _mount(path, target, None, MS_BIND)
        # what the mount is bound by already (nosuid, noexec, …) may not be loosened in a user namespace
        kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC | 1024 | 2048 | (1 << 21))
        _mount("none", target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)
        for packages in ("site-packages", "dist-packages"):
            if os.path.isdir(f"{target}/{packages}"):
                _mount("tmpfs", f"{target}/{packages}", "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k")
    for folder in ("tmp", "proc"):
        os.mkdir(f"{base}/{folder}")
    mount_tmp(f"{base}/tmp", tmp_mb)
    proc = -1
    try:
        _mount("proc", f"{base}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError:
        pass  # a container with parts of its /proc hidden lets nobody mount another; the hello says what is lost
    else:
        proc = hide_proc(f"{base}/proc")
    _mount("none", base, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(base)
    here = seccomp.machine()
    if here is None:
        raise OSError(errno.ENOSYS, "no system call numbers of this processor are known here")
    check(_libc.syscall(here.pivot_root, b".", b"."), "pivot_root")
    unmount(".")  # the old root
    os.chdir("/tmp")
    return proc


def mount_tmp(path: str, megabytes: int) -> None:
    """Mount the small tmpfs: so many megabytes, a thousand files, nothing in it can be executed."""
    limits = f"size={megabytes}m,nr_inodes=1024,mode=1777"
    _mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, limits)


def hide_proc(path: str) -> int:
    """Keep a descriptor of `/proc` and take the mount away, so that only the holder of the descriptor can read it."""
    proc = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    unmount(path)
    return proc


def unmount(path: str) -> None:
    """Take a mount away, whoever still uses it."""
    check(_libc.umount2(path.encode(), MNT_DETACH), f"umount {path}")


def standard_library() -> list[str]:
    """The folders that hold Python's own modules."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    paths = {os.path.dirname(os.__file__), os.path.join(sys.base_exec_prefix, sys.platlibdir, version)}
    return sorted({os.path.realpath(path) for path in paths if os.path.isdir(path)})


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind, data)]
    result = _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    check(result, f"mount {kind or 'bind'} at {target}")


# --- privileges ---------------------------------------------------------------------------------------------


def become_nobody() -> None:
    """Give up root for good."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def require_open_library() -> None:
    """Raise PermissionError where Python's library is root's alone: as nobody, programs could import nothing."""
    closed = [path for path in standard_library() if not open_to_nobody(path)]
    if closed:
        raise PermissionError(f"programs may not be root's, and only root can read Python in {closed[0]}")


def open_to_nobody(path: str) -> bool:
    """Whether every user may look into a folder and all above it."""
    above = path
    while os.stat(above).st_mode & 0o001:
        if above == "/":
            return os.stat(path).st_mode & 0o004 > 0
        above = os.path.dirname(above)
    return False


def drop_capabilities() -> None:
    """Give up every capability, those of a user namespace's owner too, and any way to gain one."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    header = struct.pack("<Ii", 0x20080522, 0)
    check(_libc.capset(header, bytes(24)), "capset")


def harden_server() -> None:
    """Die with the client, and be no one's to trace: programs run under the same uid."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


# --- one program --------------------------------------------------------------------------------------------


def limiter(memory_mb: int, file_mb: int, *, filtered: bool) -> tuple[Callable[..., None], list]:
    """Prepare what a forked child calls to shut itself in; everything that takes time is done here, once.

    Args:
      memory_mb, file_mb: address space, and the largest file, in megabytes.
      filtered: whether to put a filter before the system calls.

    Returns:
      (shut_in(seconds of wall clock, whether other processes of this uid may look at it), the layers it applies).

    Raises:
      OSError: no system calls of this processor are known here.
    """
    here = seccomp.machine() if filtered else None
    if filtered and here is None:
        raise OSError(errno.ENOSYS, "no system calls of this processor are known here")
    layers = ["seccomp"] if here else []
    template = bytearray(seccomp.assemble(here, 0x7ABCDEF1)) if here else bytearray()
    marks = []
    while here and (at := template.find(struct.pack("<I", 0x7ABCDEF1), marks[-1] + 4 if marks else 0)) >= 0:
        marks.append(at)
    steps = (ctypes.c_char * len(template)).from_buffer(template)
    bundle = struct.pack("<HxxxxxxQ", len(template) // 8, ctypes.addressof(steps))
    limits = [
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, file_mb << 20),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
    ]
    if not here:
        # with the filter no process can be made; without it, this is what stops a fork bomb of an ordinary user
        limits.append((resource.RLIMIT_NPROC, 0))

    def shut_in(seconds: float, seen: bool) -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(PR_SET_DUMPABLE, int(seen))
        for which, value in limits:
            hard = resource.getrlimit(which)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))
        cpu = int(seconds) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        if here:
            for at in marks:
                template[at : at + 4] = struct.pack("<I", os.getpid())
            check(_libc.syscall(here.seccomp, 1, 0, bundle), "seccomp")

    return shut_in, layers


def hide(kept: Any) -> None:
    """Leave no way to this module and to ctypes but `kept`, which stays alive whoever lets go of it."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    for name in list(sys.modules):
        if name in ("ctypes", "_ctypes", __name__, seccomp.__name__) or name.startswith("ctypes."):
            del sys.modules[name]
    # found through the globals of any class of ctypes, these would write to memory without a word to the audit hook
    for name in ("memmove", "memset", "cast", "string_at", "wstring_at", "pythonapi", "pydll", "cdll"):
        for found in (name, f"_{name}"):
            ctypes.__dict__.pop(found, None)
    package = sys.modules[__package__ or ""]
    for name in ("confine", "seccomp"):
        vars(package).pop(name, None)
