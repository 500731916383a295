"""Hints work where they are printed: in this environment, from any folder, installed or not."""

import importlib.metadata
import pathlib
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

from jaxmerge import install


@pytest.fixture
def pip_is(monkeypatch):
    def go(place, here=True):
        monkeypatch.setattr(shutil, "which", lambda name: place)
        monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: object() if here else None)

    return go


def test_pip_is_that_of_this_python(pip_is, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/a b/bin/python")
    pip_is("/a b/bin/pip")
    assert install.pip("cmaes") == "pip install cmaes"
    pip_is("/usr/bin/pip")
    assert install.pip("cmaes") == "'/a b/bin/python' -m pip install cmaes"
    pip_is(None, here=False)
    assert install.pip("cmaes") == "uv pip install --python '/a b/bin/python' cmaes"


def test_an_extra_is_named_by_what_is_installed(pip_is, monkeypatch, tmp_path):
    pip_is(str(pathlib.Path(sys.executable).with_name("pip")))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
    assert (install.extra("train"), install.extra()) == ("pip install 'jaxmerge[train]'", "pip install jaxmerge")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert install.extra("train") == f"pip install -e '{ROOT}[train]'"
    assert install.extra() == f"pip install -e {ROOT}"
    monkeypatch.setattr(install, "CHECKOUT", tmp_path)
    assert install.extra("train") == "pip install 'jaxmerge[train]'"


def test_it_needs_no_package():
    code = "import sys; from jaxmerge import install; print(install.pip('x')); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_no_hint_goes_round_it():
    """A message that names pip itself would be right in one environment alone."""
    found = []
    for top in ("jaxmerge", "train", "tpu"):
        for path in (ROOT / top).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                if "pip install" in line and path.name != "install.py":
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert [line for line in found if not line.startswith("tpu/aot.py:6:")] == []  # a docstring
