"""The newcomer's hour runs whole (hour.py says what it does); `FULL=1` or `-m slow`, and a package index."""

import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.slow
def test_the_hour_works_from_the_wheel_alone(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "newcomer" / "hour.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith("the hour is over: all of it worked\n")
