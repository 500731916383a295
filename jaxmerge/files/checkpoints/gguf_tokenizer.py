"""Tokenizers in the metadata of GGUF files, and the tokenizer.json that each stands for, both ways.

A GGUF file has the tokens, and of byte-level BPE the merges, of SentencePiece's BPE a score for each token. How a text
is cut into words is not in the file: `tokenizer.ggml.pre` names code of llama.cpp. PRE_TOKENIZERS has what that code
does, in the words of tokenizer.json; so a name is found by what a tokenizer does, and not by what it is called.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens, by the numbers that the format gives them."""
NEVER_SPLIT = (UNKNOWN, CONTROL, USER_DEFINED)
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
TOKENIZERS = ("gpt2", "llama")
"""Kinds: byte-level BPE, and SentencePiece's BPE, under the names of the format."""
SPACE = "▁"
WAY_OUT = "export it as a Hugging Face folder and convert that with llama.cpp's convert_hf_to_gguf.py"


# --- how words are cut ---


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _words(digits: str) -> str:
    """The pattern that OpenAI's cl100k began, with the number of digits in a word."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclasses.dataclass(frozen=True)
class Pre:
    """What a name of `tokenizer.ggml.pre` stands for.

    steps: the pre-tokenizers, one after the other. normalizer: as the model's own tokenizer.json has it. whole: words
    that are tokens are not merged. bos: a BOS stands before a text where the file does not say.
    """

    steps: Sequence[Mapping[str, Any]]
    normalizer: Mapping[str, Any] | None = None
    whole: bool = False
    bos: bool = False


PRE_TOKENIZERS: dict[str, Pre] = {
    "smollm": Pre([{"type": "Digits", "individual_digits": True}, _byte_level(True)]),  # SmolLM 1 and 2
    "gpt-2": Pre([_byte_level(True)]),
    "llama-bpe": Pre([_split(_words(r"\p{N}{1,3}")), _byte_level(False)], whole=True, bos=True),  # Llama 3, SmolLM3
    "qwen2": Pre([_split(_words(r"\p{N}")), _byte_level(False)], {"type": "NFC"}),  # Qwen 2, 2.5 and 3
}


def plain_steps(pre_tokenizer: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without what changes no token id."""
    if pre_tokenizer is None:
        return []
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def find_pre(state: Mapping[str, Any]) -> str | None:
    """The name of what a tokenizer.json does before it merges; None if none here does that."""
    steps = plain_steps(state["pre_tokenizer"])
    whole = bool(state["model"].get("ignore_merges", False))
    for name, pre in PRE_TOKENIZERS.items():
        wanted = plain_steps({"type": "Sequence", "pretokenizers": list(pre.steps)})
        if (steps, state["normalizer"], whole) == (wanted, pre.normalizer, pre.whole):
            return name
    return None


# --- from metadata to tokenizer.json ---


def check_tokenizer(metadata: Mapping[str, Any], *, source: pathlib.Path | str) -> None:
    """Raise unless the tokenizer can be rebuilt."""
    kind = metadata.get("tokenizer.ggml.model")
    wanted = [("ggml.model", TOKENIZERS)] + ([] if kind == "llama" else [("ggml.pre", tuple(PRE_TOKENIZERS))])
    for key, known in wanted:
        if metadata.get(f"tokenizer.{key}") not in known:
            raise ValueError(
                f"{source}: tokenizer.{key} {metadata.get(f'tokenizer.{key}')!r} is not known; known: "
                f"{', '.join(known)}. Use the model's Hugging Face folder instead"
            )


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The tokens with a role, as tokenizer_config.json names them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    places = {role: f"tokenizer.ggml.{name}_token_id" for role, name in ROLES.items()}
    found = {}
    for role, place in places.items():
        if place in metadata:
            i = metadata[place]
            if type(i) is not int or not 0 <= i < len(tokens):
                raise ValueError(f"{place} is {i!r:.40}; expected the id of one of its {len(tokens)} tokens")
            found[role] = tokens[i]
    return found


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer.json of a file's metadata; `check_tokenizer` says whether there is one."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    pieces = metadata["tokenizer.ggml.model"] == "llama"
    vocabulary = {
        token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if not is_padding(token, kind, i)
    }
    body = _pieces(metadata, vocabulary) if pieces else _byte_level_bpe(metadata, vocabulary)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **plain, "special": kind != USER_DEFINED}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in NEVER_SPLIT
        ],
        **{key: body[key] for key in ("normalizer", "pre_tokenizer")},
        "post_processor": _opening(metadata),
        **{key: body[key] for key in ("decoder", "model")},
    }


