"""What is installed: the wheel holds the packages whole, needs jax alone, and names the extra that is missing."""

import configparser
import email
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest
from helpers import ROOT

# As after a plain `pip install jaxmerge`: only the standard library, pip, jax and what jax needs are found.
JAX_ALONE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
KNOWN = {*sys.stdlib_module_names, "jaxmerge", "jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "pip"}
class Finder:
    find_distributions = PathFinder.find_distributions
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        return PathFinder.find_spec(name, path, target) if top in KNOWN or top.startswith("_sysconfig") else None
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Finder]
"""


PACKAGES = {"jaxmerge": "jaxmerge", "train": "jaxmerge/train", "tpu": "jaxmerge/tpu", "configs": "jaxmerge/configs"}
"""Folder of the checkout → its place in the wheel."""
UNPACKED = {ROOT / "configs" / name for name in ("miniature-b", "miniature-judge")}
"""Models of experiments, 3 MB each: a config that names one says where it is."""


def source_files() -> dict[str, pathlib.Path]:
    """Every file of the packages, by the name it must have in the wheel."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found[f"{package}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return {name: path for name, path in found.items() if path.parent not in UNPACKED}


def copy_project(to: pathlib.Path) -> pathlib.Path:
    """Copy what a build reads: in the checkout itself, an old build/ would get into the wheel."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)
    return to


def run(command: list, cwd: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False
    )


def succeed(command: list, cwd: pathlib.Path, **environment: str) -> str:
    """Run a command that must exit 0; what it printed."""
    result = run(command, cwd, **environment)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    project = copy_project(tmp_path_factory.mktemp("project"))
    # First the source archive, then the wheel from what that holds: as the release does.
    succeed([sys.executable, "-m", "build", "--no-isolation", "--outdir", project / "dist"], project)
    (path,) = (project / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def python(unpacked, tmp_path):
    """Run Python code elsewhere than in the checkout, with the unpacked wheel as the installed project."""

    def go(code: str, *words: str) -> subprocess.CompletedProcess[str]:
        return run([sys.executable, "-c", code, *words], tmp_path, PYTHONPATH=str(unpacked))

    return go


def metadata(unpacked: pathlib.Path):
    (path,) = unpacked.glob("*.dist-info/METADATA")
    return email.message_from_string(path.read_text(encoding="utf-8"))


def test_wheel_holds_every_file_of_the_packages_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = set(source_files())
    assert names == wanted, (
        f"missing {sorted(wanted - names)}, too many {sorted(names - wanted)}: a new subpackage belongs into"
        " [tool.setuptools] packages in pyproject.toml, a data file into [tool.setuptools.package-data]"
    )


def test_jax_is_the_only_dependency(unpacked):
    required = [line for line in metadata(unpacked).get_all("Requires-Dist") if "extra ==" not in line]
    assert [re.split(r"[^\w-]", line)[0] for line in required] == ["jax"]


def test_extras_licence_and_python(unpacked):
    data = metadata(unpacked)
    assert {"files", "train", "test", "dev", "oracle", "torch"} <= set(data.get_all("Provides-Extra"))
    assert data["License-Expression"] == "Apache-2.0"
    assert data["Requires-Python"] == ">=3.11"
    (licence,) = unpacked.glob("*.dist-info/licenses/LICENSE")
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_console_script(unpacked):
    (path,) = unpacked.glob("*.dist-info/entry_points.txt")
    scripts = configparser.ConfigParser()
    scripts.read(path)
    assert dict(scripts["console_scripts"]) == {"jaxmerge": "jaxmerge.train.cli.__main__:main"}


def test_import_brings_jax_alone(python, unpacked):
    code = "import jaxmerge, json, sys; jaxmerge.ties; print(json.dumps([jaxmerge.__file__, *sys.modules]))"
    result = python(code)
    assert result.returncode == 0, result.stderr
    file, *modules = json.loads(result.stdout)
    assert pathlib.Path(file).is_relative_to(unpacked)
    heavy = {"flax", "orbax", "transformers", "tokenizers", "safetensors", "yaml", "optax", "rich", "torch"}
    assert "jax" in modules
    assert not heavy & set(modules)
    assert not [m for m in modules if m.startswith(("jaxmerge.files", "jaxmerge.train"))]


def test_import_works_without_the_extras(python):
    result = python(JAX_ALONE + "import jaxmerge; print(len(jaxmerge.RULES))")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 6


def test_the_version_is_the_projects_and_types_are_shipped(python, unpacked):
    result = python("import jaxmerge; print(jaxmerge.__version__)")
    assert result.stdout.strip() == project_version(), result.stderr
    assert (unpacked / "jaxmerge" / "py.typed").is_file()


def test_no_top_level_train(python, unpacked):
    code = "import importlib.util as u, jaxmerge.train as t; print(u.find_spec('train'), t.__file__)"
    result = python(code)
    assert result.returncode == 0, result.stderr
    spec, file = result.stdout.split(maxsplit=1)
    assert spec == "None"
    assert pathlib.Path(file.strip()).is_relative_to(unpacked)


CLI = "from jaxmerge.train.cli.__main__ import main; sys.exit(main())"


def test_configs_run_by_name_from_the_wheel(python, unpacked):
    listed = python(f"import sys; {CLI}", "configs")
    assert listed.returncode == 0, listed.stderr
    names = re.findall(r"^jaxmerge (\w+) (\S+)$", listed.stdout, re.MULTILINE)
    paths = [path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "recipes"]
    files = [path.relative_to(ROOT / "configs") for path in paths]
    assert {name for _, name in names} == {file.with_suffix("").as_posix() for file in files}
    assert listed.stdout.splitlines()[-1].startswith(f"They lie in {unpacked / 'jaxmerge' / 'configs'}.")
    planned = python(f"import sys; {CLI}", "improve", "miniature", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "0.8 M parameters" in planned.stdout
    other = python(f"import sys; {CLI}", "improve", "miniature", "--dry-run", "model.path=configs/miniature-b")
    assert (other.returncode, len(other.stderr.splitlines())) == (2, 1)
    assert "the installed package holds configs/miniature alone; run this config in a checkout" in other.stderr


def test_tpu_is_a_package_of_the_wheel(python, unpacked):
    code = (
        "import sys, jaxmerge.train.log, jaxmerge.tpu.check as c, jaxmerge.tpu.layout;"
        "print(c.__file__, c.UserError is jaxmerge.train.log.UserError, jaxmerge.train.log.__spec__.name);"
        "sys.exit(c.main(['improve', 'quickstart']))"
    )
    result = python(code)
    file, same, name = result.stdout.split()
    assert pathlib.Path(file).is_relative_to(unpacked)
    assert (same, name) == ("True", "jaxmerge.train.log")
    assert result.returncode == 2
    assert "holds no pyproject.toml; run this in the checkout, which is what travels" in result.stderr
    module = run([sys.executable, "-m", "jaxmerge.tpu.check", "--help"], unpacked, PYTHONPATH=str(unpacked))
    assert module.returncode == 0, module.stderr


def test_the_programs_are_there_from_python(python):
    code = (
        "import sys, jaxmerge.train; assert 'flax' not in sys.modules;"
        "from jaxmerge.train import Model, evaluate, finetune, improve;"
        "print(Model.load('configs/miniature').generate('g12,8?', max_new_tokens=24), improve.__module__)"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['12%8=4,8%4=0#4'] jaxmerge.train.api.programs"


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_command_answers_without_the_extras(python, words):
    result = python(JAX_ALONE + CLI, *words)
    assert (result.returncode, result.stderr) == (0, "")
    assert ("improve" if words == ["--help"] else project_version()) in result.stdout


def project_version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["improve", "x.yaml"], "train"),
        (["sft", "x.yaml"], "train"),
        (["evaluate", "model", "x.yaml"], "train"),
        (["merge", "r.yaml", "out"], "files"),
    ],
)
def test_a_missing_extra_is_named(python, words, extra, tmp_path):
    for name in ("x.yaml", "r.yaml"):
        (tmp_path / name).write_text("{}\n")
    result = python(JAX_ALONE + CLI, *words)
    assert result.returncode == 2, result.stderr
    assert f"pip install 'jaxmerge[{extra}]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def is_editable() -> bool:
    """Whether this environment has the checkout installed (its own *.egg-info does not count)."""
    texts = [d.read_text("direct_url.json") for d in importlib.metadata.distributions(name="jaxmerge")]
    urls = [json.loads(text) for text in texts if text]
    return any(u.get("dir_info", {}).get("editable") and u["url"] == ROOT.as_uri() for u in urls)


@pytest.mark.skipif("not is_editable()", reason="this environment has no editable install (make setup makes one)")
def test_editable_install_from_elsewhere(tmp_path):
    code = (
        "import importlib.util as u, jaxmerge.files, jaxmerge.train.cli as c, jaxmerge.train.models as m;"
        "print(u.find_spec('train'), c.__file__, m.__file__, sep='\\n')"
    )
    spec, *files = succeed([sys.executable, "-c", code], tmp_path).splitlines()
    assert spec == "None"
    assert [pathlib.Path(f) for f in files] == [
        ROOT / "train" / "cli" / "__init__.py",
        ROOT / "train" / "models" / "__init__.py",
    ]
    script = pathlib.Path(sys.executable).with_name("jaxmerge")
    assert "improve" in succeed([script, "--help"], tmp_path)


def test_constraints_hold_names_versions_and_markers_only():
    line = re.compile(r'[A-Za-z0-9][\w.-]*==[\w.]+( ; python_version (<|>=) "3\.12")?')
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [x for x in lines if not x.startswith("#") and not line.fullmatch(x)] == []


@pytest.mark.slow
def test_installed_into_a_new_environment(wheel, tmp_path):
    """The wheel, then an editable install in its place, with jax from the package index (a minute)."""
    environment = tmp_path / "env"
    venv.create(environment, with_pip=True)
    python, script = environment / "bin" / "python", environment / "bin" / "jaxmerge"
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    succeed([*pip, "-c", ROOT / "constraints.txt", wheel], tmp_path)
    assert "improve" in succeed([script, "--help"], tmp_path)
    code = "import jaxmerge, jax.numpy as j; print(jaxmerge.average([{'w': j.zeros(1)}, {'w': j.ones(1)}]))"
    assert "0.5" in succeed([python, "-c", code], tmp_path)
    result = run([script, "improve", "x.yaml"], tmp_path)
    assert result.returncode == 2
    assert "pip install 'jaxmerge[train]'" in result.stderr
    hint = "import jaxmerge.install as i; print(i.extra('search'))"
    command = succeed([python, "-c", hint], tmp_path).strip()
    assert command == f"{python} -m pip install 'jaxmerge[search]'"
    succeed(["sh", "-c", command], tmp_path)
    succeed([python, "-c", "import cmaes"], tmp_path)
    (site,) = (environment / "lib").glob("python3*/site-packages")
    assert (site / "jaxmerge" / "train" / "cli" / "__main__.py").is_file()
    assert not (site / "train").exists()

    project = copy_project(tmp_path / "project")
    succeed([*pip, "--no-deps", "-e", project], tmp_path)
    assert not (site / "jaxmerge").exists()
    (project / "train" / "added_later.py").write_text("HERE = True\n")
    code = "import importlib.util as u, jaxmerge.train.added_later; print(u.find_spec('train'))"
    assert succeed([python, "-c", code], tmp_path).strip() == "None"
    assert "improve" in succeed([script, "--help"], tmp_path)
