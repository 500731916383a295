"""Programs in texts: their fences, whether they compile, what tests call."""

from __future__ import annotations

import ast
import builtins
import re
import warnings

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)


def fenced(text: str) -> tuple[list[str], bool]:
    """(the code of every closed fence that is Python's or nobody's, whether a fence is left open).

    Example:
      >>> fenced("a\\n```python\\nx = 1\\n```\\n```\\ny")
      (['x = 1'], True)
    """
    blocks, start, mark, language = [], 0, "", ""
    for found in _FENCE.finditer(text):
        if not mark:
            start, mark, language = found.end() + 1, found.group(1), found.group(2).lower()
        elif found.group(1).startswith(mark[0] * len(mark)) and not found.group(2):
            if language in ("", "py", "python", "python3"):
                blocks.append(text[start : max(start, found.start() - 1)])
            mark = ""
    return blocks, bool(mark)


def compiles(code: str) -> bool:
    """Whether Python can read a program; it is not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its escapes, say: the program's affair
            compile(code, "program", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def called(source: str, setup: str = "") -> tuple[str, ...]:
    """Names that tests call and do not bring along.

    Example:
      >>> called("assert sorted(f([2, 1])) == g(3)")
      ('f', 'g')
    """
    known = set(dir(builtins))
    found: dict[str, None] = {}
    for node in ast.walk(ast.parse(setup + "\n" + source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            known.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            known |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found[node.func.id] = None
    return tuple(name for name in sorted(found) if name not in known)
