"""Text to token ids and back, and chats to text: the `tokenizers` library without transformers.

Importing transformers costs seconds; what a language model needs of it is a tokenizer.json, a few special
tokens and a Jinja template, rendered in the same sandbox.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxmerge.files import documents
from jaxmerge.files.checkpoints import gguf_tokenizer

from ..log import UserError, mistakes
from .template import MARKS, compiled, one_line

if TYPE_CHECKING:
    import tokenizers


DATE = "26 Jul 2024"
"""What Llama 3's chat template prints where it is told no date."""


LEADS = ("\n", "a", ".", ":")
"""Texts to tokenise a text behind, so that it is tokenised as one that goes on."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    Attributes:
      backend: of the `tokenizers` library.
      special: the named special tokens there are, such as {"eos_token": "<|im_end|>"}.
      chat_template: Jinja source, or None for a base model.
      eos_ids: any of these ends a text; the model's own list where it has one, else the `eos_token`.
      attributes: what tokenizer_config.json said beyond that, written back by `save`.
      date: what a chat template that asks for today's date (`strftime_now`) is told. A run keeps one.

    Example:
      >>> tokenizer = Tokenizer.from_folder("smollm2/")  # doctest: +SKIP
      >>> tokenizer.decode(tokenizer.encode("1 + 1 ="))  # doctest: +SKIP
      '1 + 1 ='
    """

    backend: tokenizers.Tokenizer
    special: Mapping[str, str]
    chat_template: str | None = None
    eos_ids: tuple[int, ...] = ()
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    date: datetime.date = dataclasses.field(default_factory=datetime.date.today)

    def __post_init__(self):
        unknown = [f"{name} {token!r:.60}" for name, token in self.special.items() if self._id(token) is None]
        if unknown:
            raise UserError(f"tokenizer: {', '.join(unknown)} not in its vocabulary of {self.vocab_size} tokens")
        if not self.eos_ids and "eos_token" in self.special:
            object.__setattr__(self, "eos_ids", (self._id(self.special["eos_token"]),))

    # --- making one ---

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read tokenizer.json and, where present, its config, special tokens and chat template."""
        import tokenizers

        folder = pathlib.Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise UserError(
                f"{path}: no such file; where there is only a tokenizer.model or a vocab.json, make it with"
                " transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            )
        with mistakes():
            text = documents.read_text(path)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer ({one_line(error)})") from error
        backend.no_truncation()  # a length some trainer left in the file would cut texts in silence
        backend.no_padding()
        attributes = _read_object(folder / "tokenizer_config.json")
        # Then special tokens that a text spells are ordinary text; tokenizer.json has no place for this.
        backend.encode_special_tokens = bool(attributes.get("split_special_tokens", False))
        named = {**_read_object(folder / "special_tokens_map.json"), **attributes}
        special = {name: _content(named[name], f"{folder}: {name}") for name in SPECIAL if named.get(name)}
        template = attributes.pop("chat_template", None)
        if (folder / "chat_template.jinja").exists():
            with mistakes():
                template = documents.read_text(folder / "chat_template.jinja")
        return cls(backend, special, _one_template(template, folder), attributes=attributes)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, source) -> Tokenizer:
        """Rebuild a tokenizer from the metadata of a GGUF file."""
        import tokenizers

        try:
            gguf_tokenizer.check_tokenizer(metadata, source=source)
        except ValueError as error:
            raise UserError(str(error)) from error
        try:
            special = gguf_tokenizer.special_tokens(metadata)
            backend = tokenizers.Tokenizer.from_str(json.dumps(gguf_tokenizer.tokenizer_json(metadata)))
        except KeyError as error:
            raise UserError(f"{source}: the metadata lack {error}, so there is no tokenizer in the file") from error
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{source}: not a tokenizer ({one_line(error)})") from error
        return cls(backend, special, metadata.get("tokenizer.chat_template"))

    # --- text and ids ---

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text. Special tokens written in the text count as such.

        Args:
          special: begin with what the tokenizer puts before a text by itself, such as a BOS, unless the text begins
            with it. What it would put behind a text is left out: what is encoded here goes on.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        opening = list(self.opening) if special else []
        return ids if ids[: len(opening)] == opening else opening + ids

    def join(self, *pieces: str, special: bool = False) -> list[list[int]]:
        """Token ids of texts that follow each other, such as a prompt and its completion, a list for each.

        All are tokenised as one text, which is split where each ends. Where a token lies across a seam, what comes
        before keeps the tokens that it has alone (as in a prompt that a model is given), and what follows has tokens
        of its own that go on from it, without the space that many tokenizers put before a text.

        Args:
          special: as for `encode`.

        Example:
          >>> prompt, completion = tokenizer.join("1 + 1 =", " 2", special=True)  # doctest: +SKIP
          >>> tokenizer.decode_after(completion)  # doctest: +SKIP
          ' 2'
        """
        wholes = [self.encode("".join(pieces[:n]), special=special) for n in range(1, len(pieces) + 1)]
        if all(wholes[-1][: len(ids)] == ids for ids in wholes):
            starts = [0, *map(len, wholes)]
            return [wholes[-1][a:b] for a, b in itertools.pairwise(starts)]
        parts, before = [wholes[0]], list(wholes[0])
        for piece, whole in zip(pieces[1:], wholes[1:], strict=True):
            parts.append(self._follow(before, piece, self.decode(whole, special=True)))
            before += parts[-1]
        return parts

    def _follow(self, before: list[int], piece: str, wanted: str) -> list[int]:
        """Token ids of a piece that, behind those before it, give the wanted text; as it has them alone if none do."""
        for lead in ("", *LEADS):
            head, whole = self.encode(lead), self.encode(lead + piece)
            ids = whole[len(head) :]
            if whole[: len(head)] == head and self.decode([*before, *ids], special=True) == wanted:
                return ids
        return self.encode(piece)

    def close(self, ids: Sequence[int]) -> list[int]:
        """Token ids of a completion with the end of a text behind them; once, where they have it already.

        Blanks behind an end that is there (a template's newline) are left out.
        """
        last = max((i for i, token in enumerate(ids) if token in self.eos_ids), default=None)
        if last is not None and not self.decode(ids[last + 1 :], special=True).strip():
            return list(ids[: last + 1])
        return [*ids, self.eos_ids[0]]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids; special tokens are left out unless `special`."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    def decode_after(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids that follow others, such as a completion's.

        Some decoders take a space from the beginning of a text; what follows a text keeps it.
        """
        lead, before = self._lead
        text = self.decode([*lead, *ids], special=special)
        return text[len(before) :] if text.startswith(before) else self.decode(ids, special=special)

    def begins_text(self, before: Sequence[int]) -> bool:
        """Whether what follows these token ids begins a text to the tokenizer: a space put there is its own.

        It does behind a BOS alone, and to many tokenizers behind every special token.
        """
        special = self.special_tokens.values()
        return all(id in special for id in before) or (before[-1] in special and self._begins_anew)

    @functools.cached_property
    def _begins_anew(self) -> bool:
        for token, id in self.special_tokens.items():
            ids = self.encode(f"a{token}a")
            if id in ids:
                return ids[ids.index(id) + 1 :] == self.encode("a")
        return False

    @functools.cached_property
    def _lead(self) -> tuple[list[int], str]:
        """Token ids to put before those that follow a text, with their text; none where that changes nothing."""
        lead, more = self.encode("a"), self.encode(" a")
        before = self.decode(lead)
        # Without a decoder the library puts a space between any two tokens, which is in no text.
        plain = self.backend.decoder is None or self.decode([*lead, *more]) == before + self.decode(more)
        return ([], "") if plain else (lead, before)

    @functools.cached_property
    def opening(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text by itself: a BOS, or nothing."""
        for text in ("a", "0"):
            if self.backend.encode(text, add_special_tokens=False).ids:
                found = self.backend.encode(text)
                pairs = zip(found.ids, found.special_tokens_mask, strict=True)
                return tuple(id for id, _ in itertools.takewhile(lambda pair: pair[1], pairs))
        return ()

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Tokens that `decode` leaves out, with their ids."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special and token.content}

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows an embedding needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def pad_id(self) -> int | None:
        return self._id(self.special["pad_token"]) if "pad_token" in self.special else None

    def id_of(self, name: str) -> int:
        """Id of a special token by its name, such as "bos_token"."""
        id = self._id(self.special[name])
        assert id is not None, "checked when it is made"
        return id

    def _id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    # --- chats ---

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables) -> str:
        """Render messages [{"role": …, "content": …}, …] with the chat template, as transformers does.

        Args:
          add_generation_prompt: end with the opening of an answer.
          variables: further names the template reads.
        """
        return self._render(messages, marks=False, add_generation_prompt=add_generation_prompt, **variables)

    def chat_to_continue(self, messages: Sequence[Mapping[str, Any]], **variables) -> str:
        """Render messages up to the end of what the last one says: its turn stays open, and the model goes on with it.

        As transformers does with `continue_final_message`.
        """
        said = str(messages[-1]["content"])
        if not said.strip():
            return self.chat(messages[:-1], True, **variables) + said
        text = self._render(messages, marks=False, add_generation_prompt=False, **variables)
        start = text.rfind(said.strip())
        if start < 0:
            raise UserError(f"the chat template does not show the last message as it is ({said[:40]!r})")
        # Templates that strip what is said have shown it without the spaces at its end.
        whole = text.startswith(said.lstrip(), start)
        return text[: start + len(said.lstrip() if whole else said.strip())]

    @property
    def marks_generation(self) -> bool:
        """Whether the chat template says itself what an assistant wrote: `{% generation %}…{% endgeneration %}`."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.chat_template or "") is not None

    def chat_spans(self, messages: Sequence[Mapping[str, Any]], **variables) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation, and where in the text the template says that an assistant wrote (start, end)."""
        for i, message in enumerate(messages):
            if any(mark in str(message.get("content", "")) for mark in MARKS):
                raise UserError(f"message {i} holds the private character U+F8FE or U+F8FF; take it out")
        marked = self._render(messages, marks=True, add_generation_prompt=False, **variables)
        pieces, spans, length, start = re.split(f"([{''.join(MARKS)}])", marked), [], 0, 0
        for piece in pieces:
            if piece == MARKS[0]:
                start = length
            elif piece == MARKS[1]:
                spans.append((start, length))
            else:
                length += len(piece)
        return "".join(p for p in pieces if p not in MARKS), spans

    def _render(self, messages: Sequence[Mapping[str, Any]], *, marks: bool, **variables) -> str:
        """Fill the template; a special token that ends a message and that the template writes too stands there once."""
        text = self._fill(messages, marks=marks, **variables)
        once = [self._once(message, text) for message in messages]
        return text if once == [dict(m) for m in messages] else self._fill(once, marks=marks, **variables)

    def _once(self, message: Mapping[str, Any], text: str) -> dict[str, Any]:
        """A message without the special token at its end that stands twice where a template rendered it."""
        said = message.get("content")
        said = said.rstrip() if isinstance(said, str) else ""
        token = next((token for token in self.special_tokens if said.endswith(token)), None)
        twice = token and re.search(rf"{re.escape(said.lstrip())}[\s{''.join(MARKS)}]*{re.escape(token)}", text)
        return {**message, "content": said.removesuffix(token or "")} if twice else dict(message)

    def _fill(self, messages: Sequence[Mapping[str, Any]], *, marks: bool, **variables) -> str:
        if self.chat_template is None:
            raise UserError("this tokenizer has no chat template; give a few-shot prompt instead of a chat")
        given = {"messages": [dict(m) for m in messages], "tools": None, "documents": None, **self.special}
        given["strftime_now"] = lambda form: self.date.strftime(form)
        try:
            return compiled(self.chat_template, marks).render(**{**given, **variables})
        except Exception as error:  # whatever a stranger's template does
            raise UserError(f"the chat template refuses these messages: {one_line(error)}") from error

    @property
    def asks_date(self) -> bool:
        """Whether the chat template asks for today's date."""
        return "strftime_now" in (self.chat_template or "")

    # --- fitting a model, and writing ---

    def fitted(
        self, *, vocab_size: int, eos_ids: Sequence[int] = (), source: str | os.PathLike[str] = "tokenizer"
    ) -> Tokenizer:
        """Check against a model and take over its EOS ids; raises a UserError naming both sizes.

        Args:
          vocab_size: rows of the model's embedding; it may have more than the tokenizer has tokens.
          eos_ids: the model's own, which win over the tokenizer's `eos_token`; () where it names none.
        """
        if self.vocab_size > vocab_size:
            raise UserError(
                f"{source}: the tokenizer has {self.vocab_size} tokens, the model's vocab_size is {vocab_size};"
                " they do not belong together"
            )
        if outside := [i for i in eos_ids if not 0 <= i < vocab_size]:
            raise UserError(f"{source}: EOS id {outside[0]} is none of the model's, whose vocab_size is {vocab_size}")
        fitting = dataclasses.replace(self, eos_ids=tuple(eos_ids) or self.eos_ids)
        if not fitting.eos_ids:
            raise UserError(
                f"{source}: neither the model (vocab_size {vocab_size}) nor the tokenizer ({self.vocab_size}"
                " tokens) names an end-of-sequence token; set eos_token in tokenizer_config.json"
            )
        return fitting

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

        transformers' AutoTokenizer reads them and gives the same ids; `folder` must exist.
        """
        folder = pathlib.Path(folder)
        self.backend.save(str(folder / "tokenizer.json"))
        # The one class name that transformers 4 and 5 both read as: do what tokenizer.json says.
        plain = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config = {**plain, **self.attributes, **self.special}
        for name, value in (("tokenizer_config", config), ("special_tokens_map", dict(self.special))):
            text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    from .hf import read_json

    return read_json(path)


def _content(token: Any, where: str) -> str:
    """A special token stands as a string, or as an object with its settings; `where` names it in errors."""
    found = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(found, str):
        raise UserError(f"{where} is {documents.shown(token)}; expected a token, or an object with its content")
    return found


def _one_template(template, folder) -> str | None:
    """Older tokenizers hold a list of named templates; the one called default is meant."""
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        if "default" not in named:
            raise UserError(f"{folder}: chat templates {sorted(named)!r:.200}, none called 'default'")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder}: the chat template is {documents.shown(template)}; expected text")
    return template
