"""An update of preference learning with the prompt of a pair computed once and computed twice, in turns.

python benchmarks/pairs.py [key=value …]

  model=configs/miniature   a model as everywhere
  objective=dpo             an objective of pairs, by its name
  pairs=32                  pairs of an update, of random tokens
  prompt=40 longest=24      tokens of each prompt, and of the longest answer; answers have 1 token and more
  updates=5                 of each side, after one that compiles; medians of processor seconds and of seconds
  seed=0

Both sides have the same weights, the same pairs and the same reference. The first losses must agree to 1e-5.
"""

from __future__ import annotations

import math
import os
import pathlib
import statistics
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from train.learn.batches import batches
from train.learn.pairs import rows_of
from train.learn.reference import with_reference
from train.learn.settings import Sft
from train.learn.sft import prepared
from train.learn.shared_pairs import with_shared_prompts
from train.learn.shares import Shares
from train.models.open import Model, load_model
from train.resolve import build
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

OPTIONS = {
    "model": "configs/miniature", "objective": "dpo", "pairs": "32", "prompt": "40", "longest": "24", "updates": "5",
    "seed": "0",
}  # fmt: skip
RATE, CLOCKS = 1e-6, (time.process_time, time.perf_counter)


def examples(vocabulary: int, pairs: int, prompt: int, longest: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of random tokens."""
    draw = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return draw.integers(3, vocabulary, count).tolist()

    made = []
    for _ in range(pairs):
        start = tokens(prompt)
        chosen, rejected = (start + tokens(int(draw.integers(1, longest, endpoint=True))) for _ in range(2))
        made.append({"tokens": chosen, "prompt_length": prompt, "rejected": rejected})
    return made


class Side:
    """One way to compute an update, and what its updates took."""

    def __init__(self, model: Model, given: list[dict[str, Any]], objective: str, shared: bool):
        values = {"objective": objective, "batch": len(given), "max_length": 4096, "share_prompts": shared}
        self.config: Sft = build(Sft, values, "sft")
        mesh = make_mesh(Mesh())
        self.trainee = prepared(
            model.config, model.params, self.config, mesh=mesh, seed=0, dtype="float32", anchor=None
        )
        rows: Any = rows_of(given, self.config, model.tokenizer.pad_id or 0)
        rows = with_shared_prompts(model.config, rows, self.config, self.trainee.how)
        if self.config.objective.reference_model():
            rows = with_reference(model.config, model.params, rows, self.config, self.trainee.how, mesh=mesh)
        first = next(batches(rows, self.config, seed=0))
        print("  rows:", {name: values.shape for name, values in first.items() if name in ("tokens", "sources")})
        self.batch = Shares(mesh, self.config).put(first, 0)
        self.losses: list[float] = []
        self.times: list[list[float]] = []

    def update(self) -> None:
        begun = [clock() for clock in CLOCKS]
        state, sums = self.trainee.step(
            self.trainee.state, self.batch, np.float32(RATE), 0.0, math.inf, *self.trainee.beside
        )
        jax.block_until_ready(state)
        self.trainee = self.trainee._replace(state=state)
        self.losses.append(float(sums["loss"]) / float(sums["weight"]))
        self.times.append([clock() - start for clock, start in zip(CLOCKS, begun, strict=True)])


def main(words: list[str]) -> None:
    given = dict(word.split("=", 1) for word in words)
    if unknown := given.keys() - OPTIONS.keys():
        raise SystemExit(f"known: {', '.join(OPTIONS)}; not {', '.join(unknown)}")
    options = OPTIONS | given
    pairs, prompt, longest, updates, seed = (
        int(options[key]) for key in ("pairs", "prompt", "longest", "updates", "seed")
    )
    model = load_model(options["model"])
    made = examples(model.config.vocab_size, pairs, prompt, longest, seed)
    sides = {name: Side(model, made, options["objective"], name == "once") for name in ("twice", "once")}
    for _ in range(updates + 1):
        for side in sides.values():
            side.update()
    np.testing.assert_allclose(sides["once"].losses[0], sides["twice"].losses[0], rtol=1e-5)
    for column, clock in enumerate(("processor seconds", "seconds")):
        found = {name: [times[column] for times in side.times[1:]] for name, side in sides.items()}
        twice, once = (statistics.median(found[name]) for name in ("twice", "once"))
        print(
            f"  {clock}: {twice:.3f} with the prompt twice, {once:.3f} with it once: {twice / once:.2f} times as fast"
        )
        for name, values in found.items():
            print(f"    {name}: {', '.join(f'{x:.3f}' for x in values)}")


if __name__ == "__main__":
    main(sys.argv[1:])
