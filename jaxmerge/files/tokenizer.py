r"""A tokenizer as its files: which token has which id, and the same files with tokens added or taken out.

Worked on the JSON of the `tokenizers` library itself, so no library is needed and nothing it does not know is lost.
An added token's id is not what tokenizer.json says: the library gives a token that its model knows the model's id,
and another one the next free id, in the order of the file. That is followed here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from jaxmerge.files.checkpoints.beside import is_tokenizer, is_vocabulary
from jaxmerge.files.documents import parse_json

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Under which key a model of several parts describes its language model.
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
# Keys of configs that hold a token's id, of whatever part: eos_token_id, text_config.pad_token_id, image_token_index.
ID_KEY = re.compile(r"_token_(id|ids|index)$")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The tokenizer's files of one model, by name; tokenizer.json is among them. `where` is for messages."""

    where: str
    files: Mapping[str, bytes]

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """tokenizer.json."""
        return self._json("tokenizer.json")

    @functools.cached_property
    def of_model(self) -> dict[str, int]:
        """Token → id of the tokenizer's model, without what was added."""
        vocab = self.state["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: pairs of token and score, the id is the place
            return {token: i for i, (token, _) in enumerate(vocab)}
        return vocab

    @functools.cached_property
    def added(self) -> dict[str, dict[str, Any]]:
        """Added token → its entry in tokenizer.json, its id as the library gives it."""
        config, own = self._json("tokenizer_config.json"), self.of_model
        entries = list(self.state.get("added_tokens") or [])
        # The config may add more when it is loaded, and names those with a role; they count as special.
        more = config.get("added_tokens_decoder") or {}
        entries += [{**added_token(entry["content"]), **entry} for _, entry in sorted(more.items(), key=_number)]
        named = {**self._json("special_tokens_map.json"), **config}
        roles = [named[role] for role in SPECIAL if named.get(role)]
        contents = [role["content"] if isinstance(role, Mapping) else role for role in roles]
        entries += [added_token(content, special=True) for content in contents if content in own]
        found: dict[str, dict[str, Any]] = {}
        highest = -1
        for entry in entries:
            content = entry["content"]
            if content in found:
                continue
            number = own[content] if content in own else max(len(own), highest + 1)
            found[content] = {**entry, "id": number}
            highest = max(highest, number)
        return found

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token → id of all, in the order of ids."""
        both = {**self.of_model, **{content: entry["id"] for content, entry in self.added.items()}}
        return dict(sorted(both.items(), key=lambda pair: pair[1]))

    def without(self, unwanted: Container[str]) -> Tokenizer:
        """Return it without some tokens, and without the merges that need or make them."""
        model = dict(self.state["model"])
        if isinstance(model["vocab"], list):
            model["vocab"] = [pair for pair in model["vocab"] if pair[0] not in unwanted]
        else:
            model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in unwanted}
        if model.get("merges"):
            prefix = model.get("continuing_subword_prefix") or ""
            model["merges"] = [m for m in model["merges"] if not any(t in unwanted for t in _tokens_of(m, prefix))]
        kept = [entry for content, entry in self.added.items() if content not in unwanted]
        return self._with(model, kept)

    def adding(self, entries: Iterable[Mapping[str, Any]]) -> Tokenizer:
        """Return it with added tokens, those of new ids after all others; a token that is added already stays."""
        fresh = {entry["content"]: dict(entry) for entry in reversed(list(entries))}
        fresh = {content: fresh[content] for content in reversed(fresh) if content not in self.added}
        return self._with(self.state["model"], [*self.added.values(), *fresh.values()]) if fresh else self

    def _with(self, model: Mapping[str, Any], added: list[dict[str, Any]]) -> Tokenizer:
        state = {**self.state, "model": model, "added_tokens": added}
        config = self._json("tokenizer_config.json")
        config.pop("added_tokens_decoder", None)
        files = {name: content for name, content in self.files.items() if not is_vocabulary(name)}
        if config:
            files["tokenizer_config.json"] = _bytes(config)
        files["tokenizer.json"] = _bytes(state)
        # Ids as the library will give them, which is known only of the whole.
        state["added_tokens"] = sorted(Tokenizer(self.where, files).added.values(), key=lambda entry: entry["id"])
        return Tokenizer(self.where, {**files, "tokenizer.json": _bytes(state)})

    def _json(self, name: str) -> dict[str, Any]:
        return parse_json(self.files.get(name, b"{}"), f"{self.where}: {name}")


def from_files(companions: Mapping[str, bytes], where: str) -> Tokenizer | None:
    """Return the tokenizer among a checkpoint's companions, or None if they hold no tokenizer.json."""
    files = {name: content for name, content in companions.items() if is_tokenizer(name)}
    if "tokenizer.json" not in files:
        return None
    tokenizer = Tokenizer(where, files)
    vocab = (tokenizer.state.get("model") or {}).get("vocab")
    if not isinstance(vocab, Mapping | list):
        raise ValueError(f"{where}: tokenizer.json names no model with a vocabulary; save it again with transformers")
    return tokenizer


def renumbered(config: Mapping[str, Any], old: Tokenizer, new: Tokenizer) -> tuple[dict[str, Any], list[str]]:
    """Return a config.json or generation_config.json with the ids of tokens in another vocabulary.

    The config of its language model, if it has several parts, is renumbered with it.

    Returns:
      The config, and a note for each token that is not there any more.
    """
    names = {i: token for token, i in old.vocabulary.items()}
    notes: list[str] = []

    def number(key: str, i: Any) -> Any:
        # An id that is no token there, such as −1, says nothing of tokens.
        if isinstance(i, bool) or not isinstance(i, int) or i not in names:
            return i
        found = new.vocabulary.get(names[i])
        if found is None:
            notes.append(f"{old.where}: {key} names {names[i]!r}, which the result's tokenizer lacks; left out")
        return found

    def anew(part: Mapping[str, Any]) -> dict[str, Any]:
        changed = dict(part)
        for key, value in part.items():
            if key in TEXT_CONFIGS and isinstance(value, Mapping):
                changed[key] = anew(value)  # other parts, such as an audio codec, have ids of their own
            elif ID_KEY.search(key) and isinstance(value, list):
                changed[key] = [i for i in (number(key, i) for i in value) if i is not None]
            elif ID_KEY.search(key):
                changed[key] = number(key, value)
        return changed

    return anew(config), notes


def added_token(content: str, special: bool = False) -> dict[str, Any]:
    """An entry of `added_tokens` with the library's defaults; its id is given when it is added."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": -1, "content": content, **plain, "normalized": not special, "special": special}


def _tokens_of(merge: str | list[str], prefix: str) -> tuple[str, str, str]:
    """The two tokens of a merge, which the file holds as a pair or as one string, and the one they become."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right.removeprefix(prefix)


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])


def _bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
