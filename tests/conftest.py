"""Every test runs offline on eight virtual CPU devices, with strict dtype promotion and warnings as errors."""

import gc
import os
import pathlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation: test_learn_stay, test_probes and test_jaxmerge_formulas took 137 s of
# processor time without optimisation and 193 s with. Optimised code is what .ci/run oracle tests, on Python 3.11.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Compiled once per checkout: a second `make test` skips most of the XLA time. In the environment, so that the processes
# which tests start have it too, and no command run in process turns to the user's own.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax-tests"))
# All of them, however small: one takes 35 ms to compile and 2 ms to read, and NumPy-like calls make thousands.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest
from helpers import tiers

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

ROOT = pathlib.Path(__file__).parent.parent
LONGEST = (
    "runtime/test_processes.py", "improve/test_run.py", "studies/test_analyse.py", "search/test_run.py",
    "jaxmerge/test_contract.py", "learn/test_optim.py", "studies/test_sweep.py", "learn/test_sft.py",
    "learn/test_stay.py", "models/test_stacked.py", "models/test_loss.py", "learn/test_run.py",
    "learn/test_sft_settings.py", "runtime/test_mesh.py", "models/test_families.py", "learn/test_lora.py",
    "models/test_lora.py", "improve/test_probes.py", "improve/test_data_methods.py", "models/test_smollm2.py",
)  # fmt: skip
"""Files of minutes: begun first (`make test`), so that no worker is left alone with one at the end."""


def place(item) -> int:
    """Where a test's file stands among the longest; all others come after them."""
    return next((i for i, name in enumerate(LONGEST) if item.path.as_posix().endswith(name)), len(LONGEST))


MAPPED = 20_000
"""Pieces of memory that a process may have mapped, before a file of tests begins. Each compiled program takes three or
four, a worker compiles thousands of programs, and Linux gives a process 65,530: past that XLA ends it by a segmentation
fault in some later test (seen after 2,100 tests in one worker)."""


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Let go of the compiled programs of earlier files once there are many; they are read from disk if wanted again."""
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPED:
        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(config, items):
    """Leave out what takes long, or what does not, as LONG says, and put the longest files first."""
    left = [item for item in items if not tiers.is_wanted(takes_long(item))]
    config.hook.pytest_deselected(items=left)
    apart = set(left)
    items[:] = [item for item in items if item not in apart]
    items.sort(key=place)


def takes_long(item) -> bool:
    callspec = getattr(item, "callspec", None)
    path = item.path.relative_to(ROOT).as_posix() if item.path.is_relative_to(ROOT) else ""
    return tiers.is_long(path, getattr(item, "originalname", item.name), callspec.params if callspec else {})
