"""Heads that are tied to an embedding, under the names that each family of models gives the two.

A head is tied where one array is both: the model has no head of its own, or has the same one stored twice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxmerge.files.checkpoints.classes import says_head
from jaxmerge.files.checkpoints.safetensors import NotHere
from jaxmerge.files.checkpoints.source import BLOCK_BYTES, Source, Tensor

TIE = "tie_word_embeddings"
# The embedding's name on disk, and its head's; {p} is what stands before both. The first that fits counts.
FAMILIES = (
    (r"(?P<p>.*?)model\.((language_model|text_model|decoder)\.)?embed_tokens\.weight", "{p}lm_head.weight"),
    (r"((language_model|text_model|decoder)\.)?embed_tokens\.weight", "lm_head.weight"),
    (r"(transformer\.)?(wte|word_embeddings|tokens_embed)\.weight", "lm_head.weight"),
    (r"(gpt_neox\.)?embed_in\.weight", "embed_out.weight"),
    (r"(model\.)?tok_embeddings\.weight", "output.weight"),
    (r"transformer\.embedding\.word_embeddings\.weight", "transformer.output_layer.weight"),
    (r"backbone\.embeddings?\.weight", "lm_head.weight"),
    (r"rwkv\.embeddings\.weight", "head.weight"),
    (r"shared\.weight", "lm_head.weight"),
    (r"(bert|electra|distilbert|mpnet)\.embeddings\.word_embeddings\.weight", "cls.predictions.decoder.weight"),
    (r"(roberta|xlm-roberta|camembert|esm)\.embeddings\.word_embeddings\.weight", "lm_head.decoder.weight"),
)  # fmt: skip


def find_embedding(names: Collection[str]) -> tuple[str, str] | None:
    """Return the embedding of a model and the name that its head has or would have; None without an embedding.

    Example:
      >>> find_embedding(["transformer.wte.weight", "transformer.wpe.weight"])
      ('transformer.wte.weight', 'lm_head.weight')
    """
    for pattern, head in FAMILIES:
        for name in names:
            if found := re.fullmatch(pattern, name):
                return name, head.format(**found.groupdict())
    return None


def is_head(name: str) -> bool:
    """Say whether a tensor has the name of a head over the vocabulary in any family."""
    heads = {head.removeprefix("{p}") for _, head in FAMILIES}
    return any(name == head or name.endswith(f".{head}") for head in heads)


def tied_pair(source: Source) -> tuple[str, str] | None:
    """Return embedding and head where the head is the embedding: the model has none, though its class has one.

    A model without a config.json is taken at its word: it has no head.
    """
    found = find_embedding(source.tensors)
    config = source.config
    headless = bool(config.get("architectures")) and not says_head(config)
    if found is None or found[1] in source.tensors or headless or not _says_tied(config, bool(config)):
        return None
    return found


def _says_tied(config: Mapping[str, Any], default: bool) -> bool:
    text = config.get("text_config") or {}
    return bool(config.get(TIE, text.get(TIE, default)))


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that says, wherever it says anything of it, that the head is not the embedding."""
    text = config.get("text_config")
    inner = {"text_config": {**text, TIE: False}} if isinstance(text, Mapping) and TIE in text else {}
    return {**config, TIE: False, **inner}


def drop_tied_head(name: str, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Take a head that the config ties to the embedding out of `tensors`: it is the same and written only once.

    Returns:
      A note where it had been stored twice.

    Raises:
      ValueError: head and embedding differ, so one of them would be lost.
    """
    found = find_embedding(tensors)
    if found is None or found[1] not in tensors or not _says_tied(config, default=False):
        return ()
    embedding, head = found
    try:
        same = have_same_bits(tensors[head], tensors[embedding])
    except NotHere:
        del tensors[head]
        return (f"{name}: config.json says that {head} is the embedding; whether it is, is seen where both are read",)
    if not same:
        raise ValueError(
            f"{name}: config.json says {TIE}, but {head} differs from {embedding}; set it to false to merge both, or "
            "remove the head"
        )
    del tensors[head]
    return (f"{name}: {head} is tied to the embedding and stored twice; written once",)


def have_same_bits(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are of one dtype and shape and hold the same bits; they are read a chunk at a time."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = BLOCK_BYTES if a.chunked and b.chunked else max(a.size, 1)
    left, right = np.empty((2, min(step, a.size)), np.uint8)
    for start in range(0, a.size, step):
        count = min(step, a.size - start)
        a.read_into(left[:count], start)
        b.read_into(right[:count], start)
        if not np.array_equal(left[:count], right[:count]):
            return False
    return True
