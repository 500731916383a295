"""Small programs the server runs of itself: to learn where an end stands, and to try the doors."""

HONEST = (
    "pass",
    "def f(n):\n    return n and f(n - 1)\nf(50)\nx = sorted([3, 1, 2], key=lambda v: -v)",
    # once a thread has lived, glibc enters system calls by a longer way
    "import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()",
)

# What forgers would do: say END and stand in `read`, from as high on the stack as a program can be.
_SEARCH = """
import os
for d in range(3, 32):
    try:
        os.write(d, b"E")
    except OSError:
        pass
"""
WITHIN = (
    _SEARCH + "for d in range(3, 32):\n    try:\n        os.read(d, 1)\n    except OSError:\n        pass",
    "import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()\n"
    + _SEARCH
    + "for d in range(3, 32):\n    try:\n        os.read(d, 1)\n    except OSError:\n        pass",
)

DOORS = """
import json, os, socket, struct
found = {{}}

def door(name, attempt):
    try:
        attempt()
    except OSError as error:
        found[name] = type(error).__name__
    else:
        found[name] = ""

def files():
    seen = []
    for path in ("/etc/passwd", "/proc/self/status", "/bin/sh", "/usr/bin/env", "/sys/kernel", "/root", "/home"):
        if os.__file__.startswith(path + "/"):
            continue  # Python itself lies below
        try:
            os.close(os.open(path, os.O_RDONLY))
            seen.append(path)
        except OSError:
            pass
    if not seen:
        raise PermissionError

def network():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("203.0.113.1", 9))  # of the addresses for documentation; connecting sends nothing

def processes():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)

def signals():
    os.kill(os.getppid(), 0)

for attempt in (files, network, processes, signals):
    door(attempt.__name__, attempt)
text = json.dumps(found).encode()
os.write({descriptor}, struct.pack("<I", len(text)) + text)
"""
