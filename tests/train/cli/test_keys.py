"""docs/config.md: every key there is, as the settings say it."""

import dataclasses
import re
from typing import Literal

from helpers import ROOT

from train.cli.keys import documented, keys, page
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


def test_the_document_is_of_today():
    """After a change of the settings: python -m train.keys."""
    assert WRITTEN.read_text() == page()


def test_every_key_of_the_loop_is_there():
    listed = set(re.findall(r"^\| `([^`]+)`", WRITTEN.read_text(), re.MULTILINE))
    for field in dataclasses.fields(Improve):
        assert any(re.match(rf"{field.name}\b", path) for path in listed), field.name
    assert {"sft.micro_batch", "sft.lora.rank", "sft.watch.sinks", "merge.alpha", "sweep.rows"} <= listed
