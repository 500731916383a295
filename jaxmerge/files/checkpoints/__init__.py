"""Kinds of checkpoint, as tensors that are not read yet."""