def padding(i: int) -> str:
    """The name of a row of the embedding that is no token's."""
    return f"[PAD{i}]"


def is_padding(token: str, kind: int, i: int) -> bool:
    """Whether an entry only fills a row of the embedding."""
    return kind == UNUSED and token == padding(i)


def _model(vocabulary: Mapping[str, int], merges: list[list[str]], **more: Any) -> dict[str, Any]:
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **plain, **flags, **more, "vocab": dict(vocabulary), "merges": merges}


def _byte_level_bpe(metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, Any]:
    pre = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    steps = [
        {**step, "add_prefix_space": prefix} if prefix and step.get("use_regex") else dict(step) for step in pre.steps
    ]
    merges = [pair.split(" ") for pair in metadata.get("tokenizer.ggml.merges", ())]
    return {
        "normalizer": pre.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _model(vocabulary, merges, ignore_merges=pre.whole),
    }


def _pieces(metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, Any]:
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = metadata["tokenizer.ggml.scores"]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    normal = [i for i, kind in enumerate(kinds) if kind == NORMAL]
    known = {tokens[i]: i for i in normal}
    order = sorted(normal, key=lambda i: (-scores[i], i))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizers = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*normalizers, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders + strip},
        "model": _model(
            vocabulary,
            [pair for i in order for pair in halves(tokens[i], known)],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def halves(token: str, known: Mapping[str, int]) -> list[list[str]]:
    """Every pair of known tokens that a token can be merged of.

    Example:
      >>> halves("abc", {"a": 0, "bc": 1, "ab": 2, "abc": 3})
      [['a', 'bc']]
    """
    pairs = [(token[:n], token[n:]) for n in range(1, len(token))]
    found = [pair for pair in pairs if pair[0] in known and pair[1] in known]
    return [list(pair) for pair in sorted(found, key=lambda pair: (known[pair[0]], known[pair[1]]))]


def _opening(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Put a BOS before a text, and an EOS behind it, where the file says so."""
    spelt = metadata["tokenizer.ggml.tokens"]
    pieces = metadata["tokenizer.ggml.model"] == "llama"
    # What llama.cpp does where the file does not say.
    bos = pieces or PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]].bos
    wanted = [
        ("bos", metadata.get("tokenizer.ggml.add_bos_token", bos)),
        ("eos", metadata.get("tokenizer.ggml.add_eos_token", False)),
    ]
    places = {name: f"tokenizer.ggml.{name}_token_id" for name, add in wanted if add}
    ids = {name: metadata[place] for name, place in places.items() if place in metadata}
    if not ids:
        return None
    parts: dict[str, list[Any]] = {
        name: [{"SpecialToken": {"id": spelt[ids[name]], "type_id": 0}}] if name in ids else []
        for name in ("bos", "eos")
    }
    text = [{"Sequence": {"id": name, "type_id": int(name == "B")}} for name in "AB"]
    single = [*parts["bos"], text[0], *parts["eos"]]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *parts["bos"], text[1], *parts["eos"]],
        "special_tokens": {spelt[i]: {"id": spelt[i], "ids": [i], "tokens": [spelt[i]]} for i in ids.values()},
    }


# --- from tokenizer.json to metadata ---


def metadata_of(state: Mapping[str, Any], *, size: int, pre: str | None = None) -> dict[str, Any]:
    """The metadata that a tokenizer.json is rebuilt from: tokens, their types, merges or scores, and the words.

    Args:
      state: the tokenizer.json.
      size: rows of the embedding; those that are no token's get a name that no text has.
      pre: name of llama.cpp for how words are cut, where it is none of PRE_TOKENIZERS.

    Raises:
      ValueError: the format has no words for it; says what.
    """
    model = state["model"]
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}, and GGUF is written of BPE alone; {WAY_OUT}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ValueError(f"its {key} is {model[key]!r}, for which GGUF has no words; {WAY_OUT}")
    added = {token["id"]: token for token in state["added_tokens"]}
    names = {i: token for token, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    if max(names) >= size:
        raise ValueError(f"it has {max(names) + 1} tokens, and the model's vocab_size is {size}")
    tokens = [names.get(i, padding(i)) for i in range(size)]
    if len(set(tokens)) != size:
        raise ValueError("two of its tokens are spelt alike")
    kinds = [NORMAL if i in names else UNUSED for i in range(size)]
    for i, token in added.items():
        kinds[i] = CONTROL if token["special"] else USER_DEFINED
    steps = [step["type"] for step in plain_steps(state["pre_tokenizer"])]
    byte_level = "ByteLevel" in steps
    own = _of_bytes(state, pre) if byte_level else _of_pieces(state, tokens, kinds, pre)
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds, **own}


def _of_bytes(state: Mapping[str, Any], pre: str | None) -> dict[str, Any]:
    name = pre or find_pre(state)
    if name is None:
        raise ValueError(
            "how it cuts a text into words is none of those known here ("
            f"{', '.join(PRE_TOKENIZERS)}); give llama.cpp's name of it with pre=NAME, or {WAY_OUT}"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _of_pieces(state: Mapping[str, Any], tokens: list[str], kinds: list[int], pre: str | None) -> dict[str, Any]:
    """SentencePiece's BPE: merges are told by a score for each token, the sooner the higher."""
    model = state["model"]
    if not model.get("byte_fallback"):
        raise ValueError(f"it has neither byte-level words nor bytes to fall back on; {WAY_OUT}")
    prefix = _puts_space(state)
    unknown = model.get("unk_token")
    for i, token in enumerate(tokens):
        if token == unknown:
            kinds[i] = UNKNOWN
        elif kinds[i] == NORMAL and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kinds[i] = BYTE
    known = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == NORMAL}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    merges = [merge for merge in merges if "".join(merge) in known]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(map("".join, merges)))}
    wanted = {tuple(pair) for token in known for pair in halves(token, known)}
    ordered = [ranks["".join(merge)] for merge in merges]
    if ordered != sorted(ordered) or wanted != set(merges):
        raise ValueError(
            f"its merges do not follow from one score for each token, which is all that GGUF has; {WAY_OUT}"
        )
    last = len(ranks)
    named = {} if unknown not in tokens else {"tokenizer.ggml.unknown_token_id": tokens.index(unknown)}
    return {
        **named,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": pre or "default",
        "tokenizer.ggml.scores": [-float(ranks.get(token, last + i)) for i, token in enumerate(tokens)],
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _puts_space(state: Mapping[str, Any]) -> bool:
    """Whether it puts a space before a text; raises where it does other things to a text than the format has."""
    given = state["normalizer"]
    normalizers = [] if given is None else given["normalizers"] if given["type"] == "Sequence" else [given]
    steps = plain_steps(state["pre_tokenizer"])
    space = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    prepend = [{"type": "Prepend", "prepend": SPACE}]
    between = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if normalizers in (space, prepend + space) and steps in ([], [between]):
        return normalizers != space
    if not normalizers and len(steps) == 1 and steps[0]["type"] == "Metaspace":
        scheme, split = steps[0].get("prepend_scheme", "always"), steps[0].get("split", True)
        if steps[0].get("replacement") == SPACE and not split:
            return scheme != "never"
    found = ", ".join(part["type"] for part in [*normalizers, *steps]) or "nothing"
    raise ValueError(f"what it does to a text before it merges ({found}) is not what GGUF's kind llama does; {WAY_OUT}")
