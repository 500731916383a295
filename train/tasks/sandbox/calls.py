"""Calls from the tests in one process to the functions in another: plain values only, as JSON.

What comes back is built from built-in types by this module, so an object that claims to equal everything, or a
patched `len`, stays in the process it was made in.
"""

from __future__ import annotations

import builtins
import json
import math
import os
import struct
from collections.abc import Callable
from typing import Any

LONGEST = 32 << 20  # bytes of one message


class Gone(RuntimeError):
    """The process that was called is not there any more."""


def encode(value: Any) -> Any:
    """Turn a value into what JSON can hold; everything but text, small numbers, true, false and None is tagged.

    Example:
      >>> decode(encode({(1, 2.5): [None, b"x", {3}]}))
      {(1, 2.5): [None, b'x', {3}]}
    """
    if value is None or value is True or value is False or type(value) is str:
        return value
    if isinstance(value, int):
        return int(value) if -(1 << 53) < value < 1 << 53 else {"i": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"f": repr(float(value))}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {"d": [[encode(k), encode(v)] for k, v in value.items()]}
    for tag, (kind, _) in _MANY.items():
        if isinstance(value, kind):
            return {tag: [encode(v) for v in value]}
    if isinstance(value, bytes | bytearray):
        return {"b": bytes(value).hex()}
    if isinstance(value, complex):
        return {"c": [encode(value.real), encode(value.imag)]}
    if value is Ellipsis:
        return {"e": 0}
    raise TypeError(f"{type(value).__name__} cannot be passed between the tests and the program: plain values only")


def decode(plain: Any) -> Any:
    """Turn what `encode` gave back into the value."""
    if isinstance(plain, list):
        return [decode(v) for v in plain]
    if not isinstance(plain, dict):
        return plain
    ((tag, inside),) = plain.items()
    match tag:
        case "i":
            return int(inside, 16)
        case "f":
            return float(inside)
        case "d":
            return {decode(k): decode(v) for k, v in inside}
        case "b":
            return bytes.fromhex(inside)
        case "c":
            return complex(decode(inside[0]), decode(inside[1]))
        case "e":
            return Ellipsis
        case _:
            return _MANY[tag][1](decode(v) for v in inside)


_MANY: dict[str, tuple[Any, Callable]] = {
    "t": (tuple, tuple),
    "s": (set, set),
    "z": (frozenset, frozenset),
    "l": (range | type({}.keys()) | type({}.values()) | type({}.items()), list),
}


def remote(name: str, requests: int, answers: int) -> Callable[..., Any]:
    """A function that calls `name` in the other process; lists, dicts and sets it changes are changed here too."""

    def call(*args: Any, **kwargs: Any) -> Any:
        send(requests, [name, [encode(a) for a in args], {k: encode(v) for k, v in kwargs.items()}])
        try:
            kind, value, after = receive(answers)
            value = decode(value)
            changed = [(here, decode(there)) for here, there in zip(args, after, strict=False) if there is not None]
        except (ValueError, TypeError, KeyError) as error:
            raise Gone(f"the program broke the talk: {error}") from None
        if kind == "error":
            found = vars(builtins).get(str(value[0]))
            if isinstance(found, type) and issubclass(found, Exception):
                raise found(value[1])
            raise RuntimeError(f"{value[0]}: {value[1]}")
        for here, there in changed:
            if isinstance(here, list):
                here[:] = there
            elif isinstance(here, dict | set):
                here.clear()
                here.update(there)
        return value

    call.__name__ = call.__qualname__ = name
    return call


def answer(namespace: dict[str, Any], requests: int, answers: int) -> None:
    """Answer calls of the functions in `namespace` until the other side closes."""
    while True:
        try:
            name, args, kwargs = receive(requests)
        except Gone:
            return
        args = [decode(a) for a in args]
        before = [json.dumps(encode(a)) if isinstance(a, list | dict | set) else None for a in args]
        try:
            if name not in namespace:
                raise NameError(f"name {name!r} is not defined")
            value = namespace[name](*args, **{k: decode(v) for k, v in kwargs.items()})
            kind, plain = "value", encode(value)
        except Exception as error:
            kind, plain = "error", [type(error).__name__, str(error)[:500]]
        after = [_if_changed(a, b) for a, b in zip(args, before, strict=True)]
        send(answers, [kind, plain, after])


def _if_changed(value: Any, before: str | None) -> Any:
    if before is None:
        return None
    try:
        plain = encode(value)
    except (TypeError, RecursionError):
        return None
    return plain if json.dumps(plain) != before else None


def send(descriptor: int, message: Any) -> None:
    """Write one message: its length in four bytes, then JSON."""
    text = json.dumps(message).encode()
    data = memoryview(struct.pack("<I", len(text)) + text)
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BrokenPipeError:
            raise Gone("the other side has ended") from None


def receive(descriptor: int) -> Any:
    """Read one message."""
    (length,) = struct.unpack("<I", exactly(descriptor, 4))
    if length > LONGEST:
        raise ValueError(f"a message of {length} bytes; at most {LONGEST}")
    return json.loads(exactly(descriptor, length))


def exactly(descriptor: int, count: int) -> bytes:
    """Read `count` bytes, however they come."""
    parts: list[bytes] = []
    while count:
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            raise Gone("the other side has ended")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
