r"""The key `tokenizer` of a recipe, typed and checked: which vocabulary the result has, and where rows come from.

    tokenizer:
      source: union              # every token of every model | base: that model's | a path: that tokenizer's
      tokens:                    # optional: where the rows of some tokens come from
        <|im_start|>: {source: path/of/model, force: true}
        <|pad|>: {source: {kind: zero}}
        <|new|>: {source: {kind: model_token, model: path/of/model, token: <s>}}     # or token_id: 1
      pad_to_multiple_of: 64     # rows after the last token, each the mean of the others

`tokenizer_source: union` is the same as `tokenizer: {source: union}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmerge.files.grammar import model_name


@dataclasses.dataclass(frozen=True)
class Row:
    """Where a token's row comes from: zero (no model), the same token of a model, or another one of it."""

    model: str | None
    token: str | None = None
    token_id: int | None = None


@dataclasses.dataclass(frozen=True)
class Setting:
    """What `tokens` says of one token: source of its row for models that lack it; for all with force."""

    source: Row | None
    force: bool


@dataclasses.dataclass(frozen=True)
class Options:
    """The checked key `tokenizer` of a recipe."""

    source: str = "union"
    tokens: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The models that `tokens` names; all must be among those of the recipe."""
        named = [setting.source.model for setting in self.tokens.values() if setting.source is not None]
        return tuple(dict.fromkeys(name for name in named if name is not None))


def parse(value: Any) -> Options:
    """Check the value of `tokenizer` (a mapping) or `tokenizer_source` (a string); no file is touched."""
    if (isinstance(value, str) and value) or _is_model(value):
        return Options(model_name(value, "tokenizer_source"))
    found = _mapping(value, "'tokenizer'", ("source", "tokens", "pad_to_multiple_of"))
    source, padding = found.get("source", "union"), found.get("pad_to_multiple_of")
    if _is_model(source):
        source = model_name(source, "source of 'tokenizer'")
    if not isinstance(source, str) or not source:
        raise ValueError(f"source of 'tokenizer' is {source!r}, wanted union, base, or the path of a model")
    if padding is not None and (not isinstance(padding, int) or isinstance(padding, bool) or padding < 1):
        raise ValueError(f"pad_to_multiple_of is {padding!r}, wanted a whole number from 1")
    tokens = found.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise ValueError(f"tokens of 'tokenizer' is {tokens!r}, wanted a mapping of token to {{source, force}}")
    return Options(source, {str(token): _setting(str(token), of) for token, of in tokens.items()}, padding)


def _setting(token: str, value: Any) -> Setting:
    found = _mapping(value or {}, f"token {token!r}", ("source", "force"))
    force, source = found.get("force", False), found.get("source")
    if not isinstance(force, bool):
        raise ValueError(f"force of token {token!r} is {force!r}, wanted true or false")
    if source is None and force:
        raise ValueError(f"token {token!r} has force without a source; name the model its row comes from")
    return Setting(None if source is None else _row(token, source), force)


def _row(token: str, value: Any) -> Row:
    if isinstance(value, str) or _is_model(value):
        return Row(model_name(value, f"the source of token {token!r}"))
    found = _mapping(value, f"the source of token {token!r}", ("kind", "model", "token", "token_id"))
    kind, model = found.get("kind"), found.get("model")
    if kind == "zero" and set(found) == {"kind"}:
        return Row(None)
    if kind != "model_token" or not isinstance(model, str):
        raise ValueError(
            f"the source of token {token!r} is {dict(found)}, wanted a model, {{kind: zero}}, or "
            "{kind: model_token, model: …, token: …}"
        )
    if ("token" in found) == ("token_id" in found):
        raise ValueError(f"the source of token {token!r} must give either 'token' or 'token_id'; found {dict(found)}")
    row = Row(model, found.get("token"), found.get("token_id"))
    if not isinstance(row.token if "token" in found else row.token_id, str if "token" in found else int):
        raise ValueError(f"the source of token {token!r}: token is a string and token_id a number; found {dict(found)}")
    return row


def _is_model(value: Any) -> bool:
    """Whether a mapping is the name of a model, as mergekit writes it too: {model: {path: …}} or {path: …}."""
    return isinstance(value, Mapping) and "kind" not in value and ("model" in value or "path" in value)


def _mapping(value: Any, what: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {value!r}, wanted a mapping with {', '.join(keys)}")
    for key in value:
        if key not in keys:
            raise ValueError(f"unknown key {key!r} of {what}; there are {', '.join(keys)}")
    return value
