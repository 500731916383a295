r"""`jaxmerge statistics`: what merge rules that read data need of a model, measured on examples.

fisher   of each parameter the mean over examples of $(\partial \log p(\mathrm{answer}) / \partial \theta)^2$
gram     of each linear layer the mean over tokens of $x x^\top$, x what enters it
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.files import card, statistics

from ..generate.score import padded
from ..learn.settings import Data
from ..log import UserError, mistakes, progress, say
from ..models.hf import named
from ..models.loss import Compute
from ..models.open import Model, open_model
from ..models.statistics import Grams, add_fisher, add_grams, by_weight
from ..models.stored import parts
from ..models.tokenizer import DATE
from ..runtime.disk import check_folder
from ..runtime.mesh import make_mesh, mesh_of, shardings
from ..runtime.processes import on_first, several, to_host
from .statistics_settings import StatisticsOptions

TOKENS_AT_ONCE = 4096
"""Positions of a batch whose Gram matrices are computed at once, padding included."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """An example as tokens, and which of them are the answer."""

    tokens: Sequence[int]
    learnt: Sequence[bool]


Measure = Callable[[Model, Sequence[Tokens], StatisticsOptions], dict[str, Any]]


def measure(model: str, data: str, out: Path, options: StatisticsOptions) -> dict[str, Any]:
    """Measure a model on examples and write the folder OUT; what statistics.json says."""
    on_first(check_folder, out)
    opened = open_model(model, make_mesh(options.mesh))
    given = sequences(opened, data, options)
    arrays = MEASURES[options.kind](opened, given, options)
    about = {
        "model": model,
        "data": data,
        "examples": len(given),
        "tokens": sum(len(s.tokens) for s in given),
        "answer_tokens": sum(sum(s.learnt) for s in given),
        "settings": {"limit": options.limit, "dtype": options.dtype, "data": dataclasses.asdict(options.data)},
        "versions": card.versions(),
    }
    host = {name: to_host(array) for name, array in arrays.items()} if several() else arrays
    with mistakes():
        on_first(statistics.write, out, options.kind, host, about)
    say(f"{about['examples']} examples, {about['tokens']} tokens: {options.kind} of {len(arrays)} tensors of {model}")
    return about


def sequences(model: Model, data: str, options: StatisticsOptions) -> list[Tokens]:
    """The examples of a file, of any format that `sft` learns from."""
    from ..learn.sources import load_sources, with_template  # TFDS takes seconds

    source = Data(path=data, **dataclasses.asdict(options.data))
    tokenizer = with_template(model.tokenizer, source.chat_template)
    with tempfile.TemporaryDirectory() as home:
        (examples,), _ = load_sources(source, tokenizer, home=Path(home), seed=0, date_string=DATE)
    found = []
    longest = model.config.max_position_embeddings
    for number, example in enumerate(examples[: options.limit], start=1):
        if "rejected" in example:
            raise UserError(f"{data}, example {number} is a pair of answers; statistics are of examples with one")
        tokens = list(example["tokens"])
        if len(tokens) > longest:
            raise UserError(
                f"{data}, example {number} has {len(tokens)} tokens, and the model ends at {longest}; leave it out"
            )
        begin = example.get("prompt_length")
        learnt = example["learnt"] if begin is None else [i >= begin for i in range(len(tokens))]
        found.append(Tokens(tokens, [bool(one) for one in learnt]))
    return found


def fisher(model: Model, given: Sequence[Tokens], options: StatisticsOptions) -> dict[str, Any]:
    """The mean squared gradient of the answers' log-likelihood, one example after another."""
    params, mesh = model.params, mesh_of(model.params)
    how = Compute(dtype=options.dtype, mesh=mesh)
    like = None if mesh is None else shardings(mesh, params)
    sums = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params), out_shardings=like)()
    with progress("fisher", total=len(given), unit="examples") as bar:
        for one in given:
            tokens, learnt = (
                filled([one.tokens], padded(len(one.tokens))),
                filled([one.learnt], padded(len(one.learnt))),
            )
            sums = add_fisher(model.config, params, {"tokens": tokens, "weights": learnt.astype(np.float32)}, sums, how)
            bar.advance(1)
    mean = jax.jit(lambda sums: jax.tree.map(lambda total: total / len(given), sums), donate_argnums=0)(sums)
    leaves = dict(named(mean))
    stored = parts(model.config, leaves)
    return {name: leaves[p.leaf] if p.expert is None else leaves[p.leaf][p.expert] for name, p in stored.items()}


def gram(model: Model, given: Sequence[Tokens], options: StatisticsOptions) -> dict[str, Any]:
    """The mean over tokens, prompts' and answers', of the products of what enters each linear layer."""
    sums: Grams = {}
    ordered = sorted(given, key=lambda one: len(one.tokens))
    with progress("gram", total=len(given), unit="examples") as bar:
        while ordered:
            length = padded(len(ordered[-1].tokens))
            rows = max(1, TOKENS_AT_ONCE // length)
            batch = [ordered.pop().tokens for _ in range(min(rows, len(ordered)))]
            count = len(batch)
            lengths = np.asarray([len(row) for row in batch] + [0] * (rows - count), np.int32)
            tokens = filled([*batch, *[[]] * (rows - count)], length)
            sums = add_grams(model.config, model.params, tokens, lengths, sums, dtype=options.dtype)
            bar.advance(count)
    total = sum(len(one.tokens) for one in given)
    stored = parts(model.config, dict(named(model.params)))
    names = {part.leaf: name for name, part in stored.items() if part.expert is None}
    return {names[leaf]: found for leaf, found in by_weight({of: g / total for of, g in sums.items()}).items()}


def filled(rows: Sequence[Sequence[Any]], length: int) -> np.ndarray:
    """Rows [B, length] int32, filled up with 0."""
    return np.asarray([[*row, *[0] * (length - len(row))] for row in rows], np.int32)


MEASURES: dict[str, Measure] = {"fisher": fisher, "gram": gram}
"""What measures each kind."""
