"""Merge, extrapolate and measure model weights: pure functions from pytrees to pytrees, needing jax alone.

A rule merges models: `rule(models, *, base=None, key=None, names=None, stacked=(), <coefficients>)`. `help` of a rule
shows its coefficients; `jaxmerge.RULES` prints what every rule needs and computes. The rules by family:
"""

import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any

__version__: str
"""The version in pyproject.toml; read from what is installed when it is asked for."""

if TYPE_CHECKING:
    from jaxmerge.public import *  # noqa: F403 # its __all__ is the list of the public names
    from jaxmerge.public import __all__ as __all__

else:  # a type checker that saw `__getattr__` would take every name for one that is here
    _HEAD = __doc__

    class _Package(types.ModuleType):
        """A module that imports jax when it is first asked for a name, and not before.

        `jaxmerge.train.cli` lies in this package, and `jaxmerge --help` need not wait for jax.
        """

        @property
        def __doc__(self) -> str:
            from jaxmerge.rules import RULES, families

            return f"{_HEAD}\n{families(RULES)}\n"

        def __getattr__(self, name: str) -> Any:
            if name == "__version__":
                return _version()
            if name in ("files", "train"):
                raise AttributeError(f"jaxmerge.{name} is not imported yet; import jaxmerge.{name}", name=name)
            if name.startswith("__") and name != "__all__":  # asked for by the import system, by inspect, by copy
                raise AttributeError(f"module 'jaxmerge' has no attribute {name!r}", name=name)
            if importlib.util.find_spec(f"jaxmerge.{name}"):  # alone: it may itself be what is being loaded
                return importlib.import_module(f"jaxmerge.{name}")
            public = _load()
            if name in public:
                return public[name]
            from jaxmerge.contract import nearest

            hint = f"; {nearest(name, list(public))}".rstrip("; ")
            raise AttributeError(f"module 'jaxmerge' has no attribute {name!r}{hint}", name=name)

        def __dir__(self) -> list[str]:
            _load()
            return sorted(name for name in self.__dict__ if name not in _OWN)

    def _load() -> dict[str, Any]:
        """The public names, which stand in this module from then on, and `__all__`."""
        from jaxmerge import public

        names = {name: getattr(public, name) for name in public.__all__}
        globals().update(names, __all__=public.__all__)
        return names | {"__all__": public.__all__}

    def _version() -> str:
        from importlib import metadata

        try:
            return metadata.version("jaxmerge")
        except metadata.PackageNotFoundError:
            from jaxmerge.install import extra

            reason = f"jaxmerge is not installed, so it has no version; {extra()}"
            raise AttributeError(reason, name="__version__") from None

    _OWN = {"TYPE_CHECKING", "_HEAD", "_OWN", "_Package", "_load", "_version", "Any", "importlib", "sys", "types"}
    sys.modules[__name__].__class__ = _Package
