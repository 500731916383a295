r"""Coefficients of a recipe that are searched: `density: {search: [0.1, 0.9]}` where a number would stand.

A range has a name, the keys that lead to it: `parameters.density`, `models.1.parameters.weight`. `start: 0.5` beside
`search` says where a search begins; without it that is the middle of the range.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxmerge.strategies import Float

SEARCH, START = "search", "start"
_FORM = "wanted {search: [low, high]}, and perhaps start: a number between them"


def ranges(document: Any) -> dict[str, Float]:
    """Return the ranges of a recipe by their names, in the order of the file.

    Raises:
      ValueError: a range is no two numbers, or stands elsewhere than under `parameters`.

    Example:
      >>> ranges({"models": [{"model": "a", "parameters": {"weight": {"search": [0, 1]}}}]})
      {'models.0.parameters.weight': Float(low=0.0, high=1.0, start=0.5, size=None)}
    """
    found = {}
    for path, value in _walk(document, ()):
        name = ".".join(map(str, path))
        if "parameters" not in path:
            raise ValueError(f"{name}: a range stands among 'parameters' alone; give a value here")
        found[name] = _float(name, value)
    return found


def filled(document: Any, values: Mapping[str, float]) -> Any:
    """Return the recipe with numbers in the places of its ranges.

    Example:
      >>> filled({"parameters": {"t": {"search": [0, 1]}}}, {"parameters.t": 0.25})
      {'parameters': {'t': 0.25}}
    """

    def put(value: Any, path: tuple[Any, ...]) -> Any:
        if _is_range(value):
            return float(values[".".join(map(str, path))])
        if isinstance(value, Mapping):
            return {key: put(inner, (*path, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [put(inner, (*path, i)) for i, inner in enumerate(value)]
        return value

    return put(document, ())


def _is_range(value: Any) -> bool:
    return isinstance(value, Mapping) and SEARCH in value


def _walk(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    if _is_range(value):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _walk(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _walk(inner, (*path, i))


def _float(name: str, value: Mapping[str, Any]) -> Float:
    ends, others = value[SEARCH], set(value) - {SEARCH, START}
    numbers = ends if isinstance(ends, list) else []
    if len(numbers) != 2 or others or not all(map(_is_number, [*numbers, value.get(START, 0)])):
        raise ValueError(f"{name} is {dict(value)}, {_FORM}")
    low, high = map(float, numbers)
    try:
        return Float(low, high, float(value.get(START, (low + high) / 2)))
    except ValueError as error:
        raise ValueError(f"{name}: {error}; {_FORM}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
