"""Checkpoints on disk (extra `files`): `merge` by a recipe, `load` and `save` as pytrees."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmerge.files.params import load, save
    from jaxmerge.files.stream import merge

__all__ = ["load", "merge", "save"]


def __getattr__(name: str) -> Any:
    """The functions, imported when they are asked for: they need jax, and what only writes files does not."""
    if name == "merge":
        from jaxmerge.files.stream import merge

        return merge
    if name in ("load", "save"):
        from jaxmerge.files import params

        return getattr(params, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
