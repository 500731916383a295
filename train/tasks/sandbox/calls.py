"""Calls from the tests in one process to the program in another: plain values as JSON, everything else by number.

What comes back is built from built-in types by this module, so an object that claims to equal everything, or a
patched `len`, stays in the process it was made in. The tests hold an object of the program as a `Remote`, which is
equal to nothing but itself.
"""

from __future__ import annotations

import builtins
import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

LONGEST = 32 << 20  # bytes of one message
CONTROL = (StopIteration, StopAsyncIteration)  # raised by a call, they would end the loop around it without a word


class Gone(BaseException):
    """The other process is not there any more, or does not keep to the protocol: no test may catch it by accident."""


def encode(value: Any, number_of: Callable[[Any], int] | None = None) -> Any:
    """Turn a value into what JSON can hold; everything but text, small numbers, true, false and None is tagged.

    Args:
      value: what is to be passed.
      number_of: the number of an object that is no plain value; without it such an object is an error.

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
        return [encode(v, number_of) for v in value]
    if isinstance(value, dict):
        return {"d": [[encode(k, number_of), encode(v, number_of)] for k, v in value.items()]}
    for tag, (kind, _) in _MANY.items():
        if isinstance(value, kind):
            return {tag: [encode(v, number_of) for v in value]}
    if isinstance(value, bytes | bytearray):
        return {"b": bytes(value).hex()}
    if isinstance(value, complex):
        return {"c": [encode(value.real), encode(value.imag)]}
    if value is Ellipsis:
        return {"e": 0}
    if number_of is not None:
        return {"o": number_of(value)}
    raise TypeError(f"{type(value).__name__} cannot be passed between the tests and the program: plain values only")


def decode(plain: Any, object_of: Callable[[int], Any] | None = None) -> Any:
    """Turn what `encode` gave back into the value; `object_of` gives what stands for a number."""
    if isinstance(plain, list):
        return [decode(v, object_of) for v in plain]
    if not isinstance(plain, dict):
        return plain
    ((tag, inside),) = plain.items()
    match tag:
        case "i":
            return int(inside, 16)
        case "f":
            return float(inside)
        case "d":
            return {decode(k, object_of): decode(v, object_of) for k, v in inside}
        case "b":
            return bytes.fromhex(inside)
        case "c":
            return complex(decode(inside[0]), decode(inside[1]))
        case "e":
            return Ellipsis
        case "o" if object_of is not None:
            return object_of(inside)
        case _:
            return _MANY[tag][1](decode(v, object_of) for v in inside)


_MANY: dict[str, tuple[Any, Callable]] = {
    "t": (tuple, tuple),
    "s": (set, set),
    "z": (frozenset, frozenset),
    "l": (range | type({}.keys()) | type({}.values()) | type({}.items()), list),
}


# --- the side of the tests ---------------------------------------------------------------------------------


class Link:
    """The way from the tests to the program.

    Args:
      requests, answers: descriptors to write to and to read from.
      fail: ends this process, with a reason; called where the program has ended or breaks the protocol, so that no
        `except` of the tests can hold that for an error they expect.
    """

    def __init__(self, requests: int, answers: int, fail: Callable[[str], Any]):
        self.requests, self.answers, self.fail = requests, answers, fail

    def names(self, names: Sequence[str]) -> dict[str, Any]:
        """What the program has under these names; a name that it lacks gives an error when it is used."""
        found = self.ask("names", None, list(names), {})
        return {name: value[0] if value else Remote(self, name) for name, value in zip(names, found, strict=True)}

    def ask(self, act: str, target: int | str | None, args: Any, kwargs: dict[str, Any]) -> Any:
        """Have the program do one thing; lists, dicts and sets it changes are changed here too."""
        plain = [encode(a, _number_of) for a in args]
        named = {k: encode(v, _number_of) for k, v in kwargs.items()}
        try:
            send(self.requests, [act, target, plain, named])
            kind, value, after = receive(self.answers)
            value = decode(value, self._remote)
            changed = [(a, decode(b, self._remote)) for a, b in zip(args, after, strict=False) if b is not None]
            error = _error(*map(str, value)) if kind == "error" else None
        except BaseException as fault:
            self.fail(f"the program broke the talk: {fault}")
            raise
        if error is not None:
            raise error
        for here, there in changed:
            if isinstance(here, list):
                here[:] = there
            elif isinstance(here, dict | set):
                here.clear()
                here.update(there)
        return value

    def _remote(self, number: int) -> Remote:
        return Remote(self, int(number))


class Remote:
    """An object of the program, as the tests hold it: it can be called, and its attributes read and set."""

    __slots__ = ("_link", "_target")
    _link: Link
    _target: int | str

    def __init__(self, link: Link, target: int | str):
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_target", target)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._link.ask("call", self._target, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._link.ask("get", self._target, [name], {})

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("set", self._target, [name, value], {})

    def __instancecheck__(self, value: Any) -> bool:
        return self._link.ask("is", self._target, [value], {}) is True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._target == other._target

    def __hash__(self) -> int:
        return hash(self._target)

    def __repr__(self) -> str:
        return f"<{self._target} of the program>"


def _number_of(value: Any) -> int:
    if isinstance(value, Remote) and isinstance(value._target, int):
        return value._target
    raise TypeError(f"{type(value).__name__} cannot be passed between the tests and the program: plain values only")


def _error(name: str, text: str) -> Exception:
    """The error to raise here: of that built-in type where it has one, but never one that ends a loop in silence."""
    found = vars(builtins).get(name)
    if isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, CONTROL):
        try:
            return found(text)
        except TypeError:  # UnicodeDecodeError and its like want more than a text
            pass
    return RuntimeError(f"{name}: {text}")


# --- the side of the program -------------------------------------------------------------------------------


def answer(namespace: dict[str, Any], requests: int, answers: int) -> None:
    """Do what the tests ask until they close.

    An error goes to the tests, whose `try` may expect it. What is no `Exception` (SystemExit, KeyboardInterrupt, a
    BaseException of the program's own) is raised here, and ends this process.
    """
    kept: list[Any] = []
    numbers: dict[int, int] = {}

    def number_of(value: Any) -> int:
        if id(value) not in numbers:  # the list keeps it alive, so nothing else takes its id
            numbers[id(value)] = len(kept)
            kept.append(value)
        return numbers[id(value)]

    def find(target: int | str) -> Any:
        if isinstance(target, int):
            return kept[target]
        if target not in namespace:
            raise NameError(f"name {target!r} is not defined")
        return namespace[target]

    while True:
        try:
            act, target, args, kwargs = receive(requests)
        except Gone:
            return
        args = [decode(a, kept.__getitem__) for a in args]
        before = [_text(a, number_of) if isinstance(a, list | dict | set) else None for a in args]
        try:
            if act == "names":
                value = [[namespace[name]] if name in namespace else [] for name in args]
            elif act == "call":
                value = find(target)(*args, **{k: decode(v, kept.__getitem__) for k, v in kwargs.items()})
            elif act == "get":
                value = getattr(find(target), args[0])
            elif act == "set":
                value = setattr(find(target), *args)
            else:
                value = isinstance(args[0], find(target))
            kind, plain = "value", encode(value, number_of)
        except Exception as error:
            kind, plain = "error", [_name(error), str(error)[:500]]
        after = [_if_changed(a, b, number_of) for a, b in zip(args, before, strict=True)]
        send(answers, [kind, plain, after])


def _name(error: Exception) -> str:
    """The name of an error's type, or of the nearest built-in one above it that is more than Exception."""
    kinds = [kind for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind]
    return type(error).__name__ if kinds[0] is Exception else kinds[0].__name__


def _text(value: Any, number_of: Callable[[Any], int]) -> str:
    return json.dumps(encode(value, number_of))


def _if_changed(value: Any, before: str | None, number_of: Callable[[Any], int]) -> Any:
    if before is None:
        return None
    try:
        plain = encode(value, number_of)
    except RecursionError:
        return None
    return plain if json.dumps(plain) != before else None


# --- messages ----------------------------------------------------------------------------------------------


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
