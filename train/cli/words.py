"""The words of a command: arguments, keys with their values and flags, told apart and checked against the verb."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..log import UserError
from ..resolve import build, override
from .flags import answer

T = TypeVar("T")
Words = Sequence[str]
HELP = ("--help", "-h")
_ASSIGNMENT = re.compile(r"[\w.-]+=")


@dataclasses.dataclass(frozen=True)
class Verb:
    """What a verb takes, and what it does; the docstring of `run` is the prose of its help.

    Attributes:
      name: the word after `jaxmerge`.
      arguments: the ways to call it, each a list of arguments in capitals.
      run: called with arguments, assignments `key=value` and whether `--dry-run` was given; returns the exit code.
      settings: the dataclasses whose fields are its keys; its help lists them.
      also: further dataclasses whose keys it takes, and which the help of another verb lists.
      flags: words without a value, beside --help.
      others: flags of another program that does the same → what to write here instead.
      extra: the extra of the package that brings what it needs.
      resumes: what it has done is kept when it is stopped, and the same command goes on; or a function of its arguments
        that tells whether something is kept.
    """

    name: str
    arguments: tuple[tuple[str, ...], ...]
    run: Callable[[Words, Words, bool], int]
    settings: tuple[type, ...] = ()
    also: tuple[type, ...] = ()
    flags: tuple[str, ...] = ()
    others: dict[str, str] = dataclasses.field(default_factory=dict)
    extra: str = "train"
    resumes: bool | Callable[[Words], bool] = False

    @property
    def usage(self) -> str:
        """`CONFIG | MODEL DATA OUT`."""
        return " | ".join(" ".join(way) for way in self.arguments)

    @property
    def prose(self) -> tuple[str, str]:
        """Its first sentence, and what is said further."""
        head, _, rest = (self.run.__doc__ or "").strip().partition("\n")
        return head, "\n".join(line.strip() for line in rest.strip().splitlines())

    @property
    def keys(self) -> tuple[str, ...]:
        """The first parts of its keys: `sft` of `sft.batch`."""
        return tuple(field.name for settings in (*self.settings, *self.also) for field in dataclasses.fields(settings))


def parse(verb: Verb, words: Words) -> tuple[list[str], list[str], set[str]]:
    """Tell the words after a verb apart.

    `--key=value` and `--key value` are `key=value`; what follows `--` are arguments.

    Returns:
      (arguments, assignments `key=value`, flags)

    Raises:
      UserError: a flag or key that the verb does not know, a key without its value, or a wrong number of arguments.
    """
    arguments: list[str] = []
    assignments: list[str] = []
    flags: set[str] = set()
    rest = iter(words)
    for word in rest:
        key, sign, value = word.removeprefix("--").partition("=")
        if word == "--":
            arguments += rest
        elif word.startswith("-") and key not in verb.keys and (said := answer(word, verb.others)):
            raise UserError(said)
        elif not word.startswith("--"):
            (assignments if _ASSIGNMENT.match(word) else arguments).append(word)
        elif word in verb.flags:
            flags.add(word)
        elif sign or key.partition(".")[0] in verb.keys:
            given = value if sign else next(rest, None)
            if given is None or (not sign and given.startswith("--")):
                raise UserError(f"--{key} has no value; write {key}=VALUE, --{key}=VALUE or --{key} VALUE")
            assignments.append(f"{key}={given}")
        else:
            raise UserError(f"no flag {word}{suggestion(verb, key, dashes='--')}")
    for assignment in assignments:
        check_key(verb, assignment.partition("=")[0])
    if len(arguments) not in map(len, verb.arguments):
        wanted = " or ".join(" ".join(way) or "no arguments" for way in verb.arguments)
        raise UserError(f"wanted {wanted}, found {' '.join(arguments) or 'none'}")
    return arguments, assignments, flags


def check_key(verb: Verb, key: str) -> None:
    """Refuse a key whose first part the verb does not know; the parts after it are checked where they are read."""
    if key.partition(".")[0] in verb.keys:
        return
    raise UserError(f"{key}: no such key{suggestion(verb, key)}")


def suggestion(verb: Verb, key: str, *, dashes: str = "") -> str:
    """The end of a message on a key that there is not: the nearest one (`sft.batch`, of `batch`), or all."""
    from .keys import settable

    known = [*verb.keys, *(flag.removeprefix("--") for flag in verb.flags if dashes)]
    inner = {path.rpartition(".")[2]: path for path in reversed(settable((*verb.settings, *verb.also)))}
    near = [inner[key]] if key in inner else difflib.get_close_matches(key, known, 1, 0.5)
    near = near or [inner[name] for name in difflib.get_close_matches(key, inner, 1, 0.7)]
    if near:
        return f"; did you mean {dashes}{near[0]}?"
    return f"; known: {', '.join(dashes + name for name in known)}" if known else f"; {verb.name} has none"


def split(assignments: Words, cls: type[T]) -> tuple[T, list[str]]:
    """Read `cls` from the assignments to its keys; (it, the other assignments).

    A text is taken as it is written (a folder may be named 2026), and one text for a list of texts is a list of one.
    """
    hints = typing.get_type_hints(cls)
    mine = [a for a in assignments if a.partition("=")[0].partition(".")[0] in hints]
    values: dict[str, Any] = override({}, mine)
    for key, _, text in (a.partition("=") for a in mine):
        hint = hints.get(key)
        kinds = {hint} if typing.get_origin(hint) in (tuple, dict) else {hint, *typing.get_args(hint)}
        if str in kinds and not isinstance(values[key], str | None):
            values[key] = text
        elif tuple[str, ...] in kinds and isinstance(values[key], str):
            values[key] = [values[key]]
    return build(cls, values), [a for a in assignments if a not in mine]


def options(assignments: Words, cls: type[T]) -> T:
    """All assignments as `cls`; a key that it does not know is refused."""
    found, others = split(assignments, cls)
    return build(cls, override({}, others)) if others else found
