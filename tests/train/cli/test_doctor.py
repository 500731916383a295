"""The doctor: nothing raises, what is missing is named with the command that gets it."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from jaxmerge import install
from train.cli import doctor as d


def test_runs_and_every_check_is_well_formed(tmp_path, capsys):
    checks = d.doctor(runs=tmp_path / "runs")
    assert {"python", "platform", "devices", "disk", "sandbox", "model SmolLM2"} <= {c.name for c in checks}
    assert all(c.status in (d.OK, d.MISSING, d.NOTE) and c.found for c in checks)
    assert not any("could not be examined" in c.found for c in checks)
    assert not (tmp_path / "runs").exists()
    code = d.print_checks(checks)
    assert code == int(any(c.status == d.MISSING for c in checks))
    assert "8 × cpu" in capsys.readouterr().out


def test_missing_package_is_named_with_its_range_and_command(monkeypatch, capsys):
    real = importlib.metadata.version

    def version(name):
        if name == "optax":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1.0" if name == "flax" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = {c.name: c for c in d.check_packages()}
    optax, flax = checks["extra train: optax"], checks["extra train: flax"]
    assert optax.status == d.MISSING
    assert "not installed, wanted" in optax.found
    assert ">=0.2.8" in optax.found  # metadata and pyproject.toml order the bounds differently
    assert "[train]'" in optax.remedy
    assert "found 0.1.0, wanted" in flax.found
    assert d.print_checks(list(checks.values())) == 1
    out = capsys.readouterr().out
    assert "extra train: optax" in out.split("cannot run")[1]


def test_an_extra_of_another_package_is_looked_into():
    """`jax[cuda13]` is not there because jax is."""
    assert ("jax-cuda13-plugin", "") in d.wanted_packages()["cuda"]
    assert ("libtpu", "") in d.wanted_packages()["tpu"]


def test_nothing_missing_is_exit_code_0(capsys):
    assert d.print_checks([d.Check("python", d.OK, "3.12"), d.Check("sandbox", d.NOTE, "none", "get it")]) == 0
    assert "get it" in capsys.readouterr().out


def test_an_old_python_is_told_what_works_there(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "version_info", (3, 10, 9))
    (check,) = d.check_python()
    assert (check.status, check.remedy) == (d.MISSING, "make setup PYTHON=python3.12")
    monkeypatch.setattr(install, "CHECKOUT", tmp_path)
    (check,) = d.check_python()
    assert check.remedy == "install jaxmerge into an environment of Python 3.12"


def test_a_fault_becomes_a_finding(monkeypatch):
    monkeypatch.setattr(d, "check_sandbox", lambda: 1 / 0)
    last = d.doctor()[-1]
    assert last.name == "sandbox"
    assert "ZeroDivisionError" in last.found


def test_model_package(monkeypatch, tmp_path):
    monkeypatch.setattr(d, "SMOLLM2", ("no_such_model_package", "no-such==1"))
    (check,) = d.check_model()
    assert check.status == d.MISSING
    assert check.remedy == install.pip("--no-deps no-such==1")
    (tmp_path / "made_up_model").mkdir()
    (tmp_path / "made_up_model" / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(d, "SMOLLM2", ("made_up_model", "made-up==1"))
    assert d.check_model()[0].status == d.OK


def test_disk_names_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(d, "LEAST_DISK_GB", 0.0)  # this machine's disk may be nearly full
    assert d.check_disk(tmp_path / "a" / "b")[0].status == d.OK
    monkeypatch.setattr(d, "LEAST_DISK_GB", 1e9)
    assert d.check_disk(tmp_path)[0].status == d.MISSING
    (tmp_path / "file").write_text("")
    (check,) = d.check_disk(tmp_path / "file")
    assert check.status == d.MISSING
    assert "out=DIR" in check.remedy


@pytest.mark.parametrize(
    ("version", "versions", "wanted"),
    [
        ("0.12.3", ">=0.10.2,<0.13", True), ("0.13.0", ">=0.10.2,<0.13", False), ("5.0.0rc1", ">=5,<6", True),
        ("0.1.25", "==0.1.25", True), ("0.1.26", "==0.1.25", False), ("2.13.0+cpu", "==2.13.0", True),
        ("9", ">=8", True), ("10.0", ">=9.9", True), ("1.0", "", True),
        ("2.1.post1", ">=2.1", True), ("1!1.0", "<2", False), ("1.4.2", "~=1.4", True), ("2.0", "~=1.4", False),
        ("1.10", "==1.*", True), ("0.13rc1", "<0.13", False),
    ],
)  # fmt: skip
def test_fits(version, versions, wanted):
    assert d.fits(version, versions) is wanted


def test_works_with_jax_alone():
    """Only the standard library and jax may be imported: run it where nothing else can be found."""
    code = (
        "import sys\n"
        "class Only:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in 'rich flax optax yaml packaging safetensors transformers orbax'.split():\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Only())\n"
        "from train.cli.doctor import doctor, print_checks\n"
        "print_checks(doctor())\n"
    )
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={**os.environ}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "devices" in done.stdout
    assert "packages: packaging is not installed, so no version can be compared" in done.stdout
    assert "could not be examined" not in done.stdout
