"""Merging checkpoints on disk (extra `files`): recipes in, Hugging Face folders in and out."""

from jaxmerge.files.stream import merge

__all__ = ["merge"]
