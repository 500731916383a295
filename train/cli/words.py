"""The words of a command: keys and values, taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from ..resolve import build, override

T = TypeVar("T")


Words = Sequence[str]


def take(assignments: Words, **defaults: Any) -> tuple[dict[str, Any], list[str]]:
    """Split off the assignments to the keys of `defaults`; (their values, the other assignments)."""
    mine = [a for a in assignments if a.partition("=")[0] in defaults]
    return defaults | override({}, mine), [a for a in assignments if a not in mine]


def options(assignments: Words, cls: type[T]) -> T:
    return build(cls, override({}, assignments))
