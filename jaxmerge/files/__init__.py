"""Merging checkpoints on disk (extra `files`): recipes in, Hugging Face folders in and out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmerge.files.stream import merge

__all__ = ["merge"]


def __getattr__(name: str) -> Any:
    """`merge`, imported when it is asked for: it needs jax, and what only writes files does not."""
    if name == "merge":
        from jaxmerge.files.stream import merge

        return merge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
