"""HTML from templates: what they are given is text unless it is Markup already, and text is escaped."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from markupsafe import Markup

from jaxmerge.files.inspect.canvas import clean


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than a word."""

    text: str
    small: str = ""
    """What stands below it."""
    strong: bool = False


@dataclasses.dataclass(frozen=True)
class Bar:
    """Shares of a whole as one bar: (colour, amount) from the left, and what it says in words."""

    amounts: Sequence[tuple[str, float]]
    said: str

    @property
    def parts(self) -> list[tuple[str, str]]:
        """(colour, percent) of each part there is."""
        total = sum(amount for _, amount in self.amounts) or 1.0
        return [(colour, f"{100 * amount / total:.4g}") for colour, amount in self.amounts if amount]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: columns in `left` are words, and the rows in `groups` open one."""

    head: Sequence[str | Cell]
    rows: Sequence[Sequence[str | Cell | Bar]]
    caption: str
    left: Collection[int] = (0,)
    groups: Collection[int] = ()
    key: Sequence[tuple[str, str]] = ()
    """(colour, word): what the colours of its bars mean."""

    @property
    def labels(self) -> list[str]:
        """What each column is called where the head is not in sight."""
        return [head if isinstance(head, str) else head.text for head in self.head]

    @property
    def stacked(self) -> bool:
        """On a telephone each row becomes a block: more than three columns do not fit beside each other."""
        return len(self.head) > 3


@functools.cache
def environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else clean(value),
    )


def part(name: str, /, **values: Any) -> Markup:
    """Write a part of a page: a macro of templates/parts.html."""
    return getattr(environment().get_template("parts.html").module, name)(**values)


def page(name: str, /, **values: Any) -> str:
    """Write a whole page from its template."""
    return environment().get_template(name).render(**values)


SHOWN = 4000
"""Characters of a text of a model or a person that a page shows."""


def cut(text: object, most: int = SHOWN) -> str:
    """The first `most` characters of a text, and how long it is: a page is to be opened.

    Example:
      >>> cut("abcdefgh", 3), cut("abc", 3)
      ('abc… (8 characters in all)', 'abc')
    """
    text = str(text)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters in all)"


def escape(text: object) -> Markup:
    """Make any text safe inside XML and HTML; what neither may contain becomes U+FFFD."""
    return markupsafe.escape(clean(text))
