"""The pages: links lead somewhere, the API pages hold every public name, notebooks run, the library is annotated."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from helpers import ROOT

import jaxmerge

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
LINK = re.compile(r"\]\(([^()\s]+)\)")


def prose_of(path: pathlib.Path) -> str:
    """The Markdown of a page or of a notebook's cells, without its fenced code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.relative_to(DOCS).as_posix())
def test_links_lead_to_files_of_the_repository(path):
    """Anchors are checked where the site is built (`.ci/run docs`)."""
    for target in LINK.findall(prose_of(path)):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_every_public_name_stands_once_on_an_api_page():
    found = [name for page in PAGES for name in re.findall(r"^::: jaxmerge\.(\w+)$", page.read_text(), re.MULTILINE)]
    assert sorted(found) == sorted({*jaxmerge.__all__} - {"RULES", "linear", "dare_linear"})


def public_functions(body: list[ast.stmt]):
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            yield node


def test_every_public_argument_and_return_of_the_library_is_annotated():
    found = []
    for path in sorted((ROOT / "jaxmerge").rglob("*.py")):
        for function in public_functions(ast.parse(path.read_text()).body):
            a = function.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            bare = [x.arg for x in given if x.annotation is None and x.arg not in ("self", "cls")]
            if function.returns is None and function.name != "__init__":
                bare.append("what it returns")
            found += [f"{path.relative_to(ROOT)}: {function.name}: {name}" for name in bare]
    assert found == []


def test_formulas_are_markdown():
    old = [path for top in ("jaxmerge", "train", "tpu") for path in (ROOT / top).rglob("*.py")]
    assert [path for path in old if ":math:" in path.read_text()] == []


def test_what_the_site_brings_along_is_small_and_licensed():
    katex = DOCS / "katex"
    assert "MIT License" in (katex / "LICENSE").read_text()
    css = (katex / "katex.min.css").read_text()
    fonts = set(re.findall(r"url\(fonts/([^)]+)\)", css))
    assert fonts == {path.name for path in (katex / "fonts").iterdir()}
    assert "http" not in css
    assert [path for path in DOCS.rglob("*") if path.is_file() and path.stat().st_size > 5_000_000] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_as_they_ran(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert str(ROOT) not in path.read_text()


def as_script(path: pathlib.Path) -> str:
    """The code cells of a notebook, one after another; what a cell `%%bash` says must exit 0."""
    parts = ["import subprocess"]
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            shell = text.removeprefix("%%bash\n")
            parts.append(text if shell == text else f"subprocess.run(['bash', '-ec', {shell!r}], check=True)")
    return "\n".join([*parts, ""])


@pytest.mark.skipif(not os.environ.get("FULL"), reason="FULL=1 runs the notebooks: minutes")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
    """In a process of its own, in a folder with the packages as an install has them and the configs of a checkout."""
    package = tmp_path / "jaxmerge"
    package.mkdir()
    for source in (ROOT / "jaxmerge").iterdir():
        (package / source.name).symlink_to(source)
    (package / "train").symlink_to(ROOT / "train")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    folder = tmp_path / "docs" / "tutorials"
    folder.mkdir(parents=True)
    script = tmp_path / "notebook.py"
    script.write_text(as_script(path))
    command = tmp_path / "bin" / "jaxmerge"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m jaxmerge.train.cli "$@"\n')
    command.chmod(0o755)
    search = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PATH": search, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
