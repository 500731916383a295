"""Honest programs pass, hostile ones do not, and neither leaves anything behind: in every way this machine has."""

import errno
import json
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from helpers import ROOT
from helpers import hostile as hostile

from train.log import UserError
from train.tasks.sandbox import Limits, Program, Sandbox, calls, seccomp
from train.tasks.sandbox.pool import LOCKS, open_doors

WALLS = ("bubblewrap", "namespaces", "landlock")
HONEST = {
    "nothing": "",
    "assertion": "def f(x):\n    return x + 1\nassert f(1) == 2",
    "main": "assert __name__ == '__main__'\nimport sys\nassert sys.modules['__main__'].__dict__ is globals()",
    "caught": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    pass",
    "caught exit": "import sys\ntry:\n    sys.exit(0)\nexcept SystemExit:\n    pass",
    "library": "import dataclasses, datetime, decimal, fractions, hashlib, heapq, itertools, json, random, statistics\n"
    "assert hashlib.md5(b'').hexdigest().startswith('d41d8') and random.Random(1).random() > 0",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\nassert A() == A(1)",
    "named tuple": "from collections import namedtuple\nassert namedtuple('A', 'x')(1).x == 1",
    "output": "print('x' * 1000)\nimport sys\nsys.stderr.write('y')",
    "no input": "try:\n    input()\nexcept EOFError:\n    pass\nelse:\n    raise AssertionError",
    "joined threads": "from concurrent.futures import ThreadPoolExecutor as T\n"
    "with T(4) as pool:\n    assert sum(pool.map(abs, range(9))) == 36",
    "recursion": "def f(n):\n    return n and 1 + f(n - 1)\nassert f(900) == 900",
    "own signal": "import signal\ngot = []\nsignal.signal(signal.SIGUSR1, lambda *a: got.append(1))\n"
    "signal.raise_signal(signal.SIGUSR1)\nassert got == [1]",
    "memory": "assert len(bytearray(100 << 20)) == 100 << 20",
    "names": "Ünïcode = 'ß'\nassert Ünïcode.upper() == 'SS'",
    "long": "x = 0\n" + "x += 1\n" * 50_000 + "assert x == 50_000",
    "nobody": "import os\nassert os.environ.get('HOME') == '/tmp' and 'PYTHONPATH' not in os.environ",
}
WITH_FILES = {
    "temporary file": "import tempfile\nwith tempfile.TemporaryDirectory() as d:\n    open(d + '/x', 'w').write('y')",
    "leaves a file": "open('/tmp/left', 'w').write('x')\nimport os\nos.makedirs('/tmp/a/b')",
    "finds none": "import os\nassert os.listdir('/tmp') == [] and os.getcwd() == '/tmp'",
}


def opened(way, workers=1, **arguments):
    """A sandbox of one kind, or a skipped test with the reason why this machine cannot have it."""
    try:
        return Sandbox(workers, using=way, **arguments)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=WALLS)
