"""Every test runs offline on eight virtual CPU devices, with strict dtype promotion and warnings as errors."""

import os
import pathlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation: test_learn_stay, test_probes and test_jaxmerge_formulas took 137 s of
# processor time without optimisation and 193 s with. Optimised code is what .ci/run oracle tests, on Python 3.11.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compiled once per checkout: a second `make test` skips most of the XLA time.
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

LONGEST = (
    "runtime/test_processes.py", "improve/test_run.py", "search/test_run.py", "jaxmerge/test_contract.py",
    "learn/test_sft.py",
)  # fmt: skip
"""Files of minutes: begun first (`make test`), so that no worker is left alone with one at the end."""


def place(item) -> int:
    """Where a test's file stands among the longest; all others come after them."""
    return next((i for i, name in enumerate(LONGEST) if item.path.as_posix().endswith(name)), len(LONGEST))


def pytest_collection_modifyitems(items):
    items.sort(key=place)
