"""Damage to files: bytes changed, cut or put in, and values of JSON and YAML replaced by others, by a seed."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 1 << 31, 1 << 63, 1 << 70, 0.5, -0.0, 1e30, float("nan"), float("inf"), "", "x",
    "a b", "\ud800", "é", "\0", "\n", "../x", "/etc", "model", [], [1], [[]], [None, "a"], {}, {"a": 1}, ["x"] * 300,
    "y" * 5000,
)  # fmt: skip
PIECES = (
    b"\0", b"\xff", b"{", b"}", b"[", b'"', b",", b":", b"\n", b"  ", b"-", b"9" * 30, b"null", b"&a", b"*a", b"{{",
    b"{%", b"%}", b"!!python/name:os.system", b"\xed\xa0\x80", b"1e999", b"NaN",
)  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return the data with one to three changes; of JSON as often of its values as of its bytes."""
    document = _json(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if document is not None and rng.random() < 0.6:
            document = _change(document, rng)
            data = json.dumps(document).encode()
        else:
            data = _damage(data, rng)
            document = None
    return data


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _damage(data: bytes, rng: random.Random) -> bytes:
    """Change some bytes: nearer to the start more often, where headers are."""
    size = len(data)
    at = min(int(size * rng.random() ** 2), max(size - 1, 0))
    count = min(rng.choice((1, 1, 2, 8, 40)), size - at)
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + count :]
    if kind == 2:
        return data[:at] + rng.choice(PIECES) + data[at:]
    if kind == 3:
        return data[:at] + data[at : at + count] * 2 + data[at + count :]
    if kind == 4:
        return data[:at] + rng.randbytes(count) + data[at + count :]
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else b"\0"


def _change(document: Any, rng: random.Random) -> Any:
    """Replace, drop, rename or double a value somewhere in a document."""
    places = list(_places(document))
    if not places:
        return _value(rng)
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind <= 2:
        holder[key] = _value(rng)
    elif kind == 3:
        del holder[key]
    elif isinstance(holder, dict):
        value = holder.pop(key) if kind == 4 else copy.deepcopy(holder[key])
        holder[rng.choice((f"{key}_x", key[:-1], key.upper(), "x", ""))] = value
    else:
        holder.insert(key, copy.deepcopy(holder[key]))
    return document


def _value(rng: random.Random) -> Any:
    """One of VALUES, never the very list or object: later damage would change it for all."""
    return copy.deepcopy(rng.choice(VALUES))


def _places(document: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    stack = [document]
    while stack:
        value = stack.pop()
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        # A vocabulary of hundreds of tokens would drown all else.
        found += [(value, key) for key in list(keys)[:12]]
        stack += [value[key] for key in keys]
    return found
