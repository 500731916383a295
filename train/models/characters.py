"""The 64 symbols of the miniature and their tokenizer: one character, one token."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable

from ..log import UserError

PAD = "<pad>"
EOS = "\n"  # ends every example, and so stands before the next: beginning and end in one symbol

SYMBOLS: tuple[str, ...] = (
    PAD,
    EOS,
    *"0123456789",
    *"+-*/%=",
    *"?#,;:.<>()",
    *"abcdefghijklmnopqrstuvwxyz",
    *" ![]^_|&@~",
)
PAD_ID = SYMBOLS.index(PAD)
EOS_ID = SYMBOLS.index(EOS)

_ID = {symbol: i for i, symbol in enumerate(SYMBOLS)}


def encode(text: str) -> list[int]:
    """Turn text into token ids, one a character.

    Example:
      >>> decode(encode("12+7?"))
      '12+7?'
    """
    try:
        return [_ID[character] for character in text]
    except KeyError as error:
        raise UserError(
            f"tasks: {error.args[0]!r} in {text[:60]!r} is none of the {len(SYMBOLS)} symbols of the miniature:"
            f" {''.join(SYMBOLS[2:])}"
        ) from error


def decode(tokens: Iterable[int]) -> str:
    """Turn token ids into text; padding is left out."""
    return "".join(SYMBOLS[t] for t in tokens if t != PAD_ID)


def write_tokenizer(folder: str | os.PathLike[str]) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` loads.

    Word-level over single characters, no normaliser, no special tokens added; a character that is none of the
    symbols becomes padding, so callers check with `encode` first.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(dict(_ID), unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(PAD, normalized=False), AddedToken(EOS, normalized=False)])
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": PAD,
        "model_max_length": 96,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
