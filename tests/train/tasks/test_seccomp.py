"""The filter of system calls, interpreted here as the kernel would."""

import errno
import signal
import struct

import pytest

from train.tasks.sandbox import seccomp


def decide(program, number, arguments=(0, 0), audit=None):
    """Interpret a filter as the kernel would."""
    data = struct.pack("<iIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    value = at = 0
    while True:
        code, yes, no, k = struct.unpack_from("<HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, k)
        elif code == 0x06:
            return k
        else:
            held = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]
            at += yes if held else no


@pytest.mark.parametrize("name", seccomp.MACHINES)
def test_the_filter_allows_what_is_listed(name):
    here = seccomp.MACHINES[name]
    program = seccomp.assemble(here, pid=42)
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    listed = {int(pair.partition(":")[2]) for pair in here.allowed.split()}
    special = {here.clone, here.clone3, here.kill, here.tgkill, here.tkill, here.fcntl, here.ioctl, here.prlimit64}
    assert not listed & special
    for number in range(600):
        if number not in special:
            assert decide(program, number, audit=here.audit) == (allow if number in listed else refuse), number
    ask = lambda *a: decide(program, a[0], a[1:] or (0, 0), here.audit)  # noqa: E731
    assert ask(here.clone, 0x3D0F00) == allow
    assert ask(here.clone, signal.SIGCHLD) == refuse
    assert ask(here.clone3) == 0x00050000 | errno.ENOSYS
    for call in (here.kill, here.tgkill, here.tkill):
        assert [ask(call, pid) for pid in (42, 0, 1, 2**32 - 1)] == [allow, refuse, refuse, refuse]
    assert [ask(here.prlimit64, pid) for pid in (0, 1)] == [allow, refuse]
    assert [ask(here.fcntl, 5, c) for c in (1030, 8)] == [allow, refuse]
    assert [ask(here.ioctl, 5, c) for c in (0x5401, 0x5412)] == [allow, refuse]
    assert decide(program, 0, audit=0x40000003) == 0x80000000
    if name == "x86_64":
        assert ask(0x40000000 | here.read) == refuse