def box(request):
    with opened(request.param, workers=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def first():
    """What this machine takes by itself."""
    try:
        sandbox = Sandbox()
    except UserError as error:
        pytest.skip(str(error))
    with sandbox:
        yield sandbox


def processes(parent):
    """Every process below one."""
    found = [int(p) for t in pathlib.Path(f"/proc/{parent}/task").iterdir()
             for p in (t / "children").read_text().split()]  # fmt: skip
    return [parent, *(p for child in found for p in processes(child))]


def alive(pid):
    """Whether a process runs; one that waits for a container's process 1 to reap it does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def await_end(pids):
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [p for p in pids if alive(p)] == []


# --- what it is for ----------------------------------------------------------------------------------------


def test_honest_programs_pass(box):
    table = HONEST if box.way == "landlock" else HONEST | WITH_FILES
    verdicts = box.run([Program(name, source) for name, source in table.items()])
    assert [(v.id, v.reason) for v in verdicts if not v.passed] == []
    assert [v.id for v in verdicts] == list(table)


def test_hostile_programs_do_not_pass_and_leave_nothing_behind(box, first):
    """Among them stand honest programs, on the same workers, that must find everything as it was."""
    tree = [processes(w.process.pid) for w in box._workers]
    # the server ends endless programs in the same way whatever the walls are: once is enough
    table = {name: h for name, h in hostile.PROGRAMS.items() if not h.slow or box.way == first.way}
    clean = HONEST["assertion"] if box.way == "landlock" else WITH_FILES["finds none"]
    programs = []
    for name, h in table.items():
        names = ("f",) if h.tests else ()
        programs.append(Program(name, h.source, 0.3 if h.slow else 5.0, tests=h.tests, calls=names))
        programs += [Program("after " + name, clean)] * 2
    verdicts = box.run(programs)
    assert [v for v in verdicts if v.id in table and (v.passed or not re.search(table[v.id].reason, v.reason))] == []
    assert [v for v in verdicts if v.id not in table and (not v.passed or v.seconds > 2)] == []
    assert len(table) >= 40
    assert box.restarts == 0
    assert [processes(w.process.pid) for w in box._workers] == tree


def test_a_program_cannot_wait_for_the_next(box):
    """What one left running would be seen by the next: there is one process, one thread, no file of its own."""
    source = "import os, threading\nassert threading.active_count() == 1\nassert os.getppid() in (0, 1) or True"
    assert all(v.passed for v in box.run([Program("a", source)] * 4))


@pytest.mark.parametrize("way", ["bubblewrap", "namespaces"])
@pytest.mark.parametrize("locks", [(), ("landlock",), ("seccomp",)])
def test_walls_hold_without_the_locks_inside(way, locks):
    """A kernel without Landlock or seccomp still keeps programs from files and network, and the rest inside."""
    with opened(way, locks=(*locks, "position")) as sandbox:
        sources = {
            "files": "open('/etc/passwd').read()",
            "proc": "open('/proc/1/environ').read()",
            "write": "open('/x', 'w')",
            "network": "import socket\nsocket.create_connection(('203.0.113.1', 80), timeout=1)",
            "outside": "import os\nos.kill(int(2 ** 22 - 1), 0)",
            "leaves a process": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n"
            "raise ValueError",
        }
        verdicts = sandbox.run([Program(name, source, 5.0) for name, source in sources.items()])
        assert [v.id for v in verdicts if v.passed] == []
        assert all(v.passed for v in sandbox.run([Program(n, s) for n, s in {**HONEST, **WITH_FILES}.items()
                                                  if locks == ("seccomp",) or "thread" not in n]))  # fmt: skip
        (worker,) = sandbox._workers
        deadline = time.monotonic() + 5
        while len(processes(worker.process.pid)) > 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(processes(worker.process.pid)) <= 2


# --- tests in a process of their own -----------------------------------------------------------------------


def test_tests_apart_call_the_program(first):
    source = (
        "def add(a, b=1):\n    return a + b\ndef sort(x):\n    x.sort()\n"
        "def fail(x):\n    raise ValueError(f'no {x}')\ndef same(x):\n    return x\n"
    )
    tests = (
        "assert add(1) == 2 and add(1, b=5) == 6 and helper(1) == 2\n"
        "x = [3, 1, 2]\nassert sort(x) is None and x == [1, 2, 3]\n"
        "try:\n    fail(7)\nexcept ValueError as error:\n    assert str(error) == 'no 7'\n"
        "else:\n    raise AssertionError\n"
        "for v in (None, True, 2**70, -1, 1.5, float('inf'), 'ß', b'x', (1, (2,)), [], {1: {2}},"
        " frozenset((1,)), 1j):\n"
        "    assert same(v) == v and type(same(v)) is type(v), v\n"
    )
    program = Program("x", source, tests=tests, setup="def helper(x): return x + 1",
                      calls=("add", "sort", "fail", "same"))  # fmt: skip
    (verdict,) = first.run([program])
    assert verdict.passed, verdict
    (verdict,) = first.run([Program("y", source, tests="assert add(1) == 3", calls=("add",))])
    assert (verdict.passed, verdict.reason) == (False, "AssertionError")


def test_only_plain_values_are_passed():
    for value in (object(), len, calls.Gone("x"), (i for i in ())):
        with pytest.raises(TypeError, match="plain values only"):
            calls.encode(value)

    class Liar(list):
        def __eq__(self, other):
            return True

        __hash__ = None

    back = calls.decode(json.loads(json.dumps(calls.encode([Liar([1]), {"a": range(2)}]))))
    assert (type(back[0]), back) == (list, [[1], {"a": [0, 1]}])
    nan = calls.decode(calls.encode(float("nan")))
    assert nan != nan


def test_a_program_with_tests_needs_the_names_they_call():
    with pytest.raises(UserError, match="name the functions"):
        Program("x", "", tests="assert f()")
    with pytest.raises(UserError, match="timeout is 0"):
        Program("x", "", timeout=0)


# --- workers -----------------------------------------------------------------------------------------------


def test_a_broken_worker_is_replaced_and_only_its_program_fails(box):
    (victim, other), restarts = box._workers, box.restarts
    programs = [Program(str(i), "import time\ntime.sleep(.5)", 20.0) for i in range(6)]
    # the server: below bubblewrap and the namespaces' parent, else the worker's only process (its program below it)
    server = processes(victim.process.pid)[box.way != "landlock"]
    killer = threading.Timer(0.25, lambda: os.kill(server, signal.SIGKILL))
    killer.start()
    verdicts = box.run(programs)
    killer.join()
    failed = [v for v in verdicts if not v.passed]
    assert len(failed) == 1
    assert "the worker broke" in failed[0].reason
    assert [v.id for v in verdicts] == [p.id for p in programs]
    assert box.restarts == restarts + 1
    assert victim not in box._workers
    assert other in box._workers
    assert all(v.passed for v in box.run([Program("a", HONEST["assertion"])] * 4))


def test_a_silent_worker_is_replaced(first, monkeypatch):
    monkeypatch.setattr("train.tasks.sandbox.pool.GRACE", 0.2)
    for pid in processes(first._workers[0].process.pid):
        os.kill(pid, signal.SIGSTOP)
    (verdict,) = first.run([Program("a", "", 0.2)])
    assert (verdict.passed, verdict.reason) == (False, "the worker broke: it did not answer in time")
    assert first.run([Program("a", "")])[0].passed


def test_closing_ends_the_workers(first, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Sandbox(2, using=first.way) as sandbox:
        pids = [p for w in sandbox._workers for p in processes(w.process.pid)]
        assert list(tmp_path.iterdir()) == []  # nothing outside while it runs, so nothing stays if its owner is killed
    await_end(pids)
    with pytest.raises(UserError, match="closed"):
        sandbox.run([Program("a", "")])


def test_workers_end_with_their_owner(box):
    """Killed in the middle of a batch: the server ends its program in time, finds nobody, and ends."""
    program = (
        "import os, sys, threading\nfrom train.tasks.sandbox import Program, Sandbox\n"
        "box = Sandbox(using=sys.argv[1])\nprint(box._workers[0].process.pid, flush=True)\n"
        "box.run([Program('a', 'while True: pass', 0.8)])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, box.way], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pids = processes(int(owner.stdout.readline()))
        owner.kill()
    await_end(pids)


def test_limits_are_as_given(first):
    hungry = Program("a", "x = bytearray(200 << 20)")
    assert first.run([hungry])[0].passed
    with Sandbox(limits=Limits(memory_mb=128), using=first.way) as small:
        assert small.run([hungry])[0].reason == "MemoryError"


def test_batches_keep_their_order(box):
    assert box.run([]) == []
    for _ in range(3):
        programs = [Program(str(i), f"import time\ntime.sleep({(i % 3) / 100})\nassert {i} % 4") for i in range(12)]
        assert [(v.id, v.passed) for v in box.run(programs)] == [(str(i), i % 4 != 0) for i in range(12)]


# --- what is said of it ------------------------------------------------------------------------------------


def test_isolation_is_said_and_tried(box, first):
    assert open_doors(box.facts) == []
    assert "no files, network, processes, signals (tried)" in box.isolation
    assert box.way in box.isolation
    assert first.way == next(way for way in WALLS if not any(n.startswith(f"{way}:") for n in first.notes))


def test_without_walls_programs_are_refused_unless_told():
    with pytest.raises(UserError, match=r"untrusted ones are refused \(none: programs would reach files, .*--unsafe"):
        Sandbox(using="none")
    with Sandbox(using="none", allow_unsafe=True) as sandbox:
        assert sandbox.isolation.startswith("NO ISOLATION")
        assert "OPEN: files, network" in sandbox.isolation  # an ordinary user's limit of processes may still hold
        good, bad, left = sandbox.run(
            [Program("a", "x = 1"), Program("b", "assert 0"), Program("c", "import os\nos._exit(0)")]
        )
        assert (good.passed, bad.passed, left.passed) == (True, False, False)


def test_a_kernel_that_hides_the_stack_leaves_a_token(first):
    with Sandbox(using=first.way, locks=tuple(set(LOCKS) - {"position"})) as sandbox:
        assert "verdict by token" in sandbox.isolation
        forged = [Program(n, h.source, 0.5) for n, h in hostile.PROGRAMS.items() if n.startswith("says")]
        assert [v.id for v in sandbox.run(forged) if v.passed] == []
        assert sandbox.run([Program("a", HONEST["joined threads"])])[0].passed
        left = Program("b", hostile.PROGRAMS["leftover thread"].source)
        assert sandbox.run([left])[0].reason == "left threads running"


def test_unknown_ways_are_refused():
    with pytest.raises(UserError, match="choose one of bubblewrap"):
        Sandbox(using="docker")
    with pytest.raises(UserError, match="workers is 0"):
        Sandbox(0)


def command(*arguments, lines=()):
    return subprocess.run(
        [sys.executable, "-m", "train.tasks.sandbox", *arguments], input="".join(lines), cwd=ROOT,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_from_outside(first):
    rows = [
        {"id": "a", "program": "assert 1", "timeout": 5},
        {"id": 7, "program": "assert 0, 'why'"},
        {"id": "c", "program": "while True: pass", "timeout": 0.2},
        {"id": "d", "program": "def f(x): return x", "tests": "assert f(2) == 2", "calls": ["f"]},
    ]
    done = command("--workers", "2", "--using", first.way, lines=[json.dumps(row) + "\n" for row in rows])
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [list(a) for a in answers] == [["id", "passed", "reason", "seconds"]] * 4
    assert [(a["id"], a["passed"], a["reason"]) for a in answers] == [
        ("a", True, ""), (7, False, "AssertionError: why"), ("c", False, "timed out after 0.2 s"), ("d", True, ""),
    ]  # fmt: skip
    assert command("--check", "--using", first.way).stdout.splitlines()[0] == first.isolation


def test_from_outside_mistakes_are_said():
    refused = command("--using", "none", lines=['{"id": 1, "program": ""}\n'])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--unsafe" in refused.stderr
    unsafe = command("--using", "none", "--unsafe", lines=['{"id": 1, "program": ""}\n', '{"id": 2}\n'])
    assert "UNSAFE: NO ISOLATION" in unsafe.stderr
    assert "line 2 has ['id']; wanted id, program" in unsafe.stderr
    assert unsafe.returncode == 2


# --- the filter, interpreted here --------------------------------------------------------------------------


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
