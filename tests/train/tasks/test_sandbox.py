"""Honest programs pass, hostile ones do not, and neither leaves anything behind: in every way this machine has."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from helpers import ROOT
from helpers import hostile as hostile

from train.log import UserError
from train.tasks.sandbox import Limits, Program, Sandbox, confine
from train.tasks.sandbox.pool import LOCKS, open_doors

WALLS = ("bubblewrap", "namespaces")
# Started as root, every program becomes nobody, who must be able to read Python's library.
ROOTS_PYTHON = os.getuid() == 0 and not all(map(confine.open_to_nobody, confine.standard_library()))
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
    "asyncio": "import asyncio, subprocess, multiprocessing, concurrent.futures\nassert subprocess.PIPE == -1",
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
    table = HONEST | WITH_FILES
    verdicts = box.run([Program(name, source) for name, source in table.items()])
    assert [(v.id, v.reason) for v in verdicts if not v.passed] == []
    assert [v.id for v in verdicts] == list(table)


def test_hostile_programs_do_not_pass_and_leave_nothing_behind(box, first):
    """Among them stand honest programs, on the same workers, that must find everything as it was."""
    tree = [processes(w.process.pid) for w in box._workers]
    # the server ends endless programs in the same way whatever the walls are: once is enough
    table = {name: h for name, h in hostile.PROGRAMS.items() if not h.slow or box.way == first.way}
    clean = WITH_FILES["finds none"]
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
@pytest.mark.parametrize("locks", [(), ("seccomp",)])
def test_walls_hold_without_the_locks_inside(way, locks):
    """Without seccomp the walls still keep programs from files and network, and the rest inside."""
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


# --- workers -----------------------------------------------------------------------------------------------


def test_a_broken_worker_is_replaced_and_only_its_program_fails(box):
    (victim, other), restarts = box._workers, box.restarts
    programs = [Program(str(i), "import time\ntime.sleep(.5)", 20.0) for i in range(6)]
    server = processes(victim.process.pid)[1]  # below bubblewrap, or below the parent of the namespaces
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
    with pytest.raises(UserError, match=r"untrusted ones are refused \(none: .*--unsafe"):
        Sandbox(using="none")
    if ROOTS_PYTHON:
        pytest.skip("root's programs become nobody's, who cannot read this Python")
    with Sandbox(using="none", allow_unsafe=True) as sandbox:
        assert sandbox.isolation.startswith("NO ISOLATION")
        assert "OPEN: files, network" in sandbox.isolation  # an ordinary user's limit of processes may still hold
        good, bad, left = sandbox.run(
            [Program("a", "x = 1"), Program("b", "assert 0"), Program("c", "import os\nos._exit(0)")]
        )
        assert (good.passed, bad.passed, left.passed) == (True, False, False)


@pytest.mark.skipif(not ROOTS_PYTHON, reason="not started as root, or with a Python that everybody can read")
def test_no_program_is_roots_even_where_walls_are_not_asked_for():
    with pytest.raises(UserError, match="programs may not be root's, and only root can read Python in /"):
        Sandbox(using="none", allow_unsafe=True)


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_root_without_the_right_to_mount_runs_no_program_as_root():
    """A container's root maps its own uid into a user namespace, where 65534 is but another name of root."""
    done = subprocess.run(
        ["setpriv", "--bounding-set", "-sys_admin", sys.executable, "-m", "train.tasks.sandbox", "--check"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        assert "; uid 65534; " in done.stdout
    else:
        assert "only root can read Python in /" in done.stderr or "unshare with a user namespace" in done.stderr


def test_a_worker_whose_programs_would_be_roots_is_refused(first, monkeypatch):
    """Whatever made it so, and however shut the doors are."""
    monkeypatch.setattr("train.tasks.sandbox.pool.uid_of", lambda pid: 0)
    for unsafe in (False, True):
        with pytest.raises(UserError, match=f"{first.way}: programs would be root's"):
            Sandbox(using=first.way, allow_unsafe=unsafe)


def test_the_uid_is_the_one_seen_from_outside(box):
    """In a user namespace a program's uid is 65534 whoever it is: what counts is whose files it could touch."""
    (worker, _) = box._workers
    status = pathlib.Path(f"/proc/{processes(worker.process.pid)[-1]}/status").read_text()
    uids = re.findall(r"^Uid:(.*)$", status, re.MULTILINE)[0].split()
    assert set(uids) == {str(box.facts["uid"])} != {"0"}
    assert f"uid {uids[0]};" in box.isolation


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
    if ROOTS_PYTHON:
        pytest.skip("root's programs become nobody's, who cannot read this Python")
    unsafe = command("--using", "none", "--unsafe", lines=['{"id": 1, "program": ""}\n', '{"id": 2}\n'])
    assert "UNSAFE: NO ISOLATION" in unsafe.stderr
    assert "line 2 has ['id']; wanted id, program" in unsafe.stderr
    assert unsafe.returncode == 2
