"""Caches of prompts kept for the next prompts that begin alike: only what is new of a prompt is computed.

A search asks about one question again and again, each time a few words more; asked a second time, a prompt costs
nothing. Keys and values at a position depend on the tokens up to it alone, so a row serves every prompt that begins
as its own does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..models.attention import KV
from ..models.config import ModelConfig
from ..models.decoder import Params
from ..runtime.mesh import activations_on, spread
from .together import bind

Tokens = tuple[int, ...]
STEP = 32
"""New tokens of a batch are padded to multiples of this: few shapes, few compilations."""


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"), donate_argnames=("rows",))
def extend(
    config: ModelConfig, params: Params, rows, source, target, tokens, starts, lengths, *, dtype: str, mesh=None
):
    """Go on from row source[p], whose first starts[p] positions are kept, with tokens[p]; into row target[p].

    Args:
      rows: one KV of [R, K, S, H] a layer, donated.
      tokens: [P, T], padded on the right; lengths: [P] of the whole prompts, which rope positions do not go past.
      target: [P]; out of range: skipped.
    """
    caches = jax.tree.map(lambda row: row[source], rows)
    places = starts[:, None] + jnp.arange(tokens.shape[1])
    mask = jnp.arange(caches[0].k.shape[2]) <= places[:, :, None]
    positions = jnp.minimum(places, lengths[:, None] - 1)
    with activations_on(mesh):
        _, caches = bind(config, params)(tokens, positions, mask, caches, starts, dtype=jnp.dtype(dtype))
        return jax.tree.map(lambda row, new: spread(row.at[target].set(new, mode="drop"), tensor=1), rows, caches)


class Shelf:
    """`count` rows of caches and which prompts they hold; the one not used for longest makes room.

    Args:
      rows: one KV of [count, K, S, H] a layer.
      at_once: prompts computed side by side.
    """

    def __init__(self, config: ModelConfig, params: Params, rows: tuple[KV, ...], at_once: int, dtype: str, mesh=None):
        self.config, self.params, self.rows, self.at_once = config, params, rows, at_once
        self.dtype, self.mesh = dtype, mesh
        count, length = rows[0].k.shape[0], rows[0].k.shape[2]
        self.held = np.full((count, length), -1, np.int32)
        self.where: dict[Tokens, int] = {}
        self.prompts: list[Tokens | None] = [None] * count
        self.used = np.zeros(count, np.int64)
        self.clock = 0
        self.computed = 0
        """Tokens computed; those of all prompts less these were at hand."""

    def lengthen(self, rows: tuple[KV, ...]) -> None:
        """Take over rows with more positions."""
        self.rows = rows
        more = rows[0].k.shape[2] - self.held.shape[1]
        self.held = np.pad(self.held, ((0, 0), (0, more)), constant_values=-1)

    def prepare(self, wanted: Sequence[Tokens], ahead: Sequence[Tokens]) -> list[int]:
        """Rows of prompts; a batch that is not full takes prompts that come later along."""
        self.clock += 1
        for prompt in wanted:
            if prompt in self.where:
                self.used[self.where[prompt]] = self.clock
        missing = [p for p in dict.fromkeys(wanted) if p not in self.where]
        if missing:
            spare = [p for p in dict.fromkeys(ahead) if p not in self.where and p not in missing]
            missing += spare[: -len(missing) % self.at_once]
        for start in range(0, len(missing), self.at_once):
            self.compute(missing[start : start + self.at_once])
        return [self.where[prompt] for prompt in wanted]

    def compute(self, batch: Sequence[Tokens]) -> None:
        alike = [self.longest(prompt) for prompt in batch]
        new = [prompt[shared:] for prompt, (_, shared) in zip(batch, alike, strict=True)]
        P = 1 if len(batch) == 1 and self.mesh is None else self.at_once
        T = -(-max(map(len, new)) // STEP) * STEP
        tokens, numbers = np.zeros((P, T), np.int32), np.zeros((3, P), np.int32)
        target = np.full(P, len(self.prompts), np.int32)
        for i, (prompt, (row, shared)) in enumerate(zip(batch, alike, strict=True)):
            tokens[i, : len(new[i])] = new[i]
            numbers[:, i] = row, shared, len(prompt)
            target[i] = self.place(prompt)
            self.computed += len(new[i])
        numbers[2, len(batch) :] = 1
        self.rows = extend(
            self.config, self.params, self.rows, numbers[0], target, tokens, numbers[1], numbers[2],
            dtype=self.dtype, mesh=self.mesh,
        )  # fmt: skip

    def longest(self, prompt: Tokens) -> tuple[int, int]:
        """(the row that agrees with a prompt for longest, for how many tokens); the last is computed in any case."""
        agree = (self.held[:, : len(prompt) - 1] == np.asarray(prompt[:-1], np.int32)).cumprod(axis=1).sum(axis=1)
        row = int(agree.argmax())
        return row, int(agree[row])

    def place(self, prompt: Tokens) -> int:
        """Give the row not used for longest to a prompt."""
        row = int(self.used.argmin())
        old = self.prompts[row]
        if old is not None:
            del self.where[old]
        self.prompts[row], self.where[prompt], self.used[row] = prompt, row, self.clock
        self.held[row] = -1
        self.held[row, : len(prompt)] = prompt
        return row
