"""The commands that bring what is missing, written so that they work where they are printed.

Needs the standard library alone: it is asked when packages are missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import shlex
import shutil
import sys

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]


def pip(words: str) -> str:
    """Return the command that installs `words` into the environment of this Python.

    It is `pip install` where the shell's pip is this environment's. Otherwise it names this Python, or goes through uv
    where this environment has no pip.

    Example:
      >>> pip("cmaes").endswith(" cmaes")
      True
    """
    python = shlex.quote(sys.executable)
    found = shutil.which("pip")
    if found is not None and os.path.dirname(found) == os.path.dirname(sys.executable):
        return f"pip install {words}"
    if importlib.util.find_spec("pip") is None:
        return f"uv pip install --python {python} {words}"
    return f"{python} -m pip install {words}"


def extra(name: str = "") -> str:
    """Return the command that brings an extra of this package, or what the package itself needs.

    Of a package that is installed, also from a checkout, pip takes the name; a checkout that is not installed is named
    by its folder.
    """
    what = f"[{name}]" if name else ""
    try:
        importlib.metadata.version("jaxmerge")
    except importlib.metadata.PackageNotFoundError:
        if (CHECKOUT / "pyproject.toml").is_file():
            return pip(f"-e {shlex.quote(f'{CHECKOUT}{what}')}")
    return pip(shlex.quote(f"jaxmerge{what}"))
