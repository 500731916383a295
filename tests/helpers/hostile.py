"""Programs that try to get out of the sandbox, to break it, or to pass without having run to their end.

Each ends in an assertion that is false, or asks for something that must be refused: none of them may pass.
"""

import dataclasses

# Descriptors a program finds open: everything it could write a verdict to.
EVERY = """
import os
def everywhere(data):
    for d in range(0, 64):
        try: os.write(d, data)
        except OSError: pass
"""
STAND = """
def stand():
    for d in range(3, 64):
        try: os.read(d, 1)
        except OSError: pass
"""


@dataclasses.dataclass(frozen=True)
class Hostile:
    """One program, with tests of its own process where it attacks those; `slow` ones run into their time limit."""

    source: str
    tests: str | None = None
    slow: bool = False
    reason: str = ""  # a regular expression, where the reason is part of what is promised


PROGRAMS: dict[str, Hostile] = {
    # --- exhausting --------------------------------------------------------------------------------------
    "fork bomb": Hostile("import os\nwhile True:\n    os.fork()"),
    "fork bomb that insists": Hostile(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", slow=True, reason="timed out"
    ),
    "thread bomb": Hostile(
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,)).start()"
    ),
    "memory bomb": Hostile("x = []\nwhile True:\n    x.append(bytearray(1 << 24))", reason="MemoryError|killed"),
    "memory at once": Hostile("x = b'x' * (1 << 36)", reason="MemoryError"),
    "memory that is caught": Hostile(
        "x = []\nwhile True:\n    try: x.append(bytearray(1 << 22))\n    except MemoryError: pass", slow=True
    ),
    "number bomb": Hostile("x = 9 ** 9 ** 9 ** 9", slow=True),
    "disk fill": Hostile(
        "for i in range(1 << 20):\n    with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(1 << 20))", reason="Error"
    ),
    "one large file": Hostile(
        "with open('/tmp/x', 'wb') as f:\n    while True: f.write(bytes(1 << 20))\n", reason="Error|killed"
    ),
    "a file for every name": Hostile("for i in range(1 << 24):\n    open(f'/tmp/{i}', 'w').close()", reason="Error"),
    "deep folders": Hostile("import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')", reason="Error"),
    "folders nobody may enter": Hostile(
        "import os\nos.mkdir('/tmp/a'); os.mkdir('/tmp/a/b'); os.chmod('/tmp/a/b', 0); os.chmod('/tmp/a', 0)\nassert 0"
    ),
    "endless output": Hostile("while True:\n    print('x' * 10000)", slow=True),
    "endless loop": Hostile("while True: pass", slow=True, reason="timed out"),
    "endless sleep": Hostile("import time\ntime.sleep(1e6)", slow=True, reason="timed out"),
    "loop in C": Hostile("sum(range(1 << 60))", slow=True),
    "deaf to signals": Hostile(
        "import signal\nfor s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        slow=True,
    ),
    "stops itself": Hostile("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", slow=True),
    "all descriptors": Hostile("import os\nwhile True: os.dup(1)", reason="OSError"),
    "endless regular expression": Hostile("import re\nre.match('(a+)+$', 'a' * 64 + 'b')", slow=True),
    # --- deep --------------------------------------------------------------------------------------------
    "deep recursion": Hostile("def f(): return f()\nf()", reason="RecursionError"),
    "bottomless recursion": Hostile(
        "import sys\nsys.setrecursionlimit(1 << 30)\nclass A:\n    def __getattr__(self, n): return getattr(self, n)\n"
        "A().x"
    ),
    "deep brackets": Hostile("x = " + "(" * 5000 + ")" * 5000),
    "deep literal": Hostile("eval('[' * 100000)"),
    "crash": Hostile("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", reason="killed by SIGSEGV"),
    # --- network, files, processes -----------------------------------------------------------------------
    "socket": Hostile("import socket\nsocket.socket()", reason="PermissionError"),
    "socket pair": Hostile("import socket\nsocket.socketpair()", reason="PermissionError"),
    "unix socket": Hostile("import socket\nsocket.socket(socket.AF_UNIX)", reason="PermissionError"),
    "download": Hostile("import urllib.request\nurllib.request.urlopen('http://203.0.113.1/', timeout=1)"),
    "shell": Hostile("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)"),
    "system": Hostile("import os\nassert os.system('true') == 0"),
    "exec": Hostile("import os, sys\nos.execv('/proc/self/exe', ['python', '-c', ''])"),
    "another Python": Hostile("import multiprocessing as m\np = m.get_context('fork').Process()\np.start()\np.join()"),
    "read /etc/passwd": Hostile("open('/etc/passwd').read()", reason="Error"),
    "read /proc/self": Hostile("open('/proc/self/environ').read()", reason="Error"),
    "read memory of the parent": Hostile("import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)", reason="Error"),
    "list the root": Hostile("import os\nassert {'etc', 'home', 'var'} & set(os.listdir('/'))"),
    "read the sandbox": Hostile("import os\nassert os.listdir('/sandbox')", reason="Error"),
    "write to the library": Hostile("import os\nopen(os.__file__, 'a')", reason="Error"),
    "write to the root": Hostile("open('/x', 'w')", reason="Error"),
    "symlink out": Hostile("import os\nos.symlink('/etc/passwd', '/tmp/x')\nopen('/tmp/x').read()", reason="Error"),
    "climb out": Hostile("open('../../../../../../etc/hostname').read()", reason="Error"),
    "climb by descriptor": Hostile(
        EVERY + "for d in range(64):\n    try: os.open('etc/passwd', 0, dir_fd=d)\n    except OSError: continue\n"
        "    break\nelse: raise OSError('none')"
    ),
    "change the root": Hostile("import os\nos.mkdir('/tmp/r')\nos.chroot('/tmp/r')", reason="PermissionError"),
    "become root": Hostile("import os\nos.setuid(0)", reason="PermissionError"),
    "new namespaces": Hostile("import os\ngetattr(os, 'unshare', os.setuid)(0x10000000)", reason="PermissionError"),
    "device": Hostile("import os, stat\nos.mknod('/tmp/d', 0o600 | stat.S_IFCHR, os.makedev(1, 3))", reason="Error"),
    "raise the limits": Hostile(
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", reason="Error"
    ),
    "limits of the parent": Hostile(
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))", reason="PermissionError"
    ),
    "move itself": Hostile("import os\nos.sched_setaffinity(os.getppid(), {0})", reason="PermissionError"),
    # --- signals -----------------------------------------------------------------------------------------
    "kill the parent": Hostile("import os\nos.kill(os.getppid(), 9)", reason="PermissionError"),
    "kill everyone": Hostile("import os\nos.kill(-1, 9)", reason="PermissionError"),
    "kill the group": Hostile("import os\nos.killpg(0, 9)", reason="PermissionError"),
    "kill by descriptor": Hostile(
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)", reason="PermissionError"
    ),
    "signals by input": Hostile(
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())", reason="PermissionError"
    ),
    "kill itself": Hostile("import os\nos.kill(os.getpid(), 9)", reason="killed by SIGKILL"),
    "alarm": Hostile(
        "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, .05)\ntime.sleep(60)", reason="killed by SIGALRM"
    ),
    # --- leaving early -----------------------------------------------------------------------------------
    "os._exit(0)": Hostile("import os\nos._exit(0)", reason="left by itself with status 0"),
    "sys.exit()": Hostile("import sys\nsys.exit()", reason="SystemExit"),
    "raise SystemExit(0)": Hostile("raise SystemExit(0)", reason="SystemExit"),
    "quit": Hostile("import builtins\ngetattr(builtins, 'quit', exit)() if 0 else exec('raise SystemExit')"),
    "leave in a thread": Hostile("import os, threading, time\nthreading.Thread(target=os._exit, args=(0,)).start()\n"
                                 "time.sleep(5)", reason="left by itself"),
    "leave at exit": Hostile("import atexit, os\natexit.register(os._exit, 0)\nassert 0", reason="AssertionError"),
    "leave when collected": Hostile(
        "import os\nclass A:\n    def __del__(self): os._exit(0)\na = A()\nassert 0", reason="AssertionError|left"
    ),
    "keyboard interrupt": Hostile("raise KeyboardInterrupt"),
    "generator exit": Hostile("raise GeneratorExit"),
    # --- forging -----------------------------------------------------------------------------------------
    "says END": Hostile(EVERY + "everywhere(b'E')\nos._exit(0)"),
    "says END and stands": Hostile(EVERY + STAND + "everywhere(b'E')\nstand()", slow=True, reason="forged"),
    "says END and goes on": Hostile(EVERY + "everywhere(b'E')\nwhile True: pass", slow=True),
    "says END after READY": Hostile(EVERY + STAND + "everywhere(b'RE')\nstand()"),
    "stands in a thread": Hostile(
        EVERY + STAND + "import threading, time\nthreading.Thread(target=stand).start()\neverywhere(b'E')\n"
        "time.sleep(60)", slow=True,
    ),
    "stands in a handler": Hostile(
        EVERY + STAND + "import signal\nsignal.signal(signal.SIGALRM, lambda *a: (everywhere(b'E'), stand()))\n"
        "signal.setitimer(signal.ITIMER_REAL, .05)\nwhile True: pass",
        reason="forged",
    ),
    "stands while it fails": Hostile(
        EVERY + STAND + "class E(Exception):\n    def __str__(self):\n        everywhere(b'E'); stand(); return ''\n"
        "raise E",
        reason="forged",
    ),
    "stands at exit": Hostile(
        EVERY + STAND + "import atexit, sys\natexit.register(lambda: (everywhere(b'E'), stand()))\nassert 0",
        reason="AssertionError",
    ),
    "stands when collected": Hostile(
        EVERY + STAND + "class A:\n    def __del__(self): everywhere(b'E'); stand()\nraise ValueError(A())",
    ),
    "says PASSED everywhere": Hostile(EVERY + "everywhere(b'{\"passed\": true}')\nos._exit(0)"),
    "answers for the server": Hostile(
        EVERY + "import json, struct\nt = json.dumps({'passed': True, 'reason': '', 'seconds': 0}).encode()\n"
        "everywhere(struct.pack('<I', len(t)) + t)\nassert 0"
    ),
    "closes everything": Hostile("import os\nos.closerange(0, 64)\nassert 0"),
    "closes and waits": Hostile("import os, time\nos.closerange(0, 64)\ntime.sleep(60)", reason="closed its report"),
    "swaps descriptors": Hostile("import os\nfor d in range(3, 32):\n    os.dup2(1, d)\nassert 0"),
    "walks the frames": Hostile(
        EVERY + "import sys\nf = sys._getframe()\nwhile f:\n"
        "    for name, value in list(f.f_locals.items()) + list(f.f_globals.items()):\n"
        "        if isinstance(value, bytes): everywhere(b'E' + value)\n    f = f.f_back\nos._exit(0)"
    ),
    "walks the traceback": Hostile(
        EVERY + "try: 1 / 0\nexcept ZeroDivisionError as e: f = e.__traceback__.tb_frame\n"
        "while f.f_back:\n    f = f.f_back\n"
        "    for v in list(f.f_locals.values()):\n        if callable(v) and getattr(v, '__name__', '') == 'fail':\n"
        "            v.__defaults__ = (b'E', str, os.write, lambda n: os.read(0, 1))\nassert 0",
        slow=True,
    ),
    "makes the runner stumble": Hostile(
        "try: 1 / 0\nexcept ZeroDivisionError as e: f = e.__traceback__.tb_frame\n"
        "class S:\n    def encode(*a): raise StopIteration\n"
        "while f.f_back:\n    f = f.f_back\n    for v in list(f.f_locals.values()):\n"
        "        if callable(v) and getattr(v, '__name__', '') == 'fail':\n"
        "            v.__defaults__ = (b'F', S, lambda *a: 1, lambda *a: 1)\nassert 0",
        slow=True,
    ),
    "changes the cells": Hostile(
        "try: 1 / 0\nexcept ZeroDivisionError as e: f = e.__traceback__.tb_frame\n"
        "while f.f_back:\n    f = f.f_back\n    for v in list(f.f_locals.values()):\n"
        "        for c in getattr(v, '__closure__', None) or ():\n"
        "            try: c.cell_contents = lambda *a: None\n            except ValueError: pass\nassert 0",
        slow=True,
    ),
    "writes to the runner's variables": Hostile(
        "try: 1 / 0\nexcept ZeroDivisionError as e: f = e.__traceback__.tb_frame\n"
        "def quiet(*a): raise StopIteration\n"
        "while f.f_back:\n    f = f.f_back\n    for k, v in list(f.f_locals.items()):\n"
        "        if callable(v): f.f_locals[k] = quiet\nraise StopIteration",
        slow=True,
    ),
    "changes the runner": Hostile(
        "import sys\nfor name, m in list(sys.modules.items()):\n    if 'sandbox' in name or name.endswith('child'):\n"
        "        for k in list(vars(m)):\n"
        "            if callable(vars(m)[k]): vars(m)[k] = lambda *a, **k: None\nassert 0"
    ),
    "gc.get_objects": Hostile("import gc\ngc.get_objects()", reason="refused: gc.get_objects"),
    "gc.get_referrers": Hostile("import gc\ngc.get_referrers(gc)", reason="refused: gc.get_referrers"),
    "tracing": Hostile(
        "import sys\ndef t(f, e, a):\n    f.f_lineno = 7\n    return t\nsys._getframe().f_trace = t\nsys.settrace(t)\n"
        "assert 0\nx = 1",
        reason="refused: sys.settrace",
    ),
    "profiling": Hostile("import sys\nsys.setprofile(lambda *a: None)\nassert 0", reason="refused: sys.setprofile"),
    "audit hook": Hostile("import sys\ndef h(e, a): raise RuntimeError\nsys.addaudithook(h)\nassert 0"),
    "ctypes": Hostile("import ctypes\nctypes.string_at(0)", reason="refused"),
    "ctypes in a process apart": Hostile(
        "import ctypes\ndef f(x): ctypes.memmove(id(2), id(3), 32); return 2", tests="assert f(1) == 2"
    ),
    "ctypes by a loader": Hostile(
        "import importlib\nc = importlib.import_module('ctypes')\nc.CDLL(None).ptrace(0, 0, 0, 0)", reason="refused"
    ),
    "ctypes by its classes": Hostile(
        "import sys\nfor c in object.__subclasses__():\n    if c.__name__ == 'CDLL': c(None)._exit(0)\nassert 0"
    ),
    "ctypes by its globals": Hostile(
        "import os\nfor c in object.__subclasses__():\n    if c.__name__ == 'CDLL':\n"
        "        c.__init__.__globals__['memmove'](id(os), id(c), 8)\nassert 0",
        reason="KeyError|AssertionError",
    ),
    "made-up bytecode": Hostile(
        "def f(): pass\nf.__code__ = f.__code__.replace(co_code=bytes(64))\nf()\nassert 0",
    ),
    "an interpreter inside": Hostile(
        "try: import _xxsubinterpreters as i\nexcept ImportError: import _interpreters as i\ni.create()\nassert 0",
        reason="refused|Error",
    ),
    # --- patching ----------------------------------------------------------------------------------------
    "patched AssertionError": Hostile(
        "import builtins\nclass A(BaseException):\n    pass\nbuiltins.AssertionError = A\nbuiltins.BaseException = A\n"
        "builtins.Exception = A\nassert 0"
    ),
    "patched exec": Hostile("import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\nassert 0"),
    "patched sys.exit": Hostile("import sys, os\nsys.exit = os._exit = os.write = lambda *a: None\nassert 0"),
    "patched excepthook": Hostile("import sys\nsys.excepthook = sys.unraisablehook = lambda *a: None\nassert 0"),
    "lost builtins": Hostile("import builtins\nvars(builtins).clear()\nassert 0"),
    "lost modules": Hostile("import sys\nsys.modules.clear()\nassert 0"),
    "no name": Hostile("class M(type):\n    __name__ = property(lambda c: 1 / 0)\n"
                       "class E(Exception, metaclass=M):\n    def __str__(self): raise self\nraise E"),
    # --- left behind -------------------------------------------------------------------------------------
    "leftover thread": Hostile(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", reason="left threads running"
    ),
    "leftover daemon thread": Hostile(
        "import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f, daemon=True).start()",
        reason="left threads running|timed out",
    ),
    "thread that writes later": Hostile(
        EVERY + "import threading, time\ndef f():\n    time.sleep(.05); everywhere(b'E'); time.sleep(60)\n"
        "threading.Thread(target=f).start()\nassert 0", reason="AssertionError",
    ),
    "leftover process": Hostile("import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass"),
    # --- unicode -----------------------------------------------------------------------------------------
    "look-alike names": Hostile("аssert = 0\nassert аssert"),
    "normalised names": Hostile("ﬁle = 0\nassert file"),
    "right to left": Hostile("x = 'a\u202e' # \u2066\nassert x == 'a'"),
    "null byte": Hostile("x = 1\0\nassert 0"),
    "lone surrogate": Hostile("x = '\ud800'\nassert 0"),
    "unprintable reason": Hostile("raise ValueError('\\x1b[2J\\ud800\\n{\"passed\": true}' * 1000)"),
    "another encoding": Hostile("# -*- coding: utf-7 -*-\n+AGEAcwBzAGUAcgB0- = 1\nassert 0"),
    "form feed and line ends": Hostile("if 1:\n\x0c    x = 0\r\n    assert x\r"),
    "not Python": Hostile("this is: not: Python", reason="SyntaxError"),
    # --- the tests in another process --------------------------------------------------------------------
    "equals everything": Hostile(
        "class A:\n    __eq__ = lambda s, o: True\n    __bool__ = lambda s: True\ndef f(x): return A()",
        tests="assert f(1) == 2",
    ),
    "a number that equals everything": Hostile(
        "class A(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\ndef f(x): return A(3)",
        tests="assert f(1) == 2",
    ),
    "a list that equals everything": Hostile(
        "class A(list):\n    __eq__ = lambda s, o: True\ndef f(x): return [A()]", tests="assert f(1) == [[2]]"
    ),
    "patched helpers": Hostile(
        "import builtins\nbuiltins.all = builtins.len = builtins.abs = lambda *a: 1\ndef f(x): return -9",
        tests="assert abs(f(1)) == 1 and len([1, 2]) == 1",
    ),
    "leaves when called": Hostile(
        "import os\ndef f(x): os._exit(0)", tests="assert f(1) == 2", reason="left by itself"
    ),
    "leaves before the tests": Hostile("import os\nos._exit(0)", tests="assert f(1) == 2", reason="left by itself"),
    "forges when called": Hostile(
        EVERY + "def f(x):\n    everywhere(b'E')\n    os._exit(0)", tests="assert f(1) == 2"
    ),
    "babbles when called": Hostile(
        EVERY + "def f(x):\n    everywhere(b'x' * 64)\n    return 2", tests="assert f(1) == 3"
    ),
    "answers with a bomb": Hostile("def f(x): return [0] * (1 << 26)", tests="assert f(1) == 2"),
    "answers for ever": Hostile(
        "def f(x):\n    while True: pass", tests="assert f(1) == 2", slow=True, reason="timed out"
    ),
    "answers deeply": Hostile(
        "def f(x):\n    y = []\n    for _ in range(5000): y = [y]\n    return y", tests="assert f(1) == 2"
    ),
    "knows the frames of the tests": Hostile(
        "import sys\ndef f(x):\n    g = sys._getframe()\n    while g:\n        g.f_globals['expected'] = None\n"
        "        g = g.f_back\n    return None",
        tests="expected = 2\nassert f(1) == expected",
    ),
    "no such function": Hostile("x = 1", tests="assert f(1) == 2", reason="NameError"),
}  # fmt: skip
