"""The README's code runs, and its tree names files that exist, and every module is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert float(scope["merged"]["head"][0]) == 1.5
    assert [float(layer["w"][0, 0]) for layer in scope["deeper"]["layers"]] == pytest.approx([0.2, 0.8])


def test_links_and_tree_name_what_exists():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    tree = README.split("## Where things are")[1]
    for package in ("jaxmerge", "train"):
        for module in (ROOT / package).glob("*.py"):
            named = module.name in tree or ("report*.py" in tree and module.name.startswith("report"))
            assert named or module.name == "__init__.py", f"{package}/{module.name} is not in the README's tree"
    for name in re.findall(r"[a-z_]+\.py", tree):
        assert list(ROOT.glob(f"*/{name}")) or list(ROOT.glob(f"*/*/{name}")), f"{name} does not exist"


def test_nothing_names_a_registry():
    hosts = re.compile(r"files\.pythonhosted|pypi\.org/simple|--index-url|--extra-index-url")
    for path in (ROOT / "constraints.txt", ROOT / "Makefile", ROOT / "README.md", *(ROOT / ".ci").iterdir()):
        assert not hosts.search(path.read_text()), path
