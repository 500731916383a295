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

LONGEST = [f"test_{name}.py" for name in ("processes", "improve", "search_run", "jaxmerge_contract", "learn_sft")]
"""Files of minutes: begun first (`make test`), so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
