r"""Gates: the rows of a router, one for each expert and layer, made of prompts or at random.

A router gives expert e the score $g_e^\top h$, where h is what enters the layer's MLP. A gate made of prompts points
from the states that the base model has for the negative prompts to those it has for the positive ones:

$$g = \frac{a(P) - a(N)}{\lVert a(P) - a(N) \rVert}$$

Where a(P) is, by `gate_mode`, over the prompts of P, each with the tokenizer's BOS token in front:

  hidden, hidden_last   the mean of the states of the last tokens as they enter layer l
  hidden_avg            the mean over prompts of the mean over a prompt's tokens of these states
  cheap_embed           $s / \lVert s \rVert$ of the sum s of the embeddings of all tokens, alike in every layer

`random` is normal with variance 1, `uniform_random` is uniform in $\pm 1/\sqrt{D}$. A random row depends on the seed,
the layer and the expert's number alone.

References:
  mergekit-moe, https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge import install
from jaxmerge.files.checkpoints.source import Source
from jaxmerge.files.documents import parse_json
from jaxmerge.files.rows import take

SMALLEST = 1e-8
PARALLEL = 5.0  # the condition number of a layer's gates above which some experts would hardly be used
States = Callable[[Source, Sequence[Sequence[int]], bool], np.ndarray]
"""(model, tokens of P prompts, whether over all tokens) → [P, L, D]: the mean of what enters each layer over a prompt's
tokens, else the last token's."""
Prompts = Sequence[tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]]
"""Of each expert the tokens of its positive and of its negative prompts."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What gates are made of: the base model, of [L, D] layers and width, and the experts' prompts as tokens."""

    base: Source
    layers: int
    width: int
    prompts: Prompts
    count: int
    seed: int
    states: States | None


@dataclasses.dataclass(frozen=True)
class Gate:
    """A gate_mode. make: gives the gates [L, E, D]. prompts: it needs some. states: it needs a forward pass."""

    make: Callable[[Asked], np.ndarray]
    prompts: bool = True
    states: bool = False


def _hidden(asked: Asked, *, average: bool) -> np.ndarray:
    assert asked.states is not None
    flat = [tokens for pair in asked.prompts for part in pair for tokens in part]
    found = iter(np.asarray(asked.states(asked.base, flat, average), np.float32))

    def mean(part: Sequence[Sequence[int]]) -> np.ndarray | float:
        return np.mean([next(found) for _ in part], axis=0) if part else 0.0

    rows = [mean(positive) - mean(negative) for positive, negative in asked.prompts]
    return _normalised(np.stack([np.asarray(row) for row in rows], axis=1))


def _embedded(asked: Asked) -> np.ndarray:
    embedding = asked.base.tensors["model.embed_tokens.weight"]

    def direction(part: Sequence[Sequence[int]]) -> np.ndarray:
        numbers = np.asarray([token for tokens in part for token in tokens], int)
        return _normalised(take(embedding, numbers).astype(np.float32).sum(0)) if part else np.zeros(asked.width)

    rows = [direction(positive) - direction(negative) for positive, negative in asked.prompts]
    return np.broadcast_to(_normalised(np.stack(rows)), (asked.layers, asked.count, asked.width))


def _normalised(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), SMALLEST)


def _drawn(asked: Asked, draw: Callable[[jax.Array], Any]) -> np.ndarray:
    layers = [[draw(key_of(asked.seed, l, e)) for e in range(asked.count)] for l in range(asked.layers)]
    return np.asarray(layers, np.float32)


def _normal(asked: Asked) -> np.ndarray:
    return _drawn(asked, lambda key: np.asarray(jax.random.normal(key, (asked.width,))))


def _uniform(asked: Asked) -> np.ndarray:
    edge = asked.width**-0.5
    return _drawn(asked, lambda key: np.asarray(jax.random.uniform(key, (asked.width,), minval=-edge, maxval=edge)))


def _last(asked: Asked) -> np.ndarray:
    return _hidden(asked, average=False)


def _mean(asked: Asked) -> np.ndarray:
    return _hidden(asked, average=True)


GATES: dict[str, Gate] = {
    "hidden": Gate(_last, states=True),
    "hidden_avg": Gate(_mean, states=True),
    "hidden_last": Gate(_last, states=True),
    "cheap_embed": Gate(_embedded),
    "random": Gate(_normal, prompts=False),
    "uniform_random": Gate(_uniform, prompts=False),
}


def key_of(seed: int, layer: int, expert: int, part: int = 0) -> jax.Array:
    """Return the key of what is drawn for an expert of a layer; part 0 is its gate, others are its matrices."""
    key = jax.random.key(seed, impl="threefry2x32")
    for number in (layer, expert, part):
        key = jax.random.fold_in(key, number)
    return key


def check_states(mode: str, base: str, states: States | None) -> None:
    """Raise if a gate_mode needs a forward pass and there is nothing that makes one."""
    if GATES[mode].states and states is None:
        raise ValueError(
            f"gate_mode: {mode} runs {base} on the prompts, for which the extra 'train' has the decoder: "
            f"{install.extra('train')}, then `jaxmerge merge` (from Python give states=); gate_mode: cheap_embed and "
            "gate_mode: random run no model"
        )


def tokens_of(base: Source, texts: Sequence[str], vocabulary: int) -> list[list[int]]:
    """Return the tokens of prompts, each behind the BOS token where the tokenizer names one.

    Raises:
      ValueError: the model has no tokenizer.json, or a prompt has no token, or one that the embedding lacks.
    """
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            f"prompts are read with the tokenizer of {base.name}, for which the package tokenizers is missing: "
            f"{install.extra('train')}; gate_mode: random reads none"
        ) from None
    files = base.companions()
    if "tokenizer.json" not in files:
        raise ValueError(
            f"{base.name} has no tokenizer.json, which prompts need; save it there, or write gate_mode: random"
        )
    try:
        backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{base.name}: tokenizer.json is no tokenizer: {' '.join(str(error).split())}") from error
    backend.no_truncation()
    backend.no_padding()
    front = _bos(files, base.name)
    found = [backend.encode(front + text, add_special_tokens=False).ids for text in texts]
    for text, ids in zip(texts, found, strict=True):
        if not ids or max(ids) >= vocabulary:
            what = f"token {max(ids)}, and the embedding has {vocabulary} rows" if ids else "no token"
            raise ValueError(f"prompt {text!r:.60} has {what} in the tokenizer of {base.name}; write another prompt")
    return found


def _bos(files: Mapping[str, bytes], where: str) -> str:
    names = ("special_tokens_map.json", "tokenizer_config.json")
    named: dict[str, Any] = {}
    for name in names:
        named |= parse_json(files[name], f"{where}: {name}") if name in files else {}
    token = named.get("bos_token") or ""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token)


def parallel_notes(gates: np.ndarray) -> list[str]:
    """Say in which layers the gates [L, E, D] point nearly the same way: some experts would hardly be used."""
    layers = [l for l, rows in enumerate(gates) if len(rows) > 1 and np.linalg.cond(rows) > PARALLEL]
    if not layers:
        return []
    where = "in every layer" if len(layers) == len(gates) else f"in layers {json.dumps(layers)[1:-1]}"
    return [f"gates point nearly the same way {where}: some experts will hardly be used; give more unlike prompts"]
