"""Several models on one mesh that decode as one: each has its weights and caches, and a formula joins their logits.

To the engine they are a config and parameters like any other. A config of one model is bound, cached and cast as it
always was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..log import UserError
from ..models import decoder
from ..models.config import ModelConfig
from ..models.decoder import Params
from ..models.open import Model, open_model
from ..models.tokenizer import Tokenizer
from .decodings import Decode

if TYPE_CHECKING:
    from .decodings import Formula


@dataclasses.dataclass(frozen=True, kw_only=True)
class Together(ModelConfig):
    """The config of MODEL with those of the models that decide beside it.

    Attributes:
      parts: MODEL's own config, then the others'.
      formula: of the logits of each.
      vocabulary: tokens that all have; logits past it are cut off.
    """

    parts: tuple[ModelConfig, ...]
    formula: Formula
    vocabulary: int

    @property
    def context(self) -> int:
        return min(part.context for part in self.parts)


class Parts:
    """The decoders of several models with the face of one: hidden states are a tuple, caches stand in a row."""

    def __init__(self, config: Together, params: Params):
        self.config, self.numbers = config, params["numbers"]
        self.decoders = [decoder.bind(part, params["models"][str(i)]) for i, part in enumerate(config.parts)]

    def __call__(self, tokens, positions, mask, caches=None, at=None, *, dtype=jnp.float32):
        states, after, start = [], [], 0
        for part, model in zip(self.config.parts, self.decoders, strict=True):
            end = start + part.num_hidden_layers
            mine = None if caches is None else caches[start:end]
            hidden, kvs = model(tokens, positions, mask, mine, at, dtype=dtype)
            states.append(hidden)
            after += kvs
            start = end
        return tuple(states), tuple(after)

    def head(self, hidden, dtype) -> jax.Array:
        logits = [model.head(state, dtype) for model, state in zip(self.decoders, hidden, strict=True)]
        return self.config.formula([cut(each, self.config.vocabulary) for each in logits], self.numbers)


def cut(logits: jax.Array, vocabulary: int) -> jax.Array:
    return logits if logits.shape[-1] == vocabulary else logits[..., :vocabulary]


def bind(config: ModelConfig, params: Params) -> decoder.Decoder | Parts:
    """The decoder of one model, or of several together."""
    return Parts(config, params) if isinstance(config, Together) else decoder.bind(config, params)


def parts_of(config: ModelConfig) -> tuple[ModelConfig, ...]:
    """The configs whose caches stand in a row."""
    return config.parts if isinstance(config, Together) else (config,)


def change_each(config: ModelConfig, params: Params, change: Callable[[Params], Params]) -> Params:
    """The parameters with those of each model changed."""
    if not isinstance(config, Together):
        return change(params)
    return {**params, "models": {name: change(model) for name, model in params["models"].items()}}


def compose(model: Model, decode: Decode) -> Model:
    """MODEL with the models of `decode` beside it, which are loaded onto its mesh; MODEL itself where there are none.

    Prompts are written, and sequences end, as MODEL's tokenizer has it.
    """
    if not decode.paths:
        return model
    mesh = getattr(jax.tree.leaves(model.params)[0].sharding, "mesh", None)
    opened: dict[str, Model] = {}
    for key, path in decode.paths.items():
        if path not in opened:
            try:
                opened[path] = open_model(path, mesh)
            except UserError as error:
                raise UserError(f"{decode.block}.{key}: {error}") from error
            check_vocabulary(model.tokenizer, opened[path].tokenizer, f"{decode.block}.{key}={path}")
    return join(model, [opened[path] for path in decode.paths.values()], decode.formula, decode.numbers)


def join(model: Model, others: list[Model], formula: Formula, numbers: Mapping[str, Any]) -> Model:
    """Several models as one; their vocabularies agree (`check_vocabulary`)."""
    models = [model, *others]
    rows, tokens = (
        {get(m) for m in models} for get in (lambda m: m.config.vocab_size, lambda m: m.tokenizer.vocab_size)
    )
    # Rows past the tokens are padding, which a model of another size has fewer of.
    alike = len(rows) == 1 and len(tokens) == 1
    vocabulary = model.config.vocab_size if alike else model.tokenizer.vocab_size
    sizes = {field.name: getattr(model.config, field.name) for field in dataclasses.fields(ModelConfig)}
    sizes["max_position_embeddings"] = min(m.config.max_position_embeddings for m in models)
    config = Together(**sizes, parts=tuple(m.config for m in models), formula=formula, vocabulary=vocabulary)
    params = {
        "models": {str(i): m.params for i, m in enumerate(models)},
        "numbers": {name: np.asarray(value, np.float32) for name, value in numbers.items()},
    }
    return Model(config, params, model.tokenizer)


def check_vocabulary(ours: Tokenizer, theirs: Tokenizer, where: str) -> None:
    """Raise unless every token of ours is theirs under the same number; more tokens behind ours are cut off."""
    mine, other = (
        {id: token for token, id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
        for tokenizer in (ours, theirs)
    )
    for id in sorted(mine):
        if other.get(id) != mine[id]:
            found = "no token" if id not in other else f"{other[id]!r:.40}"
            raise UserError(
                f"{where}: token {id} is {found}, and MODEL has {mine[id]!r:.40} there; models that decide together "
                "need one vocabulary: take one of MODEL's family"
            )
