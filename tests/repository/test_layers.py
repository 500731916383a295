"""The house: which folder may import which, no ring of files, no loose file, no long file or function.

Imports are read from the source, those inside functions and under TYPE_CHECKING too.
"""

import ast
import pathlib

import pytest
from helpers import ROOT

SHELVES = (
    {"cli", "api"},
    {"studies"},
    {"improve"},
    {"search"},
    {"learn", "evaluate"},
    {"tasks", "generate"},
    {"models", "data", "report"},
    {"runtime"},
    {"resolve"},
    {"log"},
)
"""The rooms of `train/`, the highest first. A room imports from lower shelves; rooms side by side are strangers."""
SHELF = {room: number for number, rooms in enumerate(SHELVES) for room in rooms}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
LONG_FUNCTIONS: dict[str, str] = {}
"""file:function → why it stays long; at most three."""
SOURCES = sorted(path for top in ("jaxmerge", "train", "tpu", "benchmarks") for path in (ROOT / top).rglob("*.py"))


def module(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in SOURCES}


def imports(path: pathlib.Path) -> set[str]:
    """The modules of this repository that a file imports, anywhere in it, as dotted names."""
    found = set()
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in MODULES else base)
    return {name for name in found if name in MODULES} - {module(path)}


def room(name: str) -> str | None:
    """The room of a module of `train/`: its folder, or itself where it lies loose."""
    parts = name.split(".")
    return parts[1] if parts[0] == "train" and len(parts) > 1 else None


def offences() -> list[str]:
    found = []
    for name, path in MODULES.items():
        mine = room(name)
        for other in sorted(imports(path)):
            theirs = room(other)
            if name.startswith("jaxmerge") and not other.startswith("jaxmerge"):
                found.append(f"{name} imports {other}: the library imports nobody")
            if mine and theirs and mine != theirs and SHELF[theirs] <= SHELF[mine]:
                found.append(f"{name} imports {other}")
            if name.startswith("train") and other.startswith(("tpu", "benchmarks")):
                found.append(f"{name} imports {other}")
            if name.startswith(("tpu", "benchmarks")) and theirs in ("cli", "studies") and not name.startswith("bench"):
                found.append(f"{name} imports {other}")
    return found


def test_no_import_goes_upward():
    assert offences() == []


def test_the_core_of_the_library_imports_no_files():
    core = [name for name in MODULES if name.startswith("jaxmerge") and not name.startswith("jaxmerge.files")]
    found = [(name, other) for name in core for other in imports(MODULES[name]) if other.startswith("jaxmerge.files")]
    assert found == []


def rings() -> list[list[str]]:
    """Groups of files that reach each other by imports (Tarjan's strongly connected components)."""
    edges = {name: imports(path) for name, path in MODULES.items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            ring = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(ring) > 1:
                found.append(sorted(ring))

    for name in sorted(edges):
        if name not in index:
            visit(name)
    return found


def test_no_files_import_each_other_in_a_ring():
    assert rings() == []


def test_no_loose_file_in_train():
    assert {path.name for path in (ROOT / "train").glob("*.py")} == {"__init__.py", "log.py", "resolve.py"}
    rooms = {path.name for path in (ROOT / "train").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(SHELF) - {"log", "resolve"}


@pytest.mark.parametrize("folder", [path for path in sorted((ROOT / "train").iterdir()) if path.is_dir()], ids=str)
def test_every_room_says_what_it_is_for(folder):
    if folder.name != "__pycache__":
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_no_file_is_long():
    paths = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    assert [f"{p}: {n}" for p in paths if (n := len(p.read_text().splitlines())) > LONGEST_FILE] == []


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    start = function.lineno
    if ast.get_docstring(function, clean=False) is not None:
        start = function.body[0].end_lineno or start
    return (function.end_lineno or start) - start


def test_no_function_is_long():
    found = {
        f"{path.relative_to(ROOT)}:{node.name}": body_lines(node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > LONGEST_FUNCTION
    }
    assert len(LONG_FUNCTIONS) <= 3
    assert {name: lines for name, lines in found.items() if name not in LONG_FUNCTIONS} == {}
    assert set(LONG_FUNCTIONS) <= set(found), "an exception that is not needed any more"


def test_no_test_imports_from_another_test():
    found = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path}: {name}" for name in names if name.split(".")[-1].startswith("test_")]
    assert found == []
