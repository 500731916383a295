"""What the model that is about to learn says of its examples: their losses, and vectors that tell which are alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..generate.embed import embed
from ..generate.score import score
from ..models.open import Model
from .picks import Embedding


class ModelMeasure:
    """Measures of `picks.Measure` by a model; computed when asked for.

    The loss of a conversation is that of all that follows the first learnt token.

    Args:
      open: gives the model; called when something is measured.
      examples: {tokens, learnt or prompt_length}; what is longer than the model's context is cut.
      dtype: of the matmuls' operands.
    """

    def __init__(
        self, open: Callable[[], Model], examples: Sequence[Mapping[str, Any]], *, dtype: str = "float32"
    ):  # fmt: skip
        self.open, self.examples, self.dtype = open, examples, dtype

    @functools.cached_property
    def model(self) -> Model:
        return self.open()

    def losses(self) -> np.ndarray:
        most, pairs = self.model.config.context, []
        for e in self.examples:
            tokens = e["tokens"][:most]
            at = first_learnt(e, len(tokens))
            pairs.append((tokens[:at], tokens[at:]))
        found = score(self.model.config, self.model.params, pairs, dtype=self.dtype)
        return np.array([-s.logprob / len(after) for s, (_, after) in zip(found, pairs, strict=True)])

    def embeddings(self, kind: Embedding) -> np.ndarray:
        tokens = [e["tokens"] for e in self.examples]
        return embed(self.model.config, self.model.params, tokens, kind=kind, dtype=self.dtype)


def first_learnt(example: Mapping[str, Any], length: int) -> int:
    """Where the loss is taken from: the first learnt token, one token or more behind the beginning."""
    at = example["prompt_length"] if "prompt_length" in example else int(np.argmax(np.asarray(example["learnt"]) > 0))
    return min(max(1, at), length - 1)
