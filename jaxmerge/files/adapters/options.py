"""The key `adapter` of a recipe: `adapter: core`, or a mapping with the rank of the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmerge.contract import Needs
from jaxmerge.files.adapters.spaces import SPACES
from jaxmerge.files.factors import Cut
from jaxmerge.files.methods import Method, known

KEYS = ("space", "rank", "explained", "ratio")
WHOLE = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template")
"""Keys of recipes of whole models."""


@dataclasses.dataclass(frozen=True)
class Options:
    """In which space adapters are merged, and to which rank the result is cut."""

    space: str
    cut: Cut


def parse(value: Any, document: Mapping[str, Any], name: str, method: Method) -> Options | None:
    """Check the key as YAML gives it; None where the recipe is of whole models.

    Args:
      value: of the key.
      document: the whole recipe.
      name, method: of its merge_method.

    Example:
      >>> parse({"space": "knots", "rank": 8}, {}, "linear", Method("average"))
      Options(space='knots', cut=Cut(rank=8, explained=None, ratio=None))
    """
    if value is None:
        return None
    if method.reads_base:
        raise ValueError(
            f"{name} reads the base's own values, which adapters do not have; merge the models as base+adapter, "
            "without the key 'adapter'"
        )
    if method.reads is not None:
        raise ValueError(
            f"{name} reads statistics of whole models; merge the models as base+adapter, without the key 'adapter'"
        )
    found = value if isinstance(value, Mapping) else {"space": value}
    for key in found:
        known(key, KEYS, "key of 'adapter'")
    known(found.get("space"), SPACES, "space of 'adapter'")
    try:
        options = Options(found["space"], Cut(**{key: found.get(key) for key in KEYS[1:]}))
    except ValueError as error:
        raise ValueError(f"adapter: {error}") from None
    if SPACES[options.space].one_rank and options.cut != Cut():
        raise ValueError(f"adapter: in the space {options.space!r} the result has the adapters' rank; leave rank out")
    for key in WHOLE:
        if document.get(key) is not None:
            raise ValueError(f"{key!r} is of whole models; leave it out of a recipe with 'adapter', or leave that out")
    return options


def check(names: Sequence[str], base: str | None, method: str, needs: Needs) -> None:
    """Raise unless a method takes so many adapters; the base, which is zero to them, is none of them."""
    if base in names:
        raise ValueError(f"base_model {base!r} stands among the models, which are adapters here; leave it out there")
    if len(names) < needs.least or (needs.most is not None and len(names) > needs.most):
        raise ValueError(f"{method} needs {needs}; found {len(names)} adapters: {list(names)}")
