"""The README's code and commands run, it is short, and CONTRIBUTING.md's tree is the tree on disk."""

from __future__ import annotations

import re

import jax
import pytest
from helpers import ROOT

README = (ROOT / "README.md").read_text()
KINDS = (".py", ".yaml", ".sh", ".jinja", ".css", ".typed")
"""Endings of the files that CONTRIBUTING.md lists."""


def run_blocks(page: str) -> dict:
    """Run the Python blocks of a page in order, in one scope."""
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "page", "exec"), scope)
    return scope


def test_examples_run():
    scope = run_blocks(README)
    assert float(scope["merged"]["head"][0]) == 1.5
    assert [float(layer["w"][0, 0]) for layer in scope["deeper"]["layers"]] == pytest.approx([0.2, 0.8])
    assert float(scope["further"]["head"][0]) == pytest.approx(2.3)


def test_it_is_short():
    assert len(README.split()) <= 900


def test_the_library_in_other_peoples_loops():
    text = (ROOT / "docs" / "library.md").read_text()
    blocks = re.findall(r"\*\*(\w+)\*\*.*?```python\n(.*?)```", text, re.DOTALL)
    assert [name for name, _ in blocks] == ["Equinox", "Linen", "NNX"]
    scopes: dict[str, dict] = {name: {} for name, _ in blocks}
    for name, block in blocks:
        lines = [line for line in block.splitlines() if line and not line.startswith(("import", "from"))]
        assert len(lines) <= 13, name
        with jax.numpy_dtype_promotion("standard"):  # optax does not hold with our strictness
            exec(compile(block, "docs/library.md", "exec"), scopes[name])
    clients = scopes["Equinox"]["clients"]
    assert all(float(loss) < 1.0 for _, loss in clients)
    assert callable(scopes["Equinox"]["model"].activation)
    assert scopes["Equinox"]["model"](scopes["Equinox"]["x"][0]).shape == (1,)
    linen = scopes["Linen"]
    kernels = [tree["params"]["kernel"][:, 0] for tree in (linen["anchor"], linen["params"])]
    assert float(abs(kernels[1] - 1).sum()) < float(abs(kernels[0] - 1).sum())
    nnx = scopes["NNX"]
    assert float(nnx["losses"].min()) < float(nnx["losses"][0])
    assert float(nnx["loss"](nnx["nnx"].split(nnx["model"])[1])) == pytest.approx(float(nnx["losses"].min()), rel=1e-4)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_name_what_exists(page):
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), target


def test_the_tree_of_contributing_is_the_tree_on_disk():
    """Each folder with its files; a folder's line begins at the margin, its files follow on indented lines."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## The tree")[1]
    listed: dict[str, set[str]] = {}
    folder = ""
    for line in text.split("```")[1].strip("\n").split("\n"):
        if line.startswith(" "):
            listed[folder] |= set(line.split())
        else:
            folder, _, purpose = line.partition("/ ")
            assert purpose.strip(), f"{folder}: no purpose"
            listed[folder] = set()
    for name, files in listed.items():
        there = {p.name for p in (ROOT / name).iterdir() if p.suffix in KINDS and p.name != "__init__.py"}
        assert files == there, name
    tops = ("jaxmerge", "train", "tpu", "benchmarks")
    packages = {p.parent.relative_to(ROOT).as_posix() for top in tops for p in (ROOT / top).rglob("*.py")}
    assert packages <= set(listed)


def test_nothing_names_a_registry():
    hosts = re.compile(r"files\.pythonhosted|pypi\.org/simple|--index-url|--extra-index-url")
    for path in (ROOT / "constraints.txt", ROOT / "Makefile", ROOT / "README.md", *(ROOT / ".ci").iterdir()):
        assert not hosts.search(path.read_text()), path
