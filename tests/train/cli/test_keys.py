"""docs/config.md: every key there is, as the settings say it."""

import dataclasses
import re
from typing import Literal

import pytest
from helpers import ROOT

from train.cli.keys import ABOUT, documented, keys, page
from train.cli.settings import Experiment, Place, Result
from train.cli.verbs import VERBS
from train.improve.settings import Improve

WRITTEN = ROOT / "docs" / "config.md"


@dataclasses.dataclass(frozen=True)
class Inner:
    """Of a part.

    Attributes:
      first, second: two of a kind,
        told together.
    """

    first: int
    second: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    """All."""

    one: Literal["a", "b"] = "a"
    """Which."""
    parts: tuple[Inner, ...] = ()
    """Several."""
    named: dict[str, Inner] = dataclasses.field(default_factory=dict)
    maybe: Inner | None = None
    silent: bool = True


def test_keys_go_into_lists_maps_and_what_may_be_there():
    found = {key.path: key for key in keys(Outer)}
    assert list(found) == [
        "one", "parts[]", "parts[].first", "parts[].second", "named.NAME.first", "named.NAME.second", "maybe.first",
        "maybe.second", "silent",
    ]  # fmt: skip
    assert (found["one"].kind, found["one"].default, found["one"].meaning) == ("a | b", "a", "Which.")
    assert (found["parts[].first"].default, found["silent"].default) == ("must be given", "true")
    assert found["maybe.second"].meaning == found["maybe.first"].meaning == "two of a kind, told together."
    assert [key.path for key in keys(Outer, told=(Inner,))] == ["one", "parts[]", "named.NAME", "maybe", "silent"]
    assert documented(Inner)["second"][0] == "[text, …]"


@dataclasses.dataclass(frozen=True)
class Plain:
    """One way."""

    name: Literal["plain"] = "plain"
    """The way that is taken."""
    speed: int = 1
    """So fast it goes."""


@dataclasses.dataclass(frozen=True)
class Fancy:
    """The other way."""

    name: Literal["fancy"] = "fancy"
    """The way."""
    speed: int = 2
    """So fast it runs."""
    colour: str = "red"
    """It has this colour."""


@dataclasses.dataclass(frozen=True)
class Chosen(Plain):
    """Keys of a parent are there too."""

    way: Plain | Fancy = Plain()


def test_keys_of_a_parent_and_of_a_choice():
    assert [dataclasses.astuple(key) for key in keys(Chosen)] == [
        ("name", "plain", "plain", "The way that is taken."),
        ("speed", "whole number", "1", "So fast it goes."),
        ("way.name", "plain | fancy", "plain", "The way that is taken."),
        ("way.speed", "whole number", "1", "plain: So fast it goes."),
        ("way.speed", "whole number", "2", "fancy: So fast it runs."),
        ("way.colour", "text", "red", "fancy: It has this colour."),
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_every_key_says_in_a_sentence_what_it_does(verb):
    """It is printed alone, in `jaxmerge VERB --help` and in docs/config.md."""
    for key in (key for settings in VERBS[verb].settings for key in keys(settings)):
        assert key.meaning, key.path
        assert key.meaning.endswith((".", ").")), key
        assert not key.meaning.startswith("Of "), key
        assert len(key.meaning.split()) > 2, key


def test_the_document_has_the_keys_of_every_verb():
    told = {settings for settings, _ in ABOUT.values()}
    assert {settings for verb in VERBS.values() for settings in verb.settings} - told == {Place, Result, Experiment}


def test_the_document_is_of_today():
    """After a change of the settings: python -m train.cli.keys."""
    assert WRITTEN.read_text() == page()


def test_every_key_of_the_loop_is_there():
    listed = set(re.findall(r"^\| `([^`]+)`", WRITTEN.read_text(), re.MULTILINE))
    for field in dataclasses.fields(Improve):
        assert any(re.match(rf"{field.name}\b", path) for path in listed), field.name
    assert {"sft.micro_batch", "sft.lora.rank", "sft.watch.sinks", "merge.alpha", "sweep.rows"} <= listed
