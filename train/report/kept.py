"""Pictures that were drawn before are not drawn again: a page is written after every phase, and few of them change."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

MOST = 256
"""Pictures kept; a report has fewer than a hundred, of some kilobytes each."""
_drawn: collections.OrderedDict[str, str] = collections.OrderedDict()


def kept(draw: Callable[..., str]) -> Callable[..., str]:
    """Keep what a function of plain values draws, for the next call with equal ones.

    Functions among the values are known by their names: one without a lasting name is drawn each time.
    """

    @functools.wraps(draw)
    def drawn(*args: Any, **options: Any) -> str:
        given = [(None, value) for value in args] + sorted(options.items())
        if any(callable(value) and not _lasting(value) for _, value in given):
            return draw(*args, **options)
        named = [
            (key, f"{value.__module__}.{value.__qualname__}" if callable(value) else value) for key, value in given
        ]
        key = repr((draw.__qualname__, named))
        if key not in _drawn:
            _drawn[key] = draw(*args, **options)
            while len(_drawn) > MOST:
                _drawn.popitem(last=False)
        _drawn.move_to_end(key)
        return _drawn[key]

    return drawn


def _lasting(function: Any) -> bool:
    name = getattr(function, "__qualname__", "<none>")
    return "<" not in name
