"""The system calls a program may make: a classic BPF filter, assembled here, of x86-64 and AArch64.

What is not listed is refused with EPERM, sockets, new processes, other programs and ptrace among them. Threads are
allowed, and signals to oneself.

References:
  https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import errno
import platform
import struct
from typing import NamedTuple

X86_64 = """
read:0 write:1 open:2 openat:257 close:3 stat:4 fstat:5 lstat:6 newfstatat:262 statx:332 lseek:8 access:21
faccessat:269 faccessat2:439 readlink:89 readlinkat:267 getcwd:79 getdents64:217 unlink:87 unlinkat:263 rename:82
renameat:264 renameat2:316 mkdir:83 mkdirat:258 rmdir:84 chdir:80 fchdir:81 truncate:76 ftruncate:77 fsync:74
fdatasync:75 utimensat:280 chmod:90 fchmod:91 fchmodat:268 dup:32 dup2:33 dup3:292 pipe:22 pipe2:293 close_range:436
umask:95 symlink:88 symlinkat:266 link:86 linkat:265 readv:19 writev:20 pread64:17 pwrite64:18 sendfile:40
fadvise64:221 poll:7 ppoll:271 select:23 pselect6:270 epoll_create1:291 epoll_ctl:233 epoll_wait:232 epoll_pwait:281
eventfd2:290 mmap:9 munmap:11 mremap:25 mprotect:10 madvise:28 brk:12 msync:26 futex:202 set_robust_list:273
get_robust_list:274 rseq:334 membarrier:324 sched_yield:24 sched_getaffinity:204 getcpu:309 nanosleep:35
clock_nanosleep:230 clock_gettime:228 clock_getres:229 gettimeofday:96 time:201 times:100 getrusage:98 getitimer:36
setitimer:38 alarm:37 pause:34 rt_sigaction:13 rt_sigprocmask:14 rt_sigreturn:15 rt_sigsuspend:130 rt_sigtimedwait:128
rt_sigpending:127 sigaltstack:131 restart_syscall:219 exit:60 exit_group:231 getpid:39 getppid:110 gettid:186
getuid:102 geteuid:107 getgid:104 getegid:108 getpgrp:111 getpgid:121 getsid:124 getresuid:118 getresgid:120
getgroups:115 uname:63 sysinfo:99 getrandom:318 getrlimit:97 set_tid_address:218 fstatfs:138 statfs:137 wait4:61
waitid:247 flock:73
"""
AARCH64 = """
read:63 write:64 openat:56 close:57 fstat:80 newfstatat:79 statx:291 lseek:62 faccessat:48 faccessat2:439 readlinkat:78
getcwd:17 getdents64:61 unlinkat:35 renameat:38 renameat2:276 mkdirat:34 chdir:49 fchdir:50 truncate:45 ftruncate:46
fsync:82 fdatasync:83 utimensat:88 fchmod:52 fchmodat:53 dup:23 dup3:24 pipe2:59 close_range:436 umask:166 symlinkat:36
linkat:37 readv:65 writev:66 pread64:67 pwrite64:68 sendfile:71 fadvise64:223 ppoll:73 pselect6:72 epoll_create1:20
epoll_ctl:21 epoll_pwait:22 eventfd2:19 mmap:222 munmap:215 mremap:216 mprotect:226 madvise:233 brk:214 msync:227
futex:98 set_robust_list:99 get_robust_list:100 rseq:293 membarrier:283 sched_yield:124 sched_getaffinity:123
getcpu:168 nanosleep:101 clock_nanosleep:115 clock_gettime:113 clock_getres:114 gettimeofday:169 times:153
getrusage:165 getitimer:102 setitimer:103 rt_sigaction:134 rt_sigprocmask:135 rt_sigreturn:139 rt_sigsuspend:133
rt_sigtimedwait:137 rt_sigpending:136 sigaltstack:132 restart_syscall:128 exit:93 exit_group:94 getpid:172 getppid:173
gettid:178 getuid:174 geteuid:175 getgid:176 getegid:177 getpgid:155 getsid:156 getresuid:148 getresgid:150
getgroups:158 uname:160 sysinfo:179 getrandom:278 getrlimit:163 set_tid_address:96 fstatfs:44 statfs:43 wait4:260
waitid:95 flock:32
"""


class Machine(NamedTuple):
    """What the filter and its neighbours need to know of a processor: its audit number and system call numbers."""

    audit: int
    allowed: str
    clone: int
    clone3: int
    kill: int
    tgkill: int
    tkill: int
    fcntl: int
    ioctl: int
    prlimit64: int
    read: int
    seccomp: int
    pivot_root: int


MACHINES: dict[str, Machine] = {
    "x86_64": Machine(0xC000003E, X86_64, 56, 435, 62, 234, 200, 72, 16, 302, 0, 317, 155),
    "aarch64": Machine(0xC00000B7, AARCH64, 220, 435, 129, 131, 130, 25, 29, 261, 63, 277, 41),
}

CLONE_THREAD = 0x10000
FCNTL = (0, 1, 2, 3, 4, 1030)  # duplicate, get and set flags; never F_SETOWN, which sends signals to others
IOCTL = (0x5401, 0x5413, 0x5421, 0x5450, 0x5451, 0x541B)  # terminal or not, its size, blocking, close on exec, waiting

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_REFUSE = _ERRNO | errno.EPERM


def machine() -> Machine | None:
    """This processor, or None if its system calls are not listed here."""
    return MACHINES.get(platform.machine())


def assemble(here: Machine, pid: int) -> bytes:
    """Assemble the filter of the process `pid`, eight bytes an instruction.

    Signals may go to `pid` alone: `kill(0, …)` would reach the server, `kill(-1, …)` everyone.
    """
    program = [
        _step(_LOAD, 4),
        _step(_EQUAL, here.audit, yes=1),
        _step(_RETURN, _KILL),
        _step(_LOAD, 0),
    ]
    if here.audit == MACHINES["x86_64"].audit:  # the x32 calls bear other numbers
        program += [_step(_AT_LEAST, 0x40000000, no=1), _step(_RETURN, _REFUSE)]
    program += _block(here.clone, [_argument(0), _step(_ANY_BIT, CLONE_THREAD, no=1), _step(_RETURN, _ALLOW)])
    # glibc tries clone3 first, whose flags lie in memory where no filter can read them
    program += _block(here.clone3, [_step(_RETURN, _ERRNO | errno.ENOSYS)])
    for call in (here.kill, here.tgkill, here.tkill):
        program += _block(call, [_argument(0), *_one_of((pid,))])
    program += _block(here.prlimit64, [_argument(0), *_one_of((0,))])
    program += _block(here.fcntl, [_argument(1), *_one_of(FCNTL)])
    program += _block(here.ioctl, [_argument(1), *_one_of(IOCTL)])
    numbers = [int(pair.partition(":")[2]) for pair in here.allowed.split()]
    program += [_step(_EQUAL, number, yes=len(numbers) - i) for i, number in enumerate(numbers)]
    program += [_step(_RETURN, _REFUSE), _step(_RETURN, _ALLOW)]
    return b"".join(program)


def _step(code: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, value)


def _argument(i: int) -> bytes:
    return _step(_LOAD, 16 + 8 * i)


def _block(call: int, steps: list[bytes]) -> list[bytes]:
    """What to do for one call; refused where the steps come to no end."""
    steps = [*steps, _step(_RETURN, _REFUSE)]
    return [_step(_EQUAL, call, no=len(steps)), *steps]


def _one_of(values: tuple[int, ...]) -> list[bytes]:
    return [step for value in values for step in (_step(_EQUAL, value, no=1), _step(_RETURN, _ALLOW))]
