"""The README's code runs, and its tree names files that exist, and every module is in it."""

from __future__ import annotations

import re

import jax
import pytest
from helpers import ROOT

README = (ROOT / "README.md").read_text()


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert float(scope["merged"]["head"][0]) == 1.5
    assert [float(layer["w"][0, 0]) for layer in scope["deeper"]["layers"]] == pytest.approx([0.2, 0.8])


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
